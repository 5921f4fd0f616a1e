# SPDX-License-Identifier: Apache-2.0
"""Names of modules and tensors as they are in the model before anything is wrapped around its modules.

An adapter is saved, matched and compared under these names, so that it fits a model that is wrapped in another way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from ..checkpoints.names import WRAPPER_PARTS, unwrapped_name


# They hold the model under a name that is public, so that it tells nothing without the class.
_DATA_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class ModuleNames:
    """The names of a model's modules with the wrappers in it and without them."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self._plain: dict[str, str] = {"": ""}
        for name in modules:
            if name:
                parent, _, child = name.rpartition(".")
                is_wrapped = child in WRAPPER_PARTS or (
                    child == "module" and isinstance(modules[parent], _DATA_PARALLEL)
                )
                before = self._plain[parent]
                self._plain[name] = before if is_wrapped else f"{before}.{child}" if before else child
        # of a wrapper and what it wraps, the innermost is the model's own module
        self._wrapped = {plain: name for name, plain in self._plain.items()}

    def plain(self, name: str) -> str:
        """The name of a module, a parameter or a key of a state dict without wrappers."""
        if name in self._plain:
            return self._plain[name]
        owner, _, tensor = name.rpartition(".")
        if owner in self._plain:
            return f"{self._plain[owner]}.{tensor}" if self._plain[owner] else tensor
        # in a state dict some wrappers leave out their own part
        name = unwrapped_name(name)
        inside = name.removeprefix("module.")
        return inside if _owner(inside) in self._wrapped and _owner(name) not in self._wrapped else name

    def wrapped(self, name: str) -> str:
        """The name of a module or a tensor with the parts of all wrappers."""
        name = self.plain(name)
        if name in self._wrapped:
            return self._wrapped[name]
        owner, _, tensor = name.rpartition(".")
        owner = self._wrapped.get(owner, owner)
        return f"{owner}.{tensor}" if owner else tensor

    def peft_key(self, key: str) -> str:
        """
        A key of a state dict under the name by which PEFT selects what belongs to an adapter.

        PEFT goes by the names of the modules. Of the wrappers it knows FSDP1 around the whole model, and it does not
        look for one between an adapted layer and its bias.
        """
        name = self.wrapped(key).removeprefix("_fsdp_wrapped_module.")
        layer, base_layer, tensor = name.rpartition(".base_layer.")
        tensor = unwrapped_name(tensor)
        return name if "." in tensor else f"{layer}{base_layer}{tensor}"

    def keys_of(self, state_dict: Iterable[str]) -> dict[str, str]:
        """The keys of a state dict by their names without wrappers."""
        return {self.plain(key): key for key in state_dict}

    def wrappers(self) -> frozenset[str]:
        """The names of the modules that wrap another one, and are not part of the model themselves."""
        return frozenset(name for name, plain in self._plain.items() if self._wrapped[plain] != name)


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without the modules that only wrap another one, and without their parts of the names."""
    names = ModuleNames(model)
    wrappers = names.wrappers()
    for name, module in model.named_modules():
        if name not in wrappers:
            yield names.plain(name), module


def wrapped_parameters(model: nn.Module, names: ModuleNames, targets: Iterable[str]) -> list[str]:
    """What `target_parameters` has to be for PEFT to find the parameters in a model with wrapped modules."""
    found = set(targets)
    for name, module in model.named_modules():
        if names.plain(name) == name:
            continue
        for parameter in (*module._parameters, *getattr(module, "parametrizations", ())):
            plain = f"{_without_base_layers(names.plain(name))}.{parameter}"
            if any(plain == target or plain.endswith(f".{target}") for target in targets):
                found.add(f"{_without_base_layers(name)}.{parameter}")
    return sorted(found)


def put_module(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in place of a child of another one."""
    if name == "_orig_mod" and hasattr(parent, "dynamo_ctx"):
        # what `torch.compile` returned for a module is bound to the call of that very module
        parent.__init__(module, parent.dynamo_ctx)  # type: ignore[misc]
    else:
        setattr(parent, name, module)


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _without_base_layers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "base_layer")
