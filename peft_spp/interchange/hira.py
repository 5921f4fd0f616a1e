# SPDX-License-Identifier: Apache-2.0
"""An SPP adapter as an adapter of PEFT's HiRA.

HiRA (Huang et al. 2025, https://openreview.net/forum?id=TwJrTz9cRS) is `W' = W + W ⊙ (B A)` with A of shape (r, n) and
B of shape (m, r), and no scaling. SPP is the case in which row i of B has one non-zero, `s · B_spp[i]`, in the column
of i's row block.

What is exact: B A has one non-zero product a row, and adding zeros does not round, so B A is bit for bit the
`P(A) ⊙ (s · B)` of SPP's own kernels, which scale B first as well. s · B is rounded once, to float32 (not at all if s
is a power of two). What HiRA does with B A after that rounds at other points than SPP does: the weights and logits
agree to the rounding of the base model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch
from peft import HiraConfig, PeftConfig

from ..functional import row_block_index
from ..functional.factors import compute_dtype
from ..merge.adapter import AdaptedModule, Adapter
from ..tuner import SPPConfig
from ..tuner.adapter_files import PREFIX
from .content import AdapterContent
from .report import ExchangedModule


_CARD = """# HiRA adapter, exported from SPP

Exported by `peft-spp export` from an SPP adapter ([Lu et al. 2024](https://arxiv.org/abs/2405.16057)) of a pruned
model. It is equivalent to that adapter, and merging it keeps every zero. PEFT 0.20 or newer loads it without other
packages."""
# fields of SPPConfig that HiRA's configuration has as well
_SAME = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "revision",
    "target_modules",
    "task_type",
)
# those whose meaning is in the tensors, or that only describe an SPP adapter
_TAKEN_IN = (
    "alpha_pattern",
    "check_base",
    "format_version",
    "init_weights",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "spp_alpha",
    "spp_dropout",
)


def to_hira(adapter: Adapter) -> AdapterContent:
    """
    Write an SPP adapter as a HiRA adapter that computes the same.

    All modules get the largest rank of any, filled up with zeros: PEFT up to 0.21 reads `rank_pattern` of a HiRA
    configuration and then builds every layer with `r`.
    """
    _check_settings(adapter)
    rank = max((module.r for module in adapter.modules.values()), default=adapter.config.r)
    config = _hira_config(adapter.config, rank)
    tensors = {f"{PREFIX}{name}": tensor.load() for name, tensor in adapter.trained.items()}
    others = tuple(tensors)
    modules = []
    for name, module in adapter.modules.items():
        A, B = _hira_factors(module, rank)
        tensors[f"{PREFIX}{name}.hira_A"], tensors[f"{PREFIX}{name}.hira_B"] = A, B
        modules.append(ExchangedModule(name, A.shape[1], B.shape[0], module.r, module.scaling, A.numel() + B.numel()))
    return AdapterContent(config, tensors, tuple(modules), others, _CARD)


def _hira_factors(module: AdaptedModule, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    A, B = module.A.load(), module.B.load()
    # half precision would round s · B once more than SPP does
    dtype = compute_dtype(A, B)
    rows = torch.arange(B.shape[0])
    hira_A = torch.zeros(rank, A.shape[1], dtype=dtype)
    hira_A[: module.r] = A
    hira_B = torch.zeros(B.shape[0], rank, dtype=dtype)
    hira_B[rows, row_block_index(B.shape[0], module.r)] = B.to(dtype).squeeze(1) * module.scaling
    if not torch.isfinite(hira_B).all():
        raise ValueError(f"the scaling {module.scaling:g} times B of module {module.name!r} is not finite in {dtype}")
    return hira_A, hira_B


def _hira_config(config: SPPConfig, rank: int) -> PeftConfig:
    settings: dict[str, Any] = {name: getattr(config, name) for name in _SAME}
    hira_config: PeftConfig = HiraConfig(r=rank, hira_dropout=config.spp_dropout, **settings)
    return hira_config


def _check_settings(adapter: Adapter) -> None:
    for name, value in _other_settings(adapter.config).items():
        raise ValueError(
            f"the adapter {adapter.folder} has {name}={value!r}, which HiRA does not support. Merge it into the base "
            "model instead: peft-spp merge"
        )


def _other_settings(config: SPPConfig) -> Mapping[str, Any]:
    """The settings that are neither HiRA's, nor in the tensors, nor left at their default."""
    other = {}
    for one in fields(config):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        value = getattr(config, one.name)
        if one.name not in _SAME and one.name not in _TAKEN_IN and value not in (default, []):
            other[one.name] = value
    return other
