# SPDX-License-Identifier: Apache-2.0
"""A guard for training runs, for Transformers' `Trainer` and all that derive from it, as TRL's do."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .sparsity.bits import FORMATS
from .sparsity.mask_record import MaskRecord, record_mask
from .tuner.layer import Linear


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
    under the adapters stay what they were, zeros and values. These are compared at the start, every
    `check_base_steps` steps, before each checkpoint is saved, and at the end, and also right after a step in which
    PyTorch counted a change in place. Nothing is saved of a step that fails.

    What it costs: after each step one pass over the trained parameters and one wait for the device; for the weights
    one pass over each of them, as [`~peft_spp.sparsity.record_mask`] makes, and a sum.

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
            raise ValueError(f"`check_base_steps` should be a number of steps or 0, got {check_base_steps}.")
        self.check_base_steps = check_base_steps
        self._trained: dict[str, nn.Parameter] = {}
        self._layers: dict[str, Linear] = {}
        self._base: dict[str, _BaseWeight] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        layers = [module for module in model.modules() if isinstance(module, Linear)]
        if not layers:
            raise ValueError("SPPGuardCallback guards SPP adapters, and the model to train has none.")
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
        # a weight that is on the meta device, or that an engine has partitioned, cannot be looked at
        self._layers = {
            layer.module_name: layer
            for layer in layers
            if not (weight := layer.unmerged_weight()).is_meta
            and weight.shape == (layer.out_features, layer.in_features)
        }
        self._base = {name: _look_at_base(layer) for name, layer in self._layers.items()}
        self._check_trained(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        self._check_trained(step)
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
        self._check_trained(state.global_step)
        self._check_base(state.global_step, list(self._layers))

    def _check_trained(self, step: int) -> None:
        parameters = [parameter.detach() for parameter in self._trained.values()]
        # the largest magnitude of all is NaN or infinite if any is, whereas a sum of squares may overflow by itself
        if math.isfinite(get_total_norm(parameters, math.inf)):
            return
        broken = [name for name, parameter in self._trained.items() if not torch.isfinite(parameter).all()]
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise RuntimeError(
            f"Step {step}: {broken[0].removeprefix('base_model.model.')}{more} went infinite or NaN. Load the last "
            "checkpoint, and train with a lower learning rate, with gradient clipping, or in bfloat16."
        )

    def _check_base(self, step: int, names: list[str]) -> None:
        for name in names:
            now, then = _look_at_base(self._layers[name]), self._base[name]
            if now.mask != then.mask:
                raise RuntimeError(
                    f"Step {step}: pruned places of the weight of module {name} changed ({then.mask.zeros:,} zeros at "
                    f"the start of the training, {now.mask.zeros:,} now). Something other than SPP writes to it; load "
                    "the base model again."
                )
            if now.values != then.values:
                raise RuntimeError(
                    f"Step {step}: the frozen weight of module {name} changed. The adapter is trained for another "
                    "base model than it says; find what writes to the weight, and load the base model again."
                )
            self._base[name] = now


def _look_at_base(layer: Linear) -> _BaseWeight:
    weight = layer.unmerged_weight()
    frozen = not layer.get_base_layer().weight.requires_grad and weight.dtype in FORMATS
    # the sum of the values as integers: exact, and no two runs of it differ
    values = int(weight.view(FORMATS[weight.dtype].integer).sum(dtype=torch.int64)) if frozen else None
    return _BaseWeight(record_mask(weight), values, _version(layer))


def _version(layer: Linear) -> int:
    version: int = layer.get_base_layer().weight._version
    return version
