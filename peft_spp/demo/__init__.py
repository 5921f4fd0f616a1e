# SPDX-License-Identifier: Apache-2.0
"""What `peft-spp demo` runs: prune a small Llama, fine-tune it with SPP and LoRA, compare the merged models."""

from .config import DemoConfig


__all__ = ["DemoConfig"]
