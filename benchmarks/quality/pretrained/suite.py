# SPDX-License-Identifier: Apache-2.0
"""The suite of a pretrained model: any folder of Transformers, pruned here, tuned, and asked questions."""

from __future__ import annotations

from dataclasses import replace

from ..design import Checkpoint, Contender, Pruning, Study, Suite, TuningBudget
from ..suites import AT_2_4


# Short runs choose the rate, and those favor rates that are too high for long ones: SPP at 2e-2 was the best of 6e-3,
# 2e-2 and 6e-2 after 40 steps, and ended after 300 steps at a perplexity of 1192. So its grid leaves them out.
SPP_RATES = (2e-3, 6e-3, 1.2e-2)
LORA_RATES = (3e-4, 1e-3, 3e-3)

SPP = Contender("spp", rates=SPP_RATES)
SUPERTUNING = Contender("supertuning", equal="parameters", rates=LORA_RATES)
IA3 = Contender("ia3", rates=(3e-3, 1e-2, 3e-2))
HIRA = Contender("hira", rates=(3e-3, 1e-2, 3e-2))
MASKED_LORA = Contender("masked_lora", rates=LORA_RATES)
POSITIVE = Contender("spp_positive", rates=SPP_RATES)
LORA = Contender("lora", rates=LORA_RATES)
MASKED_FULL = Contender("masked_full", rates=(5e-5, 2e-4, 6e-4))


def distilled(contender: Contender, text: str = "data") -> Contender:
    """The contender, tuned to predict what the dense model does."""
    return Contender(contender.method, {**contender.options, "teacher": True, "text": text}, rates=contender.rates)


def on_questions(contender: Contender, rate: float) -> Contender:
    """The contender, tuned on the tasks' training parts as well, at one rate."""
    return Contender(contender.method, {**contender.options, "text": "questions"}, rates=(rate,))


FOUR = (POSITIVE, LORA, distilled(POSITIVE, "both"), MASKED_FULL)
"""The contenders that matter most: these are run on all prunings, and with two seeds."""
OTHERS = (
    SPP,
    distilled(POSITIVE),
    MASKED_LORA,
    SUPERTUNING,
    HIRA,
    IA3,
    distilled(POSITIVE, "samples"),
    Contender("supertuning", rates=LORA_RATES),
    distilled(MASKED_FULL, "both"),
    Contender("spp_positive", {"r": 64}, rates=SPP_RATES),
)
EQUAL = tuple(replace(rival, equal=equal) for equal in ("time", "parameters") for rival in (HIRA, MASKED_LORA))
"""SPP's rivals that keep the zeros, at equal parameters and at equal time."""
AT_50 = Pruning("wanda", 0.5)
SPARSEGPT_2_4 = Pruning("sparsegpt", "2:4")
# Wanda leaves nothing to win back at 75 %: a perplexity of 4,600 on WikiText-2
SPARSEGPT_75 = Pruning("sparsegpt", 0.75)
NAME = "pretrained"

PRETRAINED = Suite(
    "pretrained",
    # the folder is given on the command line
    (Checkpoint(NAME, "", dtype="bfloat16"),),
    (
        Study(NAME, AT_2_4, FOUR),
        Study(NAME, AT_2_4, (on_questions(POSITIVE, 6e-3), on_questions(LORA, 3e-3))),
        Study(NAME, AT_2_4, OTHERS[:4]),
        Study(NAME, AT_50, (*FOUR, SPP), rates_from=AT_2_4),
        Study(NAME, AT_2_4, OTHERS[4:]),
        Study(NAME, AT_50, (IA3, SUPERTUNING), rates_from=AT_2_4),
        Study(NAME, AT_2_4, FOUR + OTHERS + EQUAL, steps_only=True),
        Study(NAME, AT_2_4, EQUAL),
        Study(NAME, AT_2_4, (POSITIVE, SPP, distilled(POSITIVE, "both"), LORA), seeds=(0, 1)),
        Study(NAME, SPARSEGPT_2_4, (*FOUR, SPP), rates_from=AT_2_4),
        Study(NAME, SPARSEGPT_75, (SPP, LORA, MASKED_FULL), rates_from=AT_2_4),
        Study(NAME, AT_2_4, (MASKED_FULL,), seeds=(0, 1)),
        Study(NAME, AT_50, (POSITIVE, SPP, distilled(POSITIVE, "both"), LORA), seeds=(0, 1), rates_from=AT_2_4),
    ),
    TuningBudget(
        steps=300,
        batch=2,
        validation_blocks=8,
        test_blocks=0,
        calibration_blocks=64,
        timing_rounds=5,
        rate_steps=40,
        task_limit=300,
        apart_blocks=12,
        sampled_blocks=192,
    ),
    reference=SPP,
)
