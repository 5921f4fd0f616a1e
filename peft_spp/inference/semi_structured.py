# SPDX-License-Identifier: Apache-2.0
"""Packing the 2:4 layers of a model with PyTorch's `to_sparse_semi_structured`, where that makes them faster."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
    to_sparse_semi_structured,
)
from torch.utils.benchmark import Timer

from ..checkpoints.names import as_names, matches, warn_of_names_without_layers
from ..compressed import CompressedLinear
from ..reports import PlainData, by_reason, some
from ..sparsity import satisfies_n_m
from ..tuner import SPPLayer


MINIMUM_CAPABILITY = (8, 0)
"""The compute capability from which on NVIDIA's tensor cores know 2:4 (Ampere)."""

DTYPES = (torch.float16, torch.bfloat16, torch.int8)
"""The dtypes that are packed; sparse tensor cores compute float32 as TF32, with fewer digits."""

_TIMED_SECONDS = 0.05


@dataclass
class SemiStructuredReport(PlainData):
    """The packed and the skipped layers. `str()` summarizes them in a few lines.

    Args:
        tokens (`int`): The tokens of the forward pass that was timed.
        packed (`dict[str, float | None]`):
            The packed layers by name, each with how many times as fast it is as the dense layer; `None` if that was
            not measured.
        skipped (`dict[str, str]`): Why each other linear layer was not packed.
    """

    tokens: int
    packed: dict[str, float | None] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.packed)} linear layers packed as 2:4, {len(self.skipped)} left dense"]
        speedups = [speedup for speedup in self.packed.values() if speedup is not None]
        if speedups:
            lines.append(
                f"{min(speedups):.2f} to {max(speedups):.2f} times as fast as dense, {self.tokens} tokens at a time"
            )
        return "\n".join(lines + _reasons(self.skipped))


@torch.no_grad()
def to_semi_structured(
    model: nn.Module,
    *,
    tokens: int = 2048,
    min_speedup: float = 1.0,
    target_modules: str | Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
) -> SemiStructuredReport:
    """
    Pack the 2:4 layers of a model for the sparse tensor cores of its GPU, in place and layer by layer.

    A packed layer takes 9/16 of the memory in half precision. Whether it is faster depends on its shape, the number
    of tokens and the GPU, and with few tokens it is often slower. So one layer of each shape is timed with `tokens`
    tokens, dense and packed, and a layer is packed if the packed one is at least `min_speedup` times as fast. What is
    not 2:4, or has a shape or dtype that the kernels do not support, stays dense; the report gives the reason.

    The packed model is for inference: it cannot be trained or saved. Save the merged model before.

    Args:
        model (`nn.Module`): A merged model on a CUDA GPU of compute capability 8.0 or more, in half precision.
        tokens (`int`, *optional*, defaults to 2048):
            How many tokens a forward pass will have: batch size times length in prefill, the batch size in decoding.
        min_speedup (`float`, *optional*, defaults to 1.0):
            How many times as fast a packed layer must be. With 0 nothing is timed, and all that can be is packed.
        target_modules (`str` or `Iterable[str]`, *optional*):
            Which linear layers, as in PEFT: a regular expression for the whole name, or names or their ends.
        exclude_modules (`str` or `Iterable[str]`, *optional*): Layers to skip, in the same format.

    Returns:
        `SemiStructuredReport`: What was packed, and why the rest was not.

    Raises:
        RuntimeError: If the model is not on such a GPU, or this PyTorch is built without CUDA.
        ValueError: If an adapter is not merged, `tokens` is not positive, or no layer could be packed because none is
            2:4. The model is not changed.

    Example:

    ```py
    >>> from transformers import AutoModelForCausalLM
    >>> from peft_spp.inference import to_semi_structured

    >>> model = AutoModelForCausalLM.from_pretrained("my-model", dtype="bfloat16", device_map="cuda")
    >>> print(to_semi_structured(model, tokens=4096))
    ```
    """
    if tokens < 1:
        raise ValueError(f"`tokens` should be positive but the value passed is {tokens}")
    _check_merged(model)
    _check_devices(model)
    chosen, skipped = choose_layers(model, target_modules, exclude_modules)
    if not chosen:
        raise ValueError(_nothing_to_pack(skipped))
    report = SemiStructuredReport(tokens, skipped=skipped)
    speedups: dict[tuple[Any, ...], float] = {}
    for name, layer in chosen.items():
        kind = (*layer.weight.shape, layer.weight.dtype, layer.weight.device, layer.bias is not None)
        packed = pack(layer.weight)
        if min_speedup > 0:
            if kind not in speedups:
                speedups[kind] = measure_speedup(layer, packed, tokens)
            if speedups[kind] < min_speedup:
                report.skipped[name] = f"slower packed ({speedups[kind]:.2f} times as fast with {tokens} tokens)"
                continue
        layer.weight = nn.Parameter(packed, requires_grad=False)
        report.packed[name] = speedups.get(kind)
    return report


