# SPDX-License-Identifier: Apache-2.0
"""Adding an adapter to a model such that it can be undone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer_factors import SPPLayer
from .module_names import ModuleNames


class Injection:
    """What adding one adapter did to a model, and how to undo it."""

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.model = model
        self.adapter_name = adapter_name
        self.names = ModuleNames(model)
        self.wrappers = self.names.wrappers()
        self.requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.steps: list[Callable[[], None]] = []
        self.one_block_a_row: list[str] = []

    def holders(self, module_name: str) -> set[type[nn.Module]]:
        """The classes of the modules that hold a module, directly or inside of others."""
        parts = self.names.wrapped(module_name).split(".")
        return {type(self.model.get_submodule(".".join(parts[:at]))) for at in range(len(parts))}

    def on_undo(self, step: Callable[[], None]) -> None:
        """Tell how to undo what is about to be done. The steps are undone in reverse order."""
        self.steps.append(step)

    def adds_to(self, layer: SPPLayer) -> None:
        """Tell that a layer which is there already is about to get the adapter."""
        self.on_undo(partial(_remove_adapter, layer, self.adapter_name, layer.active_adapters))

    def undo(self) -> None:
        """Leave the model as it was before."""
        for step in reversed(self.steps):
            step()
        for name, module in list(self.model.named_modules()):
            if not isinstance(module, AuxiliaryTrainingWrapper) or self.adapter_name not in module._adapters:
                continue
            if len(module._adapters) > 1:
                others = [other for other in module.active_adapters if other != self.adapter_name]
                module.delete_adapter(self.adapter_name, others)
            else:
                parent_name, _, child_name = name.rpartition(".")
                setattr(self.model.get_submodule(parent_name), child_name, module.original_module)
        for parameter, requires_grad in self.requires_grad:
            parameter.requires_grad_(requires_grad)


def _remove_adapter(layer: SPPLayer, adapter_name: str, active_adapters: list[str]) -> None:
    layer.set_adapter(active_adapters)
    layer.delete_adapter(adapter_name)
