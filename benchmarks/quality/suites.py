# SPDX-License-Identifier: Apache-2.0
"""What is compared: the models, prunings, methods, learning rates, seeds and tokens of each suite, as data."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from .design import Checkpoint, Contender, Pruning, Study, Suite, TrainedModel, TuningBudget


REQUESTS: tuple[str | float, ...] = (0.5, "2:4", "4:8", 0.75, "2:8")
PRUNERS: tuple[Literal["magnitude", "wanda", "sparsegpt"], ...] = ("magnitude", "wanda", "sparsegpt")
AT_2_4 = Pruning("wanda", "2:4")
AT_75 = Pruning("wanda", 0.75)
SEEDS = (0, 1, 2)

EQUAL = (
    Contender("hira", equal="parameters"),
    Contender("masked_lora", equal="parameters"),
    Contender("hira", equal="time"),
    Contender("masked_lora", equal="time"),
)
CLAIMED = tuple(map(Contender, ("spp", "spp_positive", "masked_full", "lora", "ia3")))
SUPERTUNING = (Contender("supertuning", equal="parameters"), Contender("supertuning"))
RIVALS = (Contender("hira"), Contender("masked_lora"), *EQUAL)
ALL = CLAIMED + RIVALS + SUPERTUNING
FEW = tuple(map(Contender, ("spp", "lora", "masked_full")))


def closest(pruning: Pruning) -> Pruning:
    """Which of the two prunings that have a grid of learning rates is nearest in sparsity."""
    return min((AT_2_4, AT_75), key=lambda one: abs(one.sparsity - pruning.sparsity))


def other_prunings(model: str, contenders: tuple[Contender, ...], seeds: tuple[int, ...]) -> tuple[Study, ...]:
    """All prunings but the two that have a grid, at the rates of the closest."""
    prunings = [Pruning(method, request) for request in REQUESTS for method in PRUNERS]
    return tuple(
        Study(model, pruning, contenders, seeds, rates_from=closest(pruning))
        for pruning in prunings
        if pruning not in (AT_2_4, AT_75)
    )


LLAMA = TrainedModel("llama", "llama", 256, 704, 4, 4, 4096, 128, batch=8, steps=1800, rate=2e-3)
GPT2 = TrainedModel("gpt2", "gpt2", 192, 768, 3, 3, 2048, 128, batch=8, steps=800, rate=2e-3)

SMALL = Suite(
    "small",
    (LLAMA, GPT2),
    (
        Study("llama", AT_75, CLAIMED, SEEDS),
        Study("llama", AT_2_4, CLAIMED, SEEDS),
        Study("llama", AT_75, RIVALS, SEEDS),
        Study("llama", AT_2_4, RIVALS, SEEDS),
        Study("llama", AT_75, SUPERTUNING, SEEDS),
        Study("llama", AT_2_4, SUPERTUNING, SEEDS),
        *other_prunings("llama", FEW, SEEDS[:1]),
        Study("gpt2", AT_2_4, FEW),
        Study("gpt2", AT_75, FEW),
    ),
    TuningBudget(steps=40, batch=8, validation_blocks=64, test_blocks=128, calibration_blocks=64, timing_rounds=10),
)

# for a GPU: 226M parameters, and every cell with a grid and three seeds
FULL_LLAMA = TrainedModel("llama", "llama", 1024, 2816, 16, 16, 8192, 512, batch=32, steps=20000, rate=6e-4)
FULL_GPT2 = TrainedModel("gpt2", "gpt2", 768, 3072, 12, 12, 8192, 512, batch=32, steps=10000, rate=6e-4)
FULL = Suite(
    "full",
    (FULL_LLAMA, FULL_GPT2),
    tuple(
        Study(model, Pruning(method, request), ALL if model == "llama" else FEW, SEEDS)
        for model in ("llama", "gpt2")
        for request in REQUESTS
        for method in PRUNERS
    ),
    TuningBudget(
        steps=1000,
        batch=16,
        validation_blocks=256,
        test_blocks=1024,
        calibration_blocks=128,
        timing_rounds=25,
        exact_match_problems=500,
    ),
)

# the tasks of the paper
PAPER_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
LLAMA_CHECKPOINTS = (
    (Checkpoint("llama-3.1-8b-wanda-2:4", "vuiseng9/Meta-Llama-3.1-8B-wanda-2of4"), Pruning("published", "2:4")),
    (
        Checkpoint("llama-3.1-8b-wanda-50", "vuiseng9/Meta-Llama-3.1-8B-wanda-unstructured-0.5"),
        Pruning("published", 0.5),
    ),
    (Checkpoint("sparse-llama-3.1-8b-2:4", "RedHatAI/Sparse-Llama-3.1-8B-2of4"), Pruning("published", "2:4")),
    (Checkpoint("llama-2-7b-70", "neuralmagic/Llama-2-7b-pruned70-retrained"), Pruning("published", 0.7)),
)
SHAPES = {checkpoint.source: "7B" if "Llama-2" in checkpoint.source else "8B" for checkpoint, _ in LLAMA_CHECKPOINTS}
"""Their sizes in `benchmarks.planning`, to plan a run before anything is downloaded."""
LLAMA_CONTENDERS = (
    Contender("spp", rates=(1e-3, 4e-3, 1.6e-2)),
    Contender("hira", rates=(1e-3, 4e-3, 1.6e-2)),
    Contender("lora", rates=(5e-5, 2e-4, 8e-4)),
    Contender("masked_lora", rates=(5e-5, 2e-4, 8e-4)),
)
CHECKPOINTS = Suite(
    "llama",
    tuple(checkpoint for checkpoint, _ in LLAMA_CHECKPOINTS),
    tuple(Study(checkpoint.name, pruning, LLAMA_CONTENDERS) for checkpoint, pruning in LLAMA_CHECKPOINTS),
    TuningBudget(
        steps=500,
        batch=32,
        validation_blocks=128,
        test_blocks=512,
        calibration_blocks=0,
        timing_rounds=5,
        exact_match_problems=500,
        tasks=PAPER_TASKS,
        micro_batch=4,
    ),
)


USUAL = (6e-3, 2e-2, 6e-2)
STARTS = (Contender("spp", rates=USUAL), Contender("spp", {"A": "positive"}, rates=USUAL))
"""SPP as it is, and the start that did better with one seed: these get three, two models and two prunings."""


def _ablation_contenders() -> tuple[Contender, ...]:
    """SPP with one setting after another changed; each gets the grid of learning rates, as far as it goes."""
    low, high = (2e-3, 6e-3, 2e-2), (2e-2, 6e-2, 2e-1)
    return (
        Contender("spp", {"dropout": 0.05, "weight_decay": 0.001}, rates=(4e-3,)),
        Contender("spp", {"r": 4}, rates=USUAL),
        Contender("spp", {"r": 64}, rates=USUAL),
        Contender("spp", {"scaling": 0.5}, rates=high),
        Contender("spp", {"scaling": 8.0}, rates=low),
        Contender("spp", {"B_rate_ratio": 0.25}, rates=USUAL),
        Contender("spp", {"B_rate_ratio": 4.0}, rates=USUAL),
        Contender("spp", {"B_rate_ratio": 16.0}, rates=low),
        Contender("spp", {"dropout": 0.05}, rates=USUAL),
        Contender("spp", {"A": "ones"}, rates=USUAL),
    )


def _dtype_contenders() -> tuple[Contender, ...]:
    """
    SPP in 16 bits at the authors' learning rate and at higher ones, and a start that is not the identity.

    float16 gets no grid: without hardware for it a run took 208 s of processor time where bfloat16 took 11 (AMD EPYC).
    """
    in_float16 = {"dtype": "float16", "factors": "float16"}
    return (
        Contender("spp", {"dtype": "bfloat16"}, rates=(4e-3, 2e-2)),
        Contender("spp", {"dtype": "bfloat16", "factors": "bfloat16"}, rates=(4e-3, 2e-2)),
        Contender("spp", {"B": "random"}, rates=(4e-3,)),
        Contender("spp", in_float16, rates=(4e-3,)),
        Contender("spp", in_float16, rates=(6e-2,)),
        Contender("spp", {"dtype": "float16"}, rates=(6e-2,)),
    )


ABLATION = Suite(
    "ablation",
    (LLAMA, GPT2),
    (
        Study("llama", AT_75, STARTS, SEEDS),
        Study("llama", AT_2_4, STARTS, SEEDS),
        Study("gpt2", AT_75, STARTS, SEEDS),
        Study("gpt2", AT_2_4, STARTS, SEEDS),
        Study("llama", AT_75, _ablation_contenders()),
        Study("llama", AT_75, _dtype_contenders()),
    ),
    SMALL.budget,
)

QUICK_LLAMA = TrainedModel("llama", "llama", 32, 64, 2, 2, 320, 16, batch=2, steps=3, rate=3e-3)
QUICK_GPT2 = TrainedModel("gpt2", "gpt2", 32, 64, 1, 2, 320, 16, batch=2, steps=2, rate=3e-3)
QUICK_RATES = {one.method: Contender(one.method, rates=(1e-3,)) for one in ALL}
QUICK = Suite(
    "quick",
    (QUICK_LLAMA, QUICK_GPT2),
    (
        Study("llama", AT_2_4, tuple(QUICK_RATES.values()), SEEDS[:2]),
        Study(
            "llama", AT_75, (Contender("spp"), QUICK_RATES["masked_lora"], replace(EQUAL[1], rates=(1e-3,)), EQUAL[3])
        ),
        Study("llama", Pruning("sparsegpt", "2:8"), FEW[:1], rates_from=AT_75),
        Study("gpt2", AT_2_4, (QUICK_RATES["spp"], QUICK_RATES["masked_full"])),
    ),
    TuningBudget(steps=2, batch=2, validation_blocks=2, test_blocks=2, calibration_blocks=2, timing_rounds=1),
)

SUITES = {suite.name: suite for suite in (SMALL, FULL, CHECKPOINTS, ABLATION)}
