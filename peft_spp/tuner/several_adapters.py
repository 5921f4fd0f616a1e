# SPDX-License-Identifier: Apache-2.0
"""Several adapters at once: their exact weighted sum, the nearest single one, and batches that mix them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..functional import Factors
from ..functional.combine import RankOneBlocks, rank_one_blocks
from .config import SPPConfig
from .layer_factors import SPPLayer
from .param_wrapper import ParamWrapper
from .settings import check_rank


COMBINATION_TYPES = ("rank_one_svd",)


class SeveralAdapters(BaseTuner):
    """What a model does with several of its adapters."""

    def set_weighted_adapters(
        self, adapters: Sequence[str], weights: Sequence[float], inference_mode: bool = False
    ) -> None:
        """
        Make several adapters active, each with a weight: `W' = W ⊙ (1 + Σ weight · s · P(A) ⊙ B)`, exactly.

        This is the weighted sum that [`add_weighted_adapter`] approximates. It costs hardly more than one adapter, and
        `merge_and_unload()` merges it into one weight. Training goes on with these weights too; saved adapters do not
        have them.

        Args:
            adapters (`List[str]`): The names of the adapters.
            weights (`List[float]`): The weight of each of them; negative ones subtract.
            inference_mode (`bool`, *optional*, defaults to `False`): Whether the adapters are frozen.

        Raises:
            ValueError: If an adapter does not exist or is merged, or the weights are not one finite number for each.
        """
        activate_weighted_adapters(self, adapters, weights, inference_mode)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: Literal["rank_one_svd"] = "rank_one_svd",
        svd_rank: int | None = None,
    ) -> dict[str, float]:
        """
        Add the single adapter that comes closest to a weighted sum of adapters.

        The sum of SPP adapters is not an SPP adapter: in each row block the update is a sum of matrices of rank one.
        `"rank_one_svd"` takes the best rank-one approximation of each block, by a singular value decomposition of the
        factor that multiplies the weight (not of the weight's own change). How good that is, the returned errors say.
        For the exact sum use [`set_weighted_adapters`].

        The new adapter is frozen and not active, and only factors are combined.

        Args:
            adapters (`List[str]`): The names of the adapters to combine. Their ranks and targets may differ.
            weights (`List[float]`): The weight of each of them; negative ones subtract.
            adapter_name (`str`): The name of the new adapter.
            combination_type (`str`): How they are combined: `"rank_one_svd"`.
            svd_rank (`int`, *optional*):
                The `r` of the new adapter, by default the largest rank of any of the adapters. The more row blocks,
                the smaller is the error.

        Returns:
            `Dict[str, float]`: For each adapted module the relative error of `Σ weight · s · P(A) ⊙ B` in the
            Frobenius norm.

        Raises:
            ValueError: If an adapter does not exist, has more than factors, or the new one exists. The model is as it
                was then.
        """
        return add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, svd_rank)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # If adapter_names is passed as an argument, we inject it into the forward arguments.
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            # nothing to do
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")

        with passed_to_layers(self, self.model, adapter_names, kwargs.get("num_beams")):
            yield


def activate_weighted_adapters(
    model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], inference_mode: bool
) -> None:
    """See [`SPPModel.set_weighted_adapters`]."""
    _check_adapters(model, adapters, weights)
    for layer in _layers(model):
        merged = [name for name in adapters if name in layer.merged_adapters]
        if merged:
            raise ValueError(
                f"Adapter {merged[0]!r} is merged into {layer.module_name!r}, so its scale cannot change. Call "
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
        raise ValueError(f"Adapter {adapter_name!r} already exists. Choose another name, or delete it first.")
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(
            f"`combination_type` should be {' or '.join(map(repr, COMBINATION_TYPES))} but the value passed is "
            f"{combination_type!r}. For the exact sum, which is not an SPP adapter, use `set_weighted_adapters`."
        )
    for name, config in configs.items():
        if config.modules_to_save or config.trainable_token_indices:
            raise ValueError(
                f"Adapter {name!r} has `modules_to_save` or `trainable_token_indices`, which cannot be combined. For "
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
            if A.is_meta or B.is_meta:
                raise ValueError(
                    f"Adapter {name!r} has no values in memory in {layer.module_name!r}: load the model without "
                    "offloading it."
                )
            if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
                raise ValueError(
                    f"Adapter {name!r} contains NaN or infinite values in {layer.module_name!r}. Load an earlier "
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
        raise ValueError(f"Pass different adapters and one weight for each, got {list(adapters)} and {list(weights)}.")
    for name, weight in zip(adapters, weights, strict=True):
        if name not in model.peft_config:
            raise ValueError(f"Adapter {name!r} does not exist; the model has {', '.join(model.peft_config)}.")
        if not math.isfinite(weight):
            raise ValueError(f"The weight of adapter {name!r} is {weight}, which is not finite.")


def _layers(model: BaseTuner) -> list[SPPLayer]:
    return [module for module in model.model.modules() if isinstance(module, SPPLayer)]


@contextmanager
def passed_to_layers(tuner: nn.Module, model: nn.Module, adapter_names: Any, num_beams: Any) -> Iterator[None]:
    """While the context is open, every layer is called with the adapter names of its inputs."""
    # Check that users only passed actually existing adapters. Not every layer has every adapter, but a name that no
    # layer knows is a typo.
    expected = {name for module in tuner.modules() if isinstance(module, SPPLayer) for name in module.spp_A}
    unexpected = set(adapter_names) - {"__base__"} - expected
    if unexpected:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unexpected))}")

    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    if beams > 1 and not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    layers = [module for module in tuner.modules() if isinstance(module, SPPLayer)]
    thread = threading.get_ident()
    handles = [
        module.register_forward_pre_hook(
            partial(_pass_adapter_names, adapter_names=names, thread=thread), with_kwargs=True
        )
        for module, names in _names_by_module(tuner, model, adapter_names, beams)
    ]
    try:
        for layer in layers:
            layer.mixed_batch_threads |= {thread}
        yield
    finally:
        for layer in layers:
            layer.mixed_batch_threads -= {thread}
        for handle in handles:
            handle.remove()


def _names_by_module(
    tuner: nn.Module, model: nn.Module, adapter_names: Sequence[str], beams: int
) -> Iterator[tuple[nn.Module, list[str]]]:
    # With beam search each input is repeated once a beam, and so is its adapter name. The encoder of an
    # encoder-decoder model still sees every input once.
    encoder = _get_encoder(model) if beams > 1 else None
    in_encoder = set(encoder.modules()) if encoder is not None else set()
    for module in tuner.modules():
        if isinstance(module, (SPPLayer, AuxiliaryTrainingWrapper)):
            repeats = 1 if module in in_encoder else beams
            yield module, [name for name in adapter_names for _ in range(repeats)]


def _pass_adapter_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str], thread: int
) -> Any:
    if threading.get_ident() == thread:  # the hook is there for batches of other threads, too
        kwargs["adapter_names"] = adapter_names
    return args, kwargs


def _get_encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model; Transformers 5 returns the model itself where there is none."""
    get_encoder: Callable[[], nn.Module] | None = getattr(model, "get_encoder", None)
    encoder = get_encoder() if get_encoder is not None else None
    return None if encoder is model else encoder
