# SPDX-License-Identifier: Apache-2.0
"""Methods that PEFT has, SPP among them, and the frozen base model."""

from __future__ import annotations

from peft import HiraConfig, IA3Config, LoraConfig, get_peft_model
from torch import nn

from peft_spp import SPPConfig, compress

from ..harness.plots import BLACK, BLUE, GRAY, GREEN, ORANGE, YELLOW, Style
from .block_linears import block_linear_suffixes
from .registry import competitor


@competitor("base", Style("Frozen base", GRAY, "x"))
def adapt_base(model: nn.Module) -> nn.Module:
    """No adapter: nothing to train, only the gradient of the input flows."""
    return model.requires_grad_(False)


@competitor("lora", Style("LoRA, r=16", BLACK, "s"))
def adapt_lora(model: nn.Module) -> nn.Module:
    """PEFT's LoRA, r = 16, alpha = 32, no dropout."""
    config = LoraConfig(r=16, lora_alpha=32, target_modules=block_linear_suffixes(model))
    return get_peft_model(model, config)  # type: ignore[arg-type]  # any module will do


@competitor("hira", Style("HiRA, r=32", ORANGE, "^"))
def adapt_hira(model: nn.Module) -> nn.Module:
    """PEFT's HiRA, r = 32 (its default), no dropout: W' = W ⊙ (1 + B A), by a second matmul with W ⊙ (B A)."""
    return get_peft_model(model, HiraConfig(r=32, target_modules=block_linear_suffixes(model)))  # type: ignore[arg-type]


@competitor("ia3", Style("IA³", YELLOW, "v"))
def adapt_ia3(model: nn.Module) -> nn.Module:
    """PEFT's IA³: a vector on the output of every layer, on the input of those named `down_proj`."""
    targets = block_linear_suffixes(model)
    feedforward = [name for name in targets if name == "down_proj"]
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    return get_peft_model(model, config)  # type: ignore[arg-type]


@competitor("spp", Style("peft_spp, r=16", BLUE, "o"))
def adapt_spp(model: nn.Module) -> nn.Module:
    """SPP as this repository has it, r = 16, alpha = 32."""
    config = SPPConfig(r=16, spp_alpha=32, target_modules=block_linear_suffixes(model))
    return get_peft_model(model, config)  # type: ignore[arg-type]


@competitor("spp_compressed", Style("peft_spp on compressed weights, r=16", GREEN, "D"))
def adapt_spp_compressed(model: nn.Module) -> nn.Module:
    """The same on a base model that stores no zeros. Its weights are its own, and not those of the others."""
    return adapt_spp(compress(model))
