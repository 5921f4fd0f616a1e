# SPDX-License-Identifier: Apache-2.0
"""
The experts of a mixture, whose weights are stacks without their zeros.

A stack stays a parameter of its module, with the values for its content, and next to it there is a bitmask: so
`state_dict`, devices, engines that shard parameters and PEFT's `target_parameters` find what they look for, as in
[`CompressedLinear`]. Only inside the module's own forward pass its name gives the stack, in the form of a
[`~peft_spp.functional.compressed_stack.CompressedStack`].
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.compressed_files import bitmask_of
from ..functional import Compressed, Factors, scaled_weight
from ..functional.bitmask import bitmask_bytes, check_compressed, count_row_offsets
from ..functional.compressed import check_frozen, decompress
from ..functional.compressed_stack import CompressedStack
from .row_offsets import Counted


class _OfThread(threading.local):
    """The modules whose forward passes a thread is in."""

    def __init__(self) -> None:
        self.inside: list[nn.Module] = []


_of_thread = _OfThread()


class CompressedExperts(nn.Module):
    """
    What a module with stacks of weights becomes: its class is a subclass of this one and of the one that it had.

    `<name>` holds the values of a stack that are not `+0.0`, expert after expert and row by row, and the buffer
    `<name>_bitmask` says where they belong (`bitmask` for a stack that is called `weight`).
    """

    _columns: dict[str, int]
    _counted: dict[str, Counted]

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names of the compressed stacks."""
        return tuple(self._columns)

    def compressed(self, name: str) -> Compressed:
        """
        The weights of a stack, not a copy.

        Args:
            name (`str`): The name of the parameter.

        Returns:
            [`Compressed`]: shape `(experts, m, n)`.
        """
        bitmask, own = (getattr(self, buffer) for buffer in _buffers(name))
        values, columns = _values(self, name), self._columns[name]
        row_offsets = self._counted[name].row_offsets(values, bitmask, own, columns, f"the stack {name!r}")
        return Compressed(values, bitmask, row_offsets, columns)

    def put(self, name: str, compressed: Compressed) -> None:
        """
        Replace the weights of a stack.

        Args:
            name (`str`): The name of the parameter.
            compressed ([`Compressed`]): The new weights, of the same shape.
        """
        self._parameters[name] = nn.Parameter(compressed.values, requires_grad=False)
        for buffer, tensor in zip(_buffers(name), (compressed.bitmask, compressed.row_offsets), strict=True):
            setattr(self, buffer, tensor)
        self._counted[name].note(compressed.values, compressed.bitmask)

    def stack(self, name: str, factors: Sequence[Factors] = (), *, inputs_first: bool = False) -> Tensor:
        """
        What stands for a stack in the code that multiplies with it.

        Args:
            name (`str`): The name of the parameter.
            factors (`Sequence[Factors]`): The factors of each adapter.
            inputs_first (`bool`): Whether the weights are stored as (in_features, out_features), for the factors.

        Returns:
            `torch.Tensor`: W', shape `(experts, m, n)`; the dense one for the compiler.

        Raises:
            ValueError: If its values are to get a gradient.
        """
        weight = self.compressed(name)
        check_frozen(weight)
        if not torch.compiler.is_compiling():
            return CompressedStack(weight, factors, inputs_first=inputs_first)
        values, bitmask, row_offsets, n = weight
        rows = torch.ops.peft_spp.compressed_weight(
            values, bitmask.flatten(0, 1), row_offsets, n, [], [], [], True, values.dtype
        )
        dense: Tensor = rows.unflatten(0, bitmask.shape[:2])
        if not factors:
            return dense
        return scaled_weight(dense.mT, factors).mT if inputs_first else scaled_weight(dense, factors)

    def dequantize(self, name: str) -> Tensor:
        """
        The dense weights of a stack.

        Args:
            name (`str`): The name of the parameter.

        Returns:
            `torch.Tensor`: shape `(experts, m, n)`, a new tensor.
        """
        return decompress(self.compressed(name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        _of_thread.inside.append(self)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _of_thread.inside.pop()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *args: Any
    ) -> None:
        # the number of values is that of the weights that come
        for name, columns in self._columns.items():
            values, bitmask = state_dict.get(prefix + name), state_dict.get(prefix + bitmask_of(name))
            if values is None or bitmask is None:
                continue
            own_bits, own_values = getattr(self, bitmask_of(name)), _values(self, name)
            row_offsets = check_compressed(values, bitmask, (*own_bits.shape[:-1], columns), prefix + name)
            assigned = local_metadata.get("assign_to_params_buffers", False)
            device = torch.device("meta") if assigned else own_values.device
            places = torch.empty(len(values), dtype=own_values.dtype, device=device)
            self.put(name, Compressed(places, own_bits, row_offsets.to(own_bits.device), columns))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)

    def extra_repr(self) -> str:
        zeros = []
        for name in self._columns:
            weight = self.compressed(name)
            places = weight.shape.numel()
            zeros.append(f"{name}: zeros={1 - weight.values.numel() / places if places else 0:.1%}")
        return ", ".join(part for part in (super().extra_repr(), *zeros) if part)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # its class is made when it is needed, and cannot be found by its name
        return _remake, (_original(type(self)), self.stacks), self.__dict__


