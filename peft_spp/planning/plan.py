# SPDX-License-Identifier: Apache-2.0
"""The memory and the operations of a training step, by arithmetic."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import get_peft_model
from torch import nn

from ..architecture import find_block_lists, find_expert_stacks, position_table
from ..checkpoints.empty_model import empty_model
from ..checkpoints.hub import local_folder
from ..checkpoints.instead import instead_of_model
from ..checkpoints.own_files import CONFIG
from ..checkpoints.safetensors_files import read_json
from ..compressed import CompressedLinear
from ..compressed.config import METHOD, BitmaskConfig
from ..compressed.experts import put_stack
from ..compressed.in_memory import stored_in_another_form
from ..compressed.selection import find_compressible, transformers_models, why_not_worth_it
from ..error_text import one_line
from ..functional.bitmask import Compressed, bitmask_bytes
from ..reports import PlainData, plain_table
from ..tuner import ParamWrapper, SPPConfig
from ..tuner.targets import names_without_modules
from .trace import trace_step


ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
_SHARDED = ("fsdp2", "zero3")
ZERO3_LIVE_PARAMETERS = 1_000_000_000
"""How many gathered parameters a GPU holds at most: DeepSpeed's `stage3_max_live_parameters`, by its documentation."""


@dataclass(frozen=True)
class TrainingPlan(PlainData):
    """What a training step takes on each GPU, computed and not measured; bytes. `str()` gives a table.

    Args:
        parameters (`int`): The parameters of the base model.
        trainable (`int`): Those of the adapter.
        experts (`int`): The parameters of those stacks of experts that no adapter is on.
        dtype (`str`): The dtype of the base model.
        sparsity (`float`, *optional*): The zeros that are not stored; `None` for dense weights.
        gpus (`int`): How many GPUs there are.
        engine (`str`): How they share the work; see [`plan_training`].
        batch (`int`): Sequences on each GPU in a forward pass.
        sequence (`int`): Tokens in a sequence.
        gradient_checkpointing (`bool`): Whether the blocks are computed again in the backward pass.
        weights (`int`): The base model, with its buffers.
        gathered (`int`): Weights of other GPUs that are there while they are computed with.
        factors (`int`): The factors.
        optimizer (`int`): The two states of AdamW, and what an engine keeps next to them.
        kept (`int`): What the forward pass leaves for the backward pass.
        step (`int`): The most that a step takes on top: with what is kept, gradients and temporaries.
        flops (`int`): The floating-point operations of a step on each GPU.
    """

    json_properties: ClassVar[tuple[str, ...]] = ("total",)

    parameters: int
    trainable: int
    experts: int
    dtype: str
    sparsity: float | None
    gpus: int
    engine: str
    batch: int
    sequence: int
    gradient_checkpointing: bool
    weights: int
    gathered: int
    factors: int
    optimizer: int
    kept: int
    step: int
    flops: int

    @property
    def total(self) -> int:
        """The bytes on each GPU at the highest level of a step."""
        return self.weights + self.gathered + self.factors + self.optimizer + self.step

    def __str__(self) -> str:
        stored = "dense" if self.sparsity is None else f"compressed at {100 * self.sparsity:g} % zeros"
        rows = [
            (f"base model ({self.dtype}, {stored})", self.weights),
            ("weights gathered from other GPUs", self.gathered),
            (f"factors ({self.trainable:,} parameters)", self.factors),
            ("AdamW", self.optimizer),
            (f"the step at its highest (kept for the backward pass: {gigabytes(self.kept)})", self.step),
            ("total", self.total),
        ]
        if self.gpus == 1:
            del rows[1]
        where = "one GPU" if self.gpus == 1 else f"each of {self.gpus} GPUs ({self.engine})"
        checkpointing = "with" if self.gradient_checkpointing else "without"
        first = (
            f"{self.parameters:,} parameters on {where}, {self.batch} × {self.sequence} tokens, {checkpointing} "
            "gradient checkpointing. Computed, not measured."
        )
        if self.experts:
            first += f" Experts with {self.experts:,} parameters are not adapted."
        cells = [(name, f"{size / 1e9:.{2 if size >= 1e7 else 4}f}") for name, size in rows]
        return f"{first}\n\n{plain_table(('memory', 'GB'), cells, right=['GB'])}"


