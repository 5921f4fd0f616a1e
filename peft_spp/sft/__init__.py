# SPDX-License-Identifier: Apache-2.0
"""What `peft-spp sft` runs: supervised fine-tuning with SPP, on TRL's parser, dataclasses and `SFTTrainer`."""

from .checkpoints import last_complete_checkpoint


__all__ = ["last_complete_checkpoint"]
