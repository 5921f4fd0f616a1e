# SPDX-License-Identifier: Apache-2.0
"""
The plan of a training step, for a tiny model of every causal language model of Transformers.

    python tests/architectures/planned.py [--out FILE] [--write] [MODEL_TYPE ...]

A line of JSON a model type is added to FILE; those that are there are passed over, so that a run can be resumed. With
`--write` the file becomes the table that the tests and `docs/planning.md` go by.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from peft_spp.planning import plan_checkpoint

from helpers import every_model
from helpers.model_sweep import first_sentence, main, write_table


TABLE = Path(__file__).parent / "planned.json"
SEQUENCE = 16


def check(model_type: str) -> dict[str, Any]:
    """
    Whether a model type can be planned by its `config.json`.

    Returns:
        `dict`: `"status"`: "planned", "refused" (with the reason), or "unusable" (not built tiny).
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = every_model.tiny_config(model_type)
            config.architectures = [every_model.model_class(model_type).__name__]
            every_model.build(model_type)
        except TimeoutError:
            raise
        except Exception as error:
            return {"status": "unusable", "reason": f"{type(error).__name__}: {first_sentence(error, folder)}"}
        config.save_pretrained(folder)
        try:
            plan = plan_checkpoint(folder, dtype=torch.bfloat16, batch=2, sequence=SEQUENCE)
        except ValueError as error:
            return {"status": "refused", "reason": first_sentence(error, folder)}
    if not (plan.trainable and plan.total > plan.weights > 0 and plan.flops > 0):
        return {"status": "fault", "faults": [f"a plan of nothing: {plan}"]}
    return {"status": "planned"}


if __name__ == "__main__":
    main(check, 120, lambda table: write_table(TABLE, table), every_model.causal_model_types())
