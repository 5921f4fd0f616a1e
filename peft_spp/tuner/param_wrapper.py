# SPDX-License-Identifier: Apache-2.0
"""SPP on a parameter that belongs to no linear layer, as the fused experts of a mixture do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .compressed_experts import access_to_parameter, parameter_shape
from .config import SPPConfig
from .engines import call_inside, forward_within, innermost, is_hooked
from .layer import AdaptedLayer
from .weight_access import Plain


_TRACED = "_spp_replacements"
_USERS = "_spp_users"
_lock = threading.Lock()


class ParamWrapper(AdaptedLayer):
    """
    SPP on an `nn.Parameter`, chosen with `target_parameters`: a weight, or a stack of the weights of all experts.

    Every expert of a stack is a separate layer: its output rows are split into r blocks, whatever the way the stack
    is stored. A has the shape `(num_experts · r, in_features)` and B `(num_experts · out_features, 1)`, expert after
    expert. The adapted weight of all experts is made once a forward pass, as LoRA's is.

    - When the wrapped parameter is read on the wrapper, the adapter is applied to a `weight`; a parameter of another
      name is not there.
    - Each `ParamWrapper` adapts exactly one parameter. To target several on the same module, the wrappers are nested.
    - All adapters of a model that use `target_parameters` must target the same parameters.

    Args:
        base_layer (`nn.Module`): The module that holds the parameter, or a `ParamWrapper` around it.
        adapter_name (`str`): The name of the first adapter.
        parameter_name (`str`): The name of the parameter in the module.
        config (`SPPConfig`): The configuration of the adapter.
        r (`int`): The number of row blocks of each expert.
        spp_alpha (`float`): The alpha of the scaling.
        is_transposed (`bool`): Whether the weight is stored as (in_features, out_features).
        module_name (`str`): The name of the parameter in the model, for messages.

    Raises:
        ValueError: If the parameter has neither two nor three dimensions, or the configuration asks for what cannot
            be done on a parameter.
    """

    backend: Plain

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: SPPConfig,
        r: int,
        spp_alpha: float,
        is_transposed: bool = False,
        module_name: str = "",
        **kwargs: Any,
    ) -> None:
        inner = base_layer.get_base_layer() if isinstance(base_layer, ParamWrapper) else base_layer
        backend = access_to_parameter(inner, parameter_name, is_transposed)
        super().__init__(base_layer, adapter_name, backend, config, r, spp_alpha, module_name, **kwargs)

    def _read_features(self) -> None:
        shape = parameter_shape(self.get_base_layer(), self.parameter_name)
        if len(shape) not in (2, 3):
            raise ValueError(
                f"spp.{type(self).__name__} was initialized with {len(shape)} dimensional Parameter "
                f"({self.module_name!r}), but only 2d and 3d are supported."
            )
        self.num_experts = shape[0] if len(shape) == 3 else 1
        self.out_features, self.in_features = reversed(shape[-2:]) if self.fan_in_fan_out else shape[-2:]

    def update_layer(self, adapter_name: str, r: int, spp_alpha: float, config: SPPConfig, **kwargs: Any) -> None:
        if config.spp_dropout:
            # W' is made without an input: there is no input of the SPP branch to drop
            raise ValueError(f"spp.{type(self).__name__} does not work with spp_dropout != 0.")
        if config.fan_in_fan_out:
            raise ValueError(f"spp.{type(self).__name__} does not work with fan_in_fan_out.")
        super().update_layer(adapter_name, r, spp_alpha=spp_alpha, config=config, **kwargs)

    def _home(self) -> tuple[torch.device | None, torch.dtype | None]:
        parameter = self._base_weight()
        return parameter.device, parameter.dtype

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without any wrapper around it, merged if asked."""
        if merge:
            self._merge(safe_merge, adapter_names, keep_unmerged=False)
        if isinstance(self.base_layer, ParamWrapper):
            return self.base_layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.base_layer

    def _check_forward_args(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(f"spp.{type(self).__name__} does not support mixed adapter batches yet.")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.follow_base_layer()
        self._check_forward_args(*args, **kwargs)
        kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self._unmerge_once()
        names = [name for name in self.active_adapters if name in self.spp_A]
        if self.merged:
            self.prove_merge()
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(*args, **kwargs)
        # the parameter itself is in memory whenever the base layer uses it
        hooked = [factor for name in names for factor in (self.spp_A[name], self.spp_B[name]) if is_hooked(factor)]
        return call_inside(hooked, partial(self._with_scaled_parameter, names), *args, **kwargs)

    def _with_scaled_parameter(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        base_layer = self.get_base_layer()
        module = innermost(base_layer)
        compute = self.backend.replacement(module, self.get_factors(names))
        replaced = partial(replaced_parameter, module, self.parameter_name, compute)
        if module is base_layer and not is_hooked(base_layer):
            with replaced():
                return self.base_layer(*args, **kwargs)
        if module is not base_layer and torch.is_grad_enabled():
            self._check_computed_once(base_layer)
        # what engines read of the module around its forward pass is the parameter, which some would write back
        with forward_within(base_layer, replaced):
            return self.base_layer(*args, **kwargs)

    def _check_computed_once(self, module: nn.Module) -> None:
        if any(hasattr(part, "_checkpoint_wrapped_module") for part in module.modules() if part is not self):
            raise RuntimeError(
                f"The parent of {self.module_name!r} is wrapped for activation checkpointing inside the adapter, so "
                "its backward pass would skip the adapter. Wrap the block around it instead."
            )

    def __repr__(self) -> str:
        # the name of the parameter tells nested wrappers apart
        rep = super().__repr__()
        idx = rep.find("(") + 1
        return f"{rep[:idx]}\n  parameter_name='{self.parameter_name}',{rep[idx:]}"


class _Replacement:
    """Computes the tensor that stands for a parameter when it is first asked for, and keeps it."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        self.compute = compute
        self.parameter: Tensor | None = None
        self.result: Tensor | None = None

    def of(self, parameter: Tensor | None, read: Callable[[], Tensor]) -> Tensor:
        # An offloading hook puts another parameter in place when the module's own forward begins: what was computed
        # of the one before is of no use then.
        if self.result is None or parameter is not self.parameter:
            self.parameter = parameter
            self.result = self.compute(read() if parameter is None else parameter)
        return self.result


class _OfThread(threading.local):
    """What is replaced in the forward passes that a thread is in, the innermost last."""

    def __init__(self) -> None:
        self.replacements: list[tuple[nn.Module, str, _Replacement]] = []


_of_thread = _OfThread()


@contextmanager
def replaced_parameter(module: nn.Module, name: str, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """
    While the context is open, `module.<name>` is `compute(parameter)` in this thread; it is computed once, when it is
    first used. Other threads that use the module meanwhile see the parameter, or what they replace it by.

    `torch.nn.utils.parametrize` does the like, but moves the parameter into a module of its own and back at every
    forward pass: the order of the parameters changes, by which PEFT nests wrappers and names what it saves; hooks that
    gather or load the parameters of the module no longer find it; and each time there is a new class, for which
    `torch.compile` compiles again. Here the parameter stays where it is. If `torch.nn.utils.parametrize` computes it,
    that comes first.
    """
    if torch.compiler.is_compiling():
        with _traced(module, name, compute):
            yield
        return
    _use(module, name, 1)
    _of_thread.replacements.append((module, name, _Replacement(compute)))
    try:
        yield
    finally:
        _of_thread.replacements.pop()
        _use(module, name, -1)


def _use(module: nn.Module, name: str, change: int) -> None:
    """Count the forward passes that replace a parameter: while there are any, the module's class asks each thread."""
    with _lock:
        users: dict[str, int] = dict(module.__dict__.get(_USERS, {}))
        users[name] = users.get(name, 0) + change
        users = {name: count for name, count in users.items() if count}
        cls = _original(type(module))
        module.__class__ = _with_replaced(cls, frozenset(users)) if users else cls  # type: ignore[arg-type]
        if users:
            module.__dict__[_USERS] = users
        else:
            del module.__dict__[_USERS]


@contextmanager
def _traced(module: nn.Module, name: str, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The same in what the compiler can follow; nothing of it is left in the compiled code."""
    cls = module.__class__
    before: dict[str, _Replacement] = module.__dict__.get(_TRACED, {})
    module.__dict__[_TRACED] = {**before, name: _Replacement(compute)}
    module.__class__ = _with_replaced(_original(cls), frozenset(module.__dict__[_TRACED]))  # type: ignore[arg-type]
    try:
        yield
    finally:
        module.__class__ = cls
        if before:
            module.__dict__[_TRACED] = before
        else:
            del module.__dict__[_TRACED]


def _find(module: nn.Module, name: str) -> _Replacement | None:
    if not (torch.compiler.is_compiling() and name in module.__dict__.get(_TRACED, {})):
        found = _find_in_thread(module, name)
        if found is not None:
            return found
    traced: _Replacement | None = module.__dict__.get(_TRACED, {}).get(name)
    return traced


@torch.compiler.disable
def _find_in_thread(module: nn.Module, name: str) -> _Replacement | None:
    for owner, replaced, replacement in reversed(_of_thread.replacements):
        if owner is module and replaced == name:
            return replacement
    return None


def _original(cls: type[nn.Module]) -> type[nn.Module]:
    original: type[nn.Module] = getattr(cls, "_spp_original", cls)
    return original


@cache
def _with_replaced(cls: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    """The class of a module of which some parameters are looked up: with properties, which come before attributes."""

    def looked_up(name: str) -> property:
        is_computed = isinstance(getattr(cls, name, None), property)  # as compressed stacks are

        def read(self: Any) -> Tensor:
            # in replicas, and where FSDP1 flattens parameters, they are plain attributes
            if name in self.__dict__:
                stored: Tensor = self.__dict__[name]
                return stored
            inherited: Tensor = getattr(super(replaced, self), name)
            return inherited

        def get(self: Any) -> Tensor:
            parameter = self._parameters.get(name)
            replacement = _find(self, name)
            if replacement is None:
                return read(self) if parameter is None or is_computed else parameter
            try:
                return replacement.of(parameter, lambda: read(self))
            except AttributeError as error:
                # nn.Module would take it for a missing attribute, and give the parameter as it is
                raise RuntimeError(f"Computing the adapted parameter {name!r} of {cls.__name__} failed.") from error

        def put(self: Any, value: Any) -> None:
            self.__dict__[name] = value

        def delete(self: Any) -> None:
            del self.__dict__[name]

        return property(get, put, delete)

    namespace = {
        **{name: looked_up(name) for name in names},
        "_spp_original": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    replaced = type(cls.__name__, (cls,), namespace)
    return replaced
