# SPDX-License-Identifier: Apache-2.0
"""A guard for training runs, for Transformers' `Trainer` and all that derive from it, as TRL's do."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .sparsity.bits import FORMATS
from .sparsity.mask_record import MaskRecord, record_mask
from .tuner.adapter_files import PREFIX
from .tuner.engines import is_sharded, is_zero3, local_part
from .tuner.layer import AdaptedLayer


class _BaseWeight(NamedTuple):
    """What the weight under an SPP layer was at the start of the training."""

    mask: MaskRecord
    # None for a weight that is itself trained
    values: int | None
    version: int


class SPPGuardCallback(TrainerCallback):
    """
    Stops a training run as soon as it goes wrong, with an error that names the module.

    Two things are watched: that every trained parameter stays finite, after each optimizer step; and that the weights
    under the adapters stay unchanged, zeros and values. The weights are compared at the start, every
    `check_base_steps` steps, before each checkpoint is saved, and at the end, and also right after a step in which
    PyTorch counted a change in place. A step that fails is not saved.

    What it costs: after each step one pass over the trained parameters and one wait for the device; for the weights
    one pass over each of them, as [`~peft_spp.sparsity.record_mask`] makes, and a sum.

    In a distributed run a parameter that is not finite in one process stops all of them. Where DeepSpeed ZeRO-3 or
    FSDP2 have sharded the weights, every process compares its own shards, without gathering them, and the process with
    the changed shard stops; the launcher ends the others. Weights that FSDP1 has sharded, or that are offloaded, are
    not compared, with a warning.

    Example:

    ```py
    from peft_spp import SPPGuardCallback

    trainer = SFTTrainer(..., callbacks=[SPPGuardCallback()])
    ```

    Args:
        check_base_steps (`int`, *optional*, defaults to 100):
            After how many steps the base weights are compared; with 0 only before saving and at the end.

    Raises:
        ValueError: If `check_base_steps` is negative, or, when training starts, if the model has no SPP adapter.
        RuntimeError: From within `trainer.train()`, if a trained parameter is not finite or a base weight changed.
    """

    def __init__(self, check_base_steps: int = 100) -> None:
        if check_base_steps < 0:
            raise ValueError(
                f"`check_base_steps` should be a number of steps or 0 but the value passed is {check_base_steps}."
            )
        self.check_base_steps = check_base_steps
        self._trained: dict[str, nn.Parameter] = {}
        self._layers: dict[str, AdaptedLayer] = {}
        self._base: dict[str, _BaseWeight] = {}

    @property
    def base_masks(self) -> dict[str, MaskRecord]:
        """The masks of the weights that are watched, by the names of their modules; empty before training begins."""
        return {name: weight.mask for name, weight in self._base.items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        layers = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
        if not layers:
            raise ValueError(
                "SPPGuardCallback needs a model with an SPP adapter, and the model to train has none. Call "
                "`get_peft_model` with an `SPPConfig` first, or remove the callback."
            )
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._layers = {layer.module_name: layer for layer in layers if _base_part(layer) is not None}
        if len(self._layers) < len(layers):
            unseen = [layer.module_name for layer in layers if layer.module_name not in self._layers]
            warnings.warn(
                f"SPPGuardCallback cannot read the weights of {len(unseen)} modules, such as {unseen[0]}: FSDP1 has "
                "sharded them, or they are offloaded. It checks the trained parameters, but not these weights.",
                stacklevel=2,
            )
        self._base = {name: _look_at_base(layer) for name, layer in self._layers.items()}
        self._check_trained(args, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        self._check_trained(args, step)
        due = self.check_base_steps and step % self.check_base_steps == 0
        if due or control.should_save or control.should_training_stop:
            self._check_base(step, list(self._layers))
        else:
            self._check_base(
                step, [name for name, layer in self._layers.items() if _version(layer) != self._base[name].version]
            )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self._check_base(state.global_step, list(self._layers))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check_trained(args, state.global_step)
        self._check_base(state.global_step, list(self._layers))

    def _check_trained(self, args: TrainingArguments, step: int) -> None:
        parts = {name: local_part(parameter).detach() for name, parameter in self._trained.items()}
        # the largest magnitude of all is NaN or infinite if any is, whereas a sum of squares may overflow by itself
        largest = get_total_norm([part for part in parts.values() if part.numel()], math.inf)
        if _in_all_processes(math.isfinite(largest), args):
            return
        broken = _of_all_processes([name for name, part in parts.items() if not torch.isfinite(part).all()], args)
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise RuntimeError(
            f"Step {step}: {broken[0].removeprefix(PREFIX)}{more} became infinite or NaN. Load the last checkpoint "
            "and train with a lower learning rate, with gradient clipping, or in bfloat16."
        )

    def _check_base(self, step: int, names: list[str]) -> None:
        for name in names:
            now, then = _look_at_base(self._layers[name]), self._base[name]
            if now.mask != then.mask:
                raise RuntimeError(
                    f"Step {step}: the zeros in the weight of module {name} changed ({then.mask.zeros:,} when "
                    f"training started, {now.mask.zeros:,} now). Something other than SPP writes to this weight; "
                    "reload the base model."
                )
            if now.values != then.values:
                raise RuntimeError(
                    f"Step {step}: the frozen weight of module {name} changed, so the adapter no longer fits its "
                    "base model. Find the code that writes to this weight, and reload the base model."
                )
            self._base[name] = now


def _base_part(layer: AdaptedLayer) -> torch.Tensor | None:
    """What can be looked at of the weight under a layer, in rows; `None` if it is not in memory."""
    base_weight = getattr(layer.get_base_layer(), layer.parameter_name, None)
    if base_weight is not None and (is_zero3(base_weight) or is_sharded(base_weight)):
        part = local_part(base_weight).detach()
        # ZeRO-3's partitions are cut anywhere
        return part.reshape(1, -1) if part.ndim < 2 else part.flatten(0, -2)
    weight = layer.unmerged_weight()
    if weight.is_meta or weight.shape[-2:] != (layer.out_features, layer.in_features):
        return None
    return weight.reshape(-1, layer.in_features)


def _look_at_base(layer: AdaptedLayer) -> _BaseWeight:
    weight = cast(torch.Tensor, _base_part(layer))
    base_weight = getattr(layer.get_base_layer(), layer.parameter_name, None)
    is_trained = base_weight is not None and base_weight.requires_grad
    # the sum of the values as integers: exact, and no two runs of it differ
    frozen = not is_trained and weight.dtype in FORMATS
    values = int(weight.view(FORMATS[weight.dtype].integer).sum(dtype=torch.int64)) if frozen else None
    return _BaseWeight(record_mask(weight), values, _version(layer))


def _version(layer: AdaptedLayer) -> int:
    """How often PyTorch has counted a change in place; not every quantized layer has a weight to ask."""
    base_weight = getattr(layer.get_base_layer(), layer.parameter_name, None)
    return 0 if base_weight is None else local_part(base_weight)._version


def _in_all_processes(is_fine: bool, args: TrainingArguments) -> bool:
    if args.world_size == 1:
        return is_fine
    flag = torch.tensor(float(is_fine), device=args.device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def _of_all_processes(names: list[str], args: TrainingArguments) -> list[str]:
    if args.world_size == 1:
        return names
    gathered: list[list[str]] = [[] for _ in range(args.world_size)]
    dist.all_gather_object(gathered, names)
    return list(dict.fromkeys(name for part in gathered for name in part))
