# SPDX-License-Identifier: Apache-2.0
"""What is compared: the models, prunings, methods, learning rates, seeds and tokens of each suite, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from peft_spp.sparsity import NMPattern


@dataclass(frozen=True)
class TrainedModel:
    """A model that the benchmark trains from scratch.

    Args:
        name (`str`): Its name in results.
        architecture (`str`): `"llama"` or `"gpt2"`, which has `Conv1D` in place of linear layers.
        hidden (`int`): The width of the model.
        intermediate (`int`): The width inside the feed-forward part.
        layers (`int`): The number of transformer blocks.
        heads (`int`): The number of attention heads.
        vocabulary (`int`): The size of the tokenizer's vocabulary, which is trained on the same text.
        sequence (`int`): The tokens in a sequence, in training and evaluation.
        batch (`int`): The sequences in a batch of the training from scratch.
        steps (`int`): Its optimizer steps.
        rate (`float`): Its learning rate with AdamW: of the embeddings, the norms and the head.
        muon_rate (`float`): Its learning rate with Muon: of the matrices inside the blocks. Muon moves all directions
            of a matrix alike, so that fewer weights are redundant: after the same 1800 steps of the Llama of the small
            suite the perplexity is 36.1 and Wanda's 2:4 costs 14 % of it; with AdamW at 2e-3 it was 55.9 and 3 %, too
            little to tell methods apart.
        seed (`int`): The seed of the split of the texts, of the weights and of the order of the data.
    """

    name: str
    architecture: Literal["llama", "gpt2"]
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    sequence: int
    batch: int
    steps: int
    rate: float
    muon_rate: float = 0.02
    seed: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that exists, on the Hub or in a folder: pruned already, or dense.

    Args:
        name (`str`): Its name in results.
        source (`str`): The Hub's repository or the folder.
        dtype (`str`): The dtype of the files that are made of it.
        sequence (`int`): The tokens in a sequence, in training and evaluation.
        compute (`str`, *optional*): The dtype to load it in, by default that of the files.
    """

    name: str
    source: str
    dtype: str = "bfloat16"
    sequence: int = 512
    compute: str | None = None


@dataclass(frozen=True)
class Pruning:
    """How a model is pruned.

    Args:
        method (`str`): `"magnitude"`, `"wanda"`, `"sparsegpt"`, or `"published"` for a checkpoint as it is.
        request (`str` or `float`): An N:M pattern, or the share of the weights to prune. Of a published checkpoint
            the pattern or share that it is said to have, which is what is checked after merging.
    """

    method: Literal["magnitude", "wanda", "sparsegpt", "published"]
    request: str | float

    @property
    def name(self) -> str:
        """Its name in results, such as `wanda-2:4`."""
        return f"{self.method}-{self.request}"

    @classmethod
    def of(cls, name: str) -> Pruning:
        """The pruning of such a name."""
        method, _, request = name.partition("-")
        return cls(method, request if ":" in request else float(request))  # type: ignore[arg-type]

    @property
    def pattern(self) -> str | None:
        """The N:M pattern; `None` if it is unstructured."""
        return self.request if isinstance(self.request, str) else None

    @property
    def sparsity(self) -> float:
        """The share of the weights that it prunes."""
        return 1 - NMPattern.parse(self.request).density if isinstance(self.request, str) else self.request

    @property
    def request_label(self) -> str:
        """What is asked for, for readers."""
        return self.request if isinstance(self.request, str) else f"{self.request:.0%}"

    @property
    def label(self) -> str:
        """Its name for readers, such as `Wanda 2:4`."""
        methods = {"magnitude": "Magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "published": "Published"}
        return f"{methods[self.method]} {self.request_label}"


@dataclass(frozen=True)
class Contender:
    """A method with its settings.

    Args:
        method (`str`): One of those in `methods.METHODS`.
        options (`Mapping[str, Any]`): What differs from the method's defaults.
        equal (`str`, *optional*):
            `"parameters"` chooses the rank, of Supertuning the share of the weights, so that it trains as many
            parameters as SPP with its defaults, as near as it goes; `"time"` chooses the steps so that it takes SPP's
            time, at the learning rate that was chosen for the method without this.
        rates (`tuple[float, ...]`): The grid of learning rates; empty for that of the method.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    equal: Literal["parameters", "time"] | None = None
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Study:
    """Contenders on one pruned model.

    Args:
        model (`str`): The name of the model.
        pruning (`Pruning`): How it is pruned.
        contenders (`tuple[Contender, ...]`): What is compared.
        seeds (`tuple[int, ...]`): Of the factors and the order of the data. The first chooses the learning rate.
        rates_from (`Pruning`, *optional*):
            Take the learning rates that were chosen for this pruning of the same model, instead of a grid of its own.
        steps_only (`bool`): Whether only the costs of the contenders' training steps are measured.
    """

    model: str
    pruning: Pruning
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...] = (0,)
    rates_from: Pruning | None = None
    steps_only: bool = False


@dataclass(frozen=True)
class TuningBudget:
    """The fine-tuning that every contender gets.

    Args:
        steps (`int`): Optimizer steps.
        batch (`int`): Sequences in a batch.
        validation_blocks (`int`): Sequences of text to choose learning rates by.
        test_blocks (`int`): Sequences of text to measure perplexity on.
        calibration_blocks (`int`): Sequences of training text to prune with.
        timing_rounds (`int`): Rounds of the side-by-side timing of the steps.
        exact_match_problems (`int`): GSM8K problems to answer; 0 where the model is too weak to have any right.
        tasks (`tuple[str, ...]`): Tasks of lm-evaluation-harness.
        task_folder (`str`, *optional*): A folder with tasks that the harness does not have.
        micro_batch (`int`, *optional*): The most sequences in one forward pass of a process, by default its whole part
            of the batch. Gradients are summed up to the batch.
        rate_steps (`int`, *optional*): Steps of the runs that choose a learning rate, where these are shorter: of one
            sequence each, and at the rates of the grid only.
        task_limit (`int`, *optional*): Only the first questions of each task.
        apart_blocks (`int`): Sequences of each of the texts that perplexity is measured on one by one.
        sampled_blocks (`int`): Sequences that the dense model writes, for contenders that are tuned on those.
    """

    steps: int
    batch: int
    validation_blocks: int
    test_blocks: int
    calibration_blocks: int
    timing_rounds: int
    exact_match_problems: int = 0
    tasks: tuple[str, ...] = ()
    task_folder: str | None = None
    micro_batch: int | None = None
    rate_steps: int | None = None
    task_limit: int | None = None
    apart_blocks: int = 0
    sampled_blocks: int = 0


@dataclass(frozen=True)
class Suite:
    """All that one run measures.

    Args:
        name (`str`): Its name on the command line.
        models (`tuple[TrainedModel | Checkpoint, ...]`): The models.
        studies (`tuple[Study, ...]`): In the order they are run; rates are taken from studies before.
        budget (`TuningBudget`): What each contender gets.
    """

    name: str
    models: tuple[TrainedModel | Checkpoint, ...]
    studies: tuple[Study, ...]
    budget: TuningBudget

    def model(self, name: str) -> TrainedModel | Checkpoint:
        """The model of that name."""
        return next(model for model in self.models if model.name == name)


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