def put_stack(module: nn.Module, name: str, compressed: Compressed) -> None:
    """
    Compress one stack of a module.

    Args:
        module (`nn.Module`): The module, changed in place: it gets another class.
        name (`str`): The name of the parameter.
        compressed ([`Compressed`]): Its weights.
    """
    columns = {**getattr(module, "_columns", {}), name: compressed.columns}
    module.__class__ = _compressed_class(_original(type(module)), tuple(columns))
    module._columns = columns  # type: ignore[assignment]
    module._counted = {**getattr(module, "_counted", {}), name: Counted()}  # type: ignore[assignment]
    bitmask, row_offsets = _buffers(name)
    module.register_buffer(bitmask, compressed.bitmask)
    module.register_buffer(row_offsets, compressed.row_offsets, persistent=False)
    module._parameters[name] = nn.Parameter(compressed.values, requires_grad=False)


def put_stack_without_values(module: nn.Module, name: str) -> None:
    """
    Compress one stack of a module before its weights are there.

    Args:
        module (`nn.Module`): The module, changed in place: it gets another class.
        name (`str`): The name of the parameter, which has the shape and the dtype.
    """
    weight = module._parameters[name]
    assert weight is not None
    *rows, n = weight.shape
    bitmask = torch.zeros(*rows, bitmask_bytes(n), dtype=torch.uint8, device="meta")
    values = torch.empty(0, dtype=weight.dtype, device="meta")
    put_stack(module, name, Compressed(values, bitmask, count_row_offsets(bitmask), n))


def put_dense_stacks(module: nn.Module) -> None:
    """
    Make all stacks of a module dense again, which is of the class then that it had.

    Args:
        module (`nn.Module`): A [`CompressedExperts`], changed in place.
    """
    assert isinstance(module, CompressedExperts)
    for name in module.stacks:
        module._parameters[name] = nn.Parameter(module.dequantize(name))
        for buffer in _buffers(name):
            delattr(module, buffer)
    del module._columns, module._counted
    module.__class__ = _original(type(module))


def put_row_offsets(model: nn.Module, name: str, row_offsets: Tensor) -> None:
    """
    Set where the rows of a compressed weight begin, which is not stored.

    Args:
        model (`nn.Module`): The model.
        name (`str`): The name of the weight, that of a linear layer or of a stack.
        row_offsets (`torch.Tensor`): The offsets.
    """
    owner, _, parameter = name.rpartition(".")
    module, (_, buffer) = model.get_submodule(owner), _buffers(parameter)
    setattr(module, buffer, row_offsets.to(getattr(module, buffer).device))


def find_compressed_stacks(model: nn.Module) -> dict[str, tuple[CompressedExperts, str]]:
    """
    Find the compressed stacks of a model.

    Args:
        model (`nn.Module`): Any module.

    Returns:
        `dict[str, tuple[CompressedExperts, str]]`: By the name of the parameter, the module and its name there.
    """
    return {
        f"{name}.{stack}" if name else stack: (module, stack)
        for name, module in model.named_modules()
        if isinstance(module, CompressedExperts)
        for stack in module.stacks
    }


def _buffers(name: str) -> tuple[str, str]:
    return bitmask_of(name), "row_offsets" if name == "weight" else f"{name}_row_offsets"


def _values(module: nn.Module, name: str) -> Tensor:
    # a replica, and one whose parameters FSDP1 has flattened, has a plain attribute
    values: Tensor | None = module.__dict__.get(name, module._parameters.get(name))
    if values is None:
        raise RuntimeError(f"{type(module).__name__} has no values of {name!r}")
    return values


def _original(cls: type[nn.Module]) -> Any:
    return getattr(cls, "_uncompressed", cls)


def _remake(cls: Any, names: tuple[str, ...]) -> nn.Module:
    compressed = _compressed_class(cls, names)
    module: nn.Module = compressed.__new__(compressed)
    return module


@cache
def _compressed_class(cls: Any, names: tuple[str, ...]) -> Any:
    """The class of a module with compressed stacks: with properties, which come before attributes."""

    def looked_up(name: str) -> property:
        def get(self: CompressedExperts) -> Tensor:
            is_inside = torch.compiler.is_compiling() or any(one is self for one in _of_thread.inside)
            return self.stack(name) if is_inside else _values(self, name)

        def put(self: CompressedExperts, value: Any) -> None:
            self.__dict__[name] = value

        def delete(self: CompressedExperts) -> None:
            del self.__dict__[name]

        return property(get, put, delete)

    namespace = {
        **{name: looked_up(name) for name in names},
        "_uncompressed": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return type(cls.__name__, (CompressedExperts, cls), namespace)