def plan_training(
    model: nn.Module,
    *,
    config: SPPConfig | None = None,
    batch: int = 1,
    sequence: int = 2048,
    gradient_checkpointing: bool = False,
    sparsity: float | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    min_sparsity: float | None = None,
    gpus: int = 1,
    engine: str = "fsdp2",
    on_cpu: bool = False,
) -> TrainingPlan:
    """
    Compute what a training step of a model takes, without weights and without a GPU.

    A forward and a backward pass of the adapted model run on the meta device, and the storages that are alive are
    added up. Not in it: what CUDA and its libraries take (0.5 to 1 GB), fragmentation, buffers for communication, and
    the gathering of a sharded adapter for saving.

    Args:
        model (`nn.Module`): A causal language model on the meta device, without adapters, in the dtype to train in. It
            is changed.
        config ([`SPPConfig`], *optional*): The adapter, by default that of `SPPConfig()`.
        batch (`int`, *optional*, defaults to 1): Sequences on each GPU in a forward pass.
        sequence (`int`, *optional*, defaults to 2048): Tokens in a sequence.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): Whether to use it, not re-entrant.
        sparsity (`float`, *optional*): Store the linear layers compressed, with this share of zeros.
        modules_to_not_convert (`Sequence[str]`, *optional*): See [`BitmaskConfig`]; with `sparsity`.
        min_sparsity (`float`, *optional*): See [`BitmaskConfig`]; with `sparsity`.
        gpus (`int`, *optional*, defaults to 1): How many GPUs there are.
        engine (`str`, *optional*, defaults to `"fsdp2"`): `"ddp"`, `"fsdp2"`, `"zero2"` or `"zero3"`. Only the second
            and the last shard the base model.
        on_cpu (`bool`, *optional*, defaults to `False`): Whether to count the buffers of the CPU's kernels.

    Returns:
        [`TrainingPlan`]: The sizes on each GPU.

    Raises:
        ValueError: If the model is not on the meta device, does not run there, or the settings do not fit together.
    """
    _check(model, sparsity, gpus, engine, batch, sequence)
    config = config or SPPConfig()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = next(iter(model.parameters())).dtype
    model.requires_grad_(False)
    cast(Any, model).config.use_cache = False  # as trainers do
    experts = {
        name: owner.get_parameter(parameter).numel() for name, (owner, parameter) in find_expert_stacks(model).items()
    }
    if sparsity is not None:
        _compress(model, sparsity, modules_to_not_convert, min_sparsity)
    blocks = [block for blocks in find_block_lists(dict(model.named_modules())).values() for block in blocks]
    stored, buffers = _bytes(model.parameters()), _bytes(model.buffers())
    in_blocks = [_bytes(block.parameters()) for block in blocks]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experts and layers without zeros, which meta cannot tell
        adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
        adapted.train()
        if gradient_checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted_parameters = {one.module_name for one in adapted.modules() if isinstance(one, ParamWrapper)}
        for setting, missing in names_without_modules(model, config).items():
            raise ValueError(f"{setting}: {type(model).__name__} has no module {', '.join(map(repr, missing))}")
        for name in config.target_parameters or ():
            if not any(f".{one}".endswith(f".{name}") for one in adapted_parameters):
                raise ValueError(f"target_parameters: {type(model).__name__} has no parameter {name!r}")
        trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        ids = torch.zeros(batch, sequence, dtype=torch.long, device="meta")
        try:
            trace = trace_step(adapted, lambda: adapted(input_ids=ids, labels=ids).loss, on_cpu)
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise ValueError(
                f"a training step of {type(model).__name__} cannot be followed without data: {one_line(error)}"
            ) from error
    factors = _bytes(trainable)
    is_sharded = gpus > 1 and engine in _SHARDED
    optimizer, step = 2 * factors, trace.peak
    gathered = 0
    if gpus > 1 and engine == "ddp":
        step += factors  # the buckets that gradients are reduced in
    if gpus > 1 and engine == "zero2":
        optimizer = 3 * factors // gpus  # with its own copy of what it updates
    if is_sharded:
        # outside of the blocks all stays gathered; of the blocks, the one that is computed and the next
        gathered = stored - sum(in_blocks) + 2 * max(in_blocks, default=0)
        if engine == "zero3":
            gathered = min(stored, ZERO3_LIVE_PARAMETERS * dtype.itemsize)
        stored, factors, optimizer = (-(-size // gpus) for size in (stored, factors, optimizer))
    return TrainingPlan(
        parameters=parameters,
        trainable=sum(parameter.numel() for parameter in trainable),
        experts=sum(size for name, size in experts.items() if name not in adapted_parameters),
        dtype=str(dtype).removeprefix("torch."),
        sparsity=sparsity,
        gpus=gpus,
        engine=engine if gpus > 1 else "",
        batch=batch,
        sequence=sequence,
        gradient_checkpointing=gradient_checkpointing,
        weights=stored + buffers,
        gathered=gathered,
        factors=factors,
        optimizer=optimizer,
        kept=trace.kept,
        step=step,
        flops=trace.flops,
    )


def plan_checkpoint(
    model: str | os.PathLike[str], *, dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> TrainingPlan:
    """
    Compute what a training step of a model takes, by its `config.json` alone.

    Args:
        model (`str` or `os.PathLike`): A folder, or the id of a repository on the Hub, of which nothing else is
            downloaded.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): The dtype to train the base model in.
        settings (`Any`): As for [`plan_training`].

    Returns:
        [`TrainingPlan`]: The sizes on each GPU.

    Raises:
        FileNotFoundError: If there is no `config.json`.
        ValueError: If Transformers cannot build the model, it is quantized, or the settings do not fit it.
    """
    folder = local_folder(model, allow=[CONFIG])
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}{instead_of_model(folder)}")
    content = read_json(file)
    quantization = content.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise ValueError(f"quantization_config={quantization!r} in {file} is not an object")
    method = quantization.get("quant_method")
    if quantization and method != METHOD:
        raise ValueError(
            f"the model in {folder} is quantized ({method}): only dense and compressed weights are planned"
        )
    if method == METHOD and settings.get("sparsity") is None:
        raise ValueError(
            f"the model in {folder} is compressed, and {CONFIG} does not have its share of zeros: set sparsity "
            "(--compressed --sparsity 0.5)"
        )
    if method == METHOD:
        stored = BitmaskConfig(**quantization)
        settings = {
            "modules_to_not_convert": stored.modules_to_not_convert,
            "min_sparsity": stored.min_sparsity,
            **settings,
        }
    try:
        empty = empty_model(folder, content, dtype)
    except (
        StrictDataclassError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"Transformers cannot build the model of {file}: {one_line(error)}") from error
    return plan_training(cast(nn.Module, empty).to("meta"), **settings)


def gigabytes(size: float) -> str:
    """A number of bytes in GB (10⁹)."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e9:.4f} GB"


def _check(model: nn.Module, sparsity: float | None, gpus: int, engine: str, batch: int, sequence: int) -> None:
    if any(not parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has data: make it under `torch.device('meta')`")
    for name, value in (("gpus", gpus), ("batch", batch), ("sequence", sequence)):
        if value < 1:
            raise ValueError(f"{name}={value} is not positive")
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is not one of {', '.join(map(repr, ENGINES))}")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} is not between 0 and 1")
    if sparsity is not None and gpus > 1 and engine == "zero3":
        raise ValueError("engine='zero3' cannot shard compressed weights: use 'fsdp2', 'zero2' or 'ddp'")
    table = position_table(model)
    # on the meta device no index is out of range
    if table is not None and sequence > table[1]:
        raise ValueError(
            f"sequence={sequence} is more than the {table[1]} positions that {table[0]} of {type(model).__name__} "
            "has: set a smaller sequence (--sequence)"
        )


def _compress(model: nn.Module, sparsity: float, skip: Sequence[str] | None, min_sparsity: float | None) -> None:
    """Put compressed layers and stacks in the place of those that would be compressed with so many zeros."""
    layers, stacks, _ = find_compressible(model, skip)
    apart = stored_in_another_form(transformers_models(model), layers, stacks)
    weights = {name: layer.weight for name, layer in layers.items()}
    weights |= {name: owner.get_parameter(parameter) for name, (owner, parameter) in stacks.items()}
    for name, weight in weights.items():
        stored, rows = round(weight.numel() * (1 - sparsity)), math.prod(weight.shape[:-1])
        if name in apart or why_not_worth_it(stored, weight.shape, weight.dtype, min_sparsity):
            continue
        bitmask = torch.empty(
            *weight.shape[:-1], bitmask_bytes(weight.shape[-1]), dtype=torch.uint8, device=weight.device
        )
        offsets = torch.empty(rows + 1, dtype=torch.int64, device=weight.device)
        compressed = Compressed(weight.new_empty(stored), bitmask, offsets, weight.shape[-1])
        if name in stacks:
            put_stack(*stacks[name], compressed)
        else:
            layer = CompressedLinear.without_values(layers[name])
            layer.put(compressed)
            model.set_submodule(name, layer)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
