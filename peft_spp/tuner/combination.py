# SPDX-License-Identifier: Apache-2.0
"""Several adapters as one: the exact sum of those that are active, and the nearest single adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..functional import Factors
from ..functional.combine import RankOneBlocks, rank_one_blocks
from .config import SPPConfig
from .layer import SPPLayer
from .param_wrapper import ParamWrapper
from .settings import check_rank


COMBINATION_TYPES = ("rank_one_svd",)


def activate_weighted_adapters(
    model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], inference_mode: bool
) -> None:
    """See [`SPPModel.set_weighted_adapters`]."""
    _check_adapters(model, adapters, weights)
    for layer in _layers(model):
        merged = [name for name in adapters if name in layer.merged_adapters]
        if merged:
            raise ValueError(
                f"Adapter {merged[0]!r} is merged into {layer.module_name!r}, where its weight is fixed. Call "
                "`unmerge_adapter()` first."
            )
    for layer in _layers(model):
        for name, weight in zip(adapters, weights, strict=True):
            layer.set_scale(name, weight)
    model.set_adapter(list(adapters), inference_mode=inference_mode)


def add_weighted_adapter(
    model: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
) -> dict[str, float]:
    """See [`SPPModel.add_weighted_adapter`]."""
    _check_adapters(model, adapters, weights)
    configs = {name: cast(SPPConfig, model.peft_config[name]) for name in adapters}
    if adapter_name in model.peft_config:
        raise ValueError(f"There is an adapter {adapter_name!r} already: choose another name, or delete it first.")
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(
            f"SPP adapters are combined by {' or '.join(map(repr, COMBINATION_TYPES))}, and not by "
            f"{combination_type!r}: their sum is not an SPP adapter. For the exact sum use `set_weighted_adapters`."
        )
    for name, config in configs.items():
        if config.modules_to_save or config.trainable_token_indices:
            raise ValueError(
                f"Adapter {name!r} has `modules_to_save` or `trainable_token_indices`, which cannot be added up. For "
                "the exact sum of the adapters use `set_weighted_adapters`."
            )
    r = svd_rank or max(max(config.r, *config.rank_pattern.values(), 0) for config in configs.values())
    check_rank("svd_rank", r)

    combined = {
        layer.module_name: _combine(layer, adapters, weights, r)
        for layer in _layers(model)
        if any(name in layer.spp_A for name in adapters)
    }
    parameters = {layer.module_name for layer in _layers(model) if isinstance(layer, ParamWrapper)}
    # adapters that have target parameters have the same ones
    target_parameters = next(
        (config.target_parameters for config in configs.values() if config.target_parameters), None
    )
    model.peft_config[adapter_name] = replace(
        configs[adapters[0]],
        r=r,
        spp_alpha=r,
        rank_pattern={},
        alpha_pattern={},
        # by name, as the adapters may have chosen their layers each in its own way
        target_modules=set(combined) - parameters,
        target_parameters=target_parameters,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        bias="none",
    )
    try:
        model.inject_adapter(model.model, adapter_name)
    except BaseException:
        del model.peft_config[adapter_name]
        raise
    for layer in _layers(model):
        if adapter_name in layer.spp_A:
            _write(layer, adapter_name, combined[layer.module_name])
    return {name: one.relative_error for name, one in combined.items()}


def _combine(layer: SPPLayer, adapters: Sequence[str], weights: Sequence[float], r: int) -> RankOneBlocks:
    factors = []
    for name, weight in zip(adapters, weights, strict=True):
        for A, B, _ in layer.get_factors([name]):
            if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
                raise ValueError(
                    f"Adapter {name!r} has values that are NaN or infinite in {layer.module_name!r}. Load an earlier "
                    "checkpoint of it."
                )
            # the scaling that the adapter was trained with: a weight that is set for the exact sum does not count
            factors.append(Factors(A, B, weight * layer.spp_alpha[name] / layer.r[name]))
    return rank_one_blocks(factors, min(r, layer.out_features), layer.num_experts)


@torch.no_grad()
def _write(layer: SPPLayer, adapter_name: str, combined: RankOneBlocks) -> None:
    A, B, scaling = layer.get_factors([adapter_name])[0]
    A.copy_(combined.A)
    B.copy_(combined.B / scaling)
    cast(nn.Linear, layer.spp_A[adapter_name]).requires_grad_(False)
    cast(nn.Linear, layer.spp_B[adapter_name]).requires_grad_(False)


def _check_adapters(model: BaseTuner, adapters: Sequence[str], weights: Sequence[float]) -> None:
    if not adapters or len(set(adapters)) != len(adapters) or len(adapters) != len(weights):
        raise ValueError(
            f"Different adapters are needed, and a weight for each, not {list(adapters)} and {list(weights)}."
        )
    for name, weight in zip(adapters, weights, strict=True):
        if name not in model.peft_config:
            raise ValueError(f"Adapter {name!r} does not exist; there are {', '.join(model.peft_config)}.")
        if not math.isfinite(weight):
            raise ValueError(f"The weight of adapter {name!r} is {weight}, which is not finite.")


def _layers(model: BaseTuner) -> list[SPPLayer]:
    return [module for module in model.model.modules() if isinstance(module, SPPLayer)]