def choose_layers(
    model: nn.Module,
    target_modules: str | Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """
    Tell which linear layers can be packed. This works on any device. It returns the layers that can, and why each
    other one cannot, by name.
    """
    chosen: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    target_modules, exclude_modules = as_names(target_modules), as_names(exclude_modules)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    warn_of_names_without_layers(
        lambda wanted: any(matches(name, wanted) for name in layers),
        target_modules=target_modules,
        exclude_modules=exclude_modules,
    )
    for name, module in layers.items():
        reason = _not_asked_for(name, target_modules, exclude_modules) or why_not(module)
        if reason is None:
            chosen[name] = module
        else:
            skipped[name] = reason
    return chosen, skipped


def why_not(layer: nn.Linear) -> str | None:
    """Why a layer cannot be packed."""
    weight = layer.weight
    if isinstance(layer, CompressedLinear):
        return "compressed: call peft_spp.decompress(model) first"
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}, not a plain nn.Linear"
    if isinstance(weight, SparseSemiStructuredTensor):
        return "packed already"
    if weight.dtype not in DTYPES:
        return f"{str(weight.dtype).removeprefix('torch.')}, not float16, bfloat16 or int8"
    # the stricter of the two backends, of which PyTorch chooses by how it was built
    constraints = [
        backend._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
        for backend in (SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT)
    ]
    rows, columns = (max(getattr(one, side) for one in constraints) for side in ("sparse_min_rows", "sparse_min_cols"))
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"its sizes are not multiples of {rows} x {columns}"
    if not _is_2_4(weight):
        return "not 2:4"
    return None


def pack(weight: Tensor) -> Tensor:
    """Pack a 2:4 weight, without PyTorch's warning that its class is a prototype."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype", category=UserWarning)
        packed: Tensor = to_sparse_semi_structured(weight.detach().contiguous())
        return packed


def measure_speedup(layer: nn.Linear, packed: Tensor, tokens: int) -> float:
    """Time a layer with its dense weight and with another one."""
    inputs = torch.randn(tokens, layer.in_features, device=layer.weight.device).to(layer.weight.dtype)

    def seconds(weight: Tensor) -> float:
        run: Callable[..., Tensor] = nn.functional.linear
        names = {"run": run, "x": inputs, "w": weight, "b": layer.bias}
        return Timer("run(x, w, b)", globals=names).blocked_autorange(min_run_time=_TIMED_SECONDS).median

    return seconds(layer.weight.detach()) / seconds(packed)


def _is_2_4(weight: Tensor) -> bool:
    if weight.is_floating_point():
        return satisfies_n_m(weight, "2:4")
    return bool((weight.reshape(-1, 4) != 0).sum(dim=1).le(2).all())


def _not_asked_for(
    name: str, target_modules: str | Sequence[str] | None, exclude_modules: str | Sequence[str] | None
) -> str | None:
    if target_modules is not None and not matches(name, target_modules):
        return "not in target_modules"
    if exclude_modules is not None and matches(name, exclude_modules):
        return "in exclude_modules"
    return None


def _check_merged(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, SPPLayer):
            raise ValueError(f"module {name!r} has an adapter: merge it first with model.merge_and_unload()")


def _check_devices(model: nn.Module) -> None:
    instead = "On other hardware, use the merged model directly: its weights are dense tensors with zeros."
    devices = {parameter.device for parameter in model.parameters()}
    others = sorted(str(device) for device in devices if device.type != "cuda")
    if others:
        built = "" if torch.version.cuda else ", and this PyTorch is built without CUDA"
        raise RuntimeError(
            f"2:4 layers are packed for NVIDIA GPUs, but the model is on {', '.join(others)}{built}. Load it with "
            f"device_map='cuda'. {instead}"
        )
    if torch.version.hip:
        raise RuntimeError(f"2:4 layers are packed for NVIDIA GPUs, and this PyTorch is built for ROCm. {instead}")
    for device in devices:
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            raise RuntimeError(
                f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; 2:4 "
                f"needs 8.0 (Ampere) or more. {instead}"
            )


def _nothing_to_pack(skipped: dict[str, str]) -> str:
    if not skipped:
        return "the model has no linear layers"
    return f"no linear layer of the model can be packed as 2:4. {'; '.join(_reasons(skipped))}"


def _reasons(skipped: dict[str, str]) -> list[str]:
    return [f"{reason}: {some(names, 3)}" for reason, names in by_reason(skipped).items()]
