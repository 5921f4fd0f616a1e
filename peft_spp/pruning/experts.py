# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture as linear layers, each a slice of the parameter that holds all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from ..architecture import find_expert_stacks, is_router, is_stored_transposed
from ..checkpoints.layout import model_types


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert of a stack, which is pruned as a linear layer."""

    stack_name: str  # the name of the stack, a parameter of the model
    module: nn.Module  # the module that has it
    parameter_name: str  # its name in the module
    index: int  # which expert it is
    is_transposed: bool  # whether the weight is stored as (in_features, out_features)

    @property
    def stack(self) -> Tensor:
        """The weights of all experts, as they are stored."""
        stack: Tensor = getattr(self.module, self.parameter_name)
        return stack.detach()

    @property
    def weight(self) -> Tensor:
        """The weight of this one, as it is stored: a view, so that what is written to it is in the stack."""
        return self.stack[self.index]


def find_experts(model: nn.Module) -> dict[str, Expert]:
    """The experts of all stacks by their names, which are that of the stack and the number of the expert."""
    config = getattr(model, "config", None)
    types = model_types(config.to_dict()) if isinstance(config, PreTrainedConfig) else frozenset()
    found = {}
    for name, (module, parameter) in find_expert_stacks(model).items():
        if isinstance(module, ParametrizationList):
            # it computes the stack, so that what is written would not stay: the check of the layers says so
            owner, _, parameter = name.rpartition(".")[0].partition("parametrizations.")
            module = model.get_submodule(owner.removesuffix("."))
            name = owner + parameter
        if is_router(name):
            continue
        stack: Tensor = getattr(module, parameter)
        transposed = is_stored_transposed(module, stack.ndim, types)
        for index in range(len(stack)):
            found[f"{name.removesuffix('.weight')}.{index}"] = Expert(name, module, parameter, index, transposed)
    return found


def by_stack(experts: Mapping[str, Expert]) -> dict[str, list[str]]:
    """The names of experts by the name of their stack."""
    stacks: dict[str, list[str]] = {}
    for name, expert in experts.items():
        stacks.setdefault(expert.stack_name, []).append(name)
    return stacks


_LINEAR = torch.nn.functional.linear
_PRODUCTS = (
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.mm,
    torch.Tensor.bmm,
)


class ExpertInputs(TorchFunctionMode):
    """
    While active, sees what the experts of some stacks are multiplied with.

    Experts are not modules that could have hooks. A multiplication by a slice of a stack is recognized by where the
    slice lies in memory, as Transformers' experts run in their "eager" implementation, and one by all experts at once
    by that too.

    Args:
        experts (`Mapping[str, Expert]`): The experts by their names.
        add (`Callable[[str, torch.Tensor], None]`): Called with the name of an expert and its inputs.
    """

    def __init__(self, experts: Mapping[str, Expert], add: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._add = add
        self._stacks: dict[int, list[tuple[Tensor, bool, dict[int, str]]]] = {}
        for names in by_stack(experts).values():
            one = experts[names[0]]
            if not one.stack.is_meta:
                memory = one.stack.untyped_storage().data_ptr()
                of_index = {experts[name].index: name for name in names}
                self._stacks.setdefault(memory, []).append((one.stack, one.is_transposed, of_index))

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _LINEAR or func in _PRODUCTS:
            operands = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
            if len(operands) >= 2:
                inputs, weight = operands[:2]
                self._see(inputs.detach(), weight.detach() if func is not _LINEAR else weight.detach().mT)
        return func(*args, **kwargs)

    def _see(self, inputs: Tensor, weight: Tensor) -> None:
        """Add the inputs of a multiplication if `weight`, as `(in, out)`, is of a stack."""
        if weight.is_meta or not self._stacks:
            return
        for stack, is_transposed, names in self._stacks.get(weight.untyped_storage().data_ptr(), ()):
            expected = stack if is_transposed else stack.mT
            if weight.shape[-2:] != expected.shape[1:] or weight.stride()[-2:] != expected.stride()[1:]:
                continue
            index, rest = divmod(int(weight.storage_offset() - stack.storage_offset()), int(stack.stride(0)))
            if rest:
                continue
            if weight.ndim == 2 and index in names:
                self._add(names[index], inputs)
            elif weight.ndim == 3 and index == 0 and weight.shape == expected.shape and len(inputs) == len(stack):
                for one, name in names.items():
                    # tokens of other experts are zeros here, and would be counted
                    rows = inputs[one].reshape(-1, inputs.shape[-1])
                    self._add(name, rows[rows.any(dim=1)])
