# SPDX-License-Identifier: Apache-2.0
"""The demo with tiny sizes."""

from dataclasses import dataclass

from peft_spp.demo import DemoConfig
from peft_spp.demo.checks import SavedModelCheck
from peft_spp.demo.output import OutputFolder


SMOKE_CONFIG = DemoConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    block_size=32,
    batch_size=8,
    dense_steps=20,
    calibration_batches=2,
    tuning_steps=10,
)


@dataclass(frozen=True)
class SmokeRun:
    output: OutputFolder
    config: DemoConfig
    checks: dict[str, SavedModelCheck]
    shown: str
