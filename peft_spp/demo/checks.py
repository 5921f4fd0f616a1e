# SPDX-License-Identifier: Apache-2.0
"""Measuring the demo's saved models."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import DemoConfig
from .output import OutputFolder


CHECK_SCRIPT = Path(__file__).with_name("check_saved_models.py")


@dataclass(frozen=True)
class SavedModelCheck:
    """What was measured on a saved model."""

    perplexity: float  # perplexity on the held-out text
    sparsity: float  # share of zeros in the linear layers
    groups_2_4: float  # share of groups of four weights along the input that are 2:4

    @property
    def is_2_4(self) -> bool:
        return self.groups_2_4 == 1.0


def check_saved_models(output: OutputFolder, config: DemoConfig) -> dict[str, SavedModelCheck]:
    """Measure the saved models in a new process, in which `peft_spp` is not imported."""
    folders = {
        "dense": output.dense,
        "pruned": output.pruned,
        "lora_merged": output.lora_merged,
        "lora_masked": output.lora_masked,
        "spp_merged": output.spp_merged,
    }
    completed = subprocess.run(
        [sys.executable, CHECK_SCRIPT, output.held_out_text, str(config.block_size), *folders.values()],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
    )
    if completed.returncode != 0:
        raise RuntimeError(f"The check of the saved models failed:\n{completed.stderr}")
    checks = json.loads(completed.stdout)
    return {name: SavedModelCheck(**check) for name, check in zip(folders, checks, strict=True)}


def recovered_share(checks: dict[str, SavedModelCheck], name: str) -> float:
    """How much of the log-perplexity that pruning cost the model `name` has won back: 0 for none, 1 for all of it."""
    dense, pruned, tuned = (math.log(checks[key].perplexity) for key in ("dense", "pruned", name))
    return (pruned - tuned) / (pruned - dense)
