# SPDX-License-Identifier: Apache-2.0
"""Loading a saved adapter into a model, checked at every entrance before the model is changed.

PEFT and Transformers load an adapter in steps: its settings, the layers for it, its weights. The entrances to that are
wrapped (see `registration.py`): they read and check the adapter first, and say to the tuner which adapter is being
loaded. It compares the layers that it has made with the adapter, and whatever fails later is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import CONFIG_NAME
from torch import nn

from ..checkpoints.safetensors_files import read_json
from ..checkpoints.stored import Stored
from ..sparsity.base_masks import BaseRecord
from .adapter_files import find_file, find_weights, list_loaded
from .adapter_tensors import BY_ADAPTER, adapter_layers, check_count, expected_tensors, saved_name
from .base_record import check_base
from .config import SPPConfig
from .engines import whole_shape
from .saved_adapter import SavedAdapter, check_finite, check_finite_as, read_adapter


@dataclass
class Loading:
    """An adapter that is being loaded."""

    saved: SavedAdapter  # what is loaded
    adapter_name: str  # the name that it gets in the model
    ignore_shapes: bool = False  # whether tensors of other shapes are left out, as PEFT's `ignore_mismatched_sizes`
    check_base: str | None = None  # what the call says for `check_base`
    undo: list[Callable[[], None]] = field(default_factory=list)  # how to undo what was done up to now, in this order


_loading: ContextVar[Loading | None] = ContextVar("peft_spp_loading", default=None)


def loading_of(adapter_name: str) -> Loading | None:
    """The adapter that is being loaded under a name, if one is."""
    loading = _loading.get()
    return loading if loading is not None and loading.adapter_name == adapter_name else None


@contextmanager
def loading(saved: SavedAdapter, adapter_name: str, kwargs: Mapping[str, Any]) -> Iterator[Loading]:
    """Load an adapter: what is done to a model in the meantime is undone if it fails."""
    saved.config.set_check_base(kwargs)
    ignore_shapes = bool(kwargs.get("ignore_mismatched_sizes", False))
    current = Loading(saved, adapter_name, ignore_shapes, kwargs.get("check_base"))
    token = _loading.set(current)
    try:
        yield current
    except BaseException:
        for step in current.undo:
            step()
        raise
    finally:
        _loading.reset(token)


def read_if_ours(source: Any, kwargs: dict[str, Any], config: PeftConfig | None = None) -> SavedAdapter | None:
    """Read and check the adapter that a call is about to load, if it is an SPP adapter."""
    if (config is not None and not isinstance(config, SPPConfig)) or source is None:
        return None
    hub, subfolder = _of_hub(kwargs)
    try:
        file = find_file(source, CONFIG_NAME, subfolder, hub)
    except (OSError, ValueError):
        return None  # neither a folder nor a repository
    if file is None or read_json(file).get("peft_type") != "SPP":
        return None
    pickled = kwargs.get("weights_only", Path(source).is_dir()) is True
    try:
        # if PEFT reads the settings again, it warns of unknown ones
        return read_adapter(source, subfolder=subfolder, pickled=pickled, hub=hub, warn=config is not None)
    except FileNotFoundError as error:
        raise ValueError(f"Can't find weights for {source}: {error}") from error


def check_is_spp(source: Any, kwargs: dict[str, Any], adapter_name: str) -> None:
    """
    Check that the settings of an SPP adapter are there before its weights are loaded over one that exists.

    PEFT does not read them then, so without them it is unknown what the weights mean.
    """
    hub, subfolder = _of_hub(kwargs)
    try:
        file, weights = find_file(source, CONFIG_NAME, subfolder, hub), find_weights(source, subfolder, hub)
    except (OSError, ValueError):
        return  # neither a folder nor a repository, which PEFT reports
    if file is None and weights is not None:
        raise ValueError(
            f"{weights.parent} has no {CONFIG_NAME}, so the settings of the weights to load into adapter "
            f"{adapter_name!r} are unknown. Copy the file again, or load an earlier checkpoint."
        )
    if file is not None and (method := read_json(file).get("peft_type")) != "SPP":
        raise ValueError(
            f"{file} has peft_type {method!r}, but adapter {adapter_name!r} of this model is an SPP adapter."
        )


def _of_hub(kwargs: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The arguments of a call for the Hub, and the subfolder."""
    hub, _, _ = PeftConfig._split_kwargs(kwargs)
    subfolder = hub.pop("subfolder", None)
    return {name: value for name, value in hub.items() if name not in ("repo_id", "filename")}, subfolder


def check_fits(
    saved: SavedAdapter, model: nn.Module, config: SPPConfig, adapter_name: str, ignore_shapes: bool
) -> None:
    """Check that a saved adapter fills the layers that a model has for it, and that they compute the same with it."""
    check_count(saved.origin, saved.tensors, model, config, adapter_name, may_be_renamed=True)
    check_dtypes(saved.origin, saved.tensors, model, adapter_name)
    if not ignore_shapes:
        check_tokens(saved.origin, saved.config, config, adapter_name)
        check_shapes({saved_name(name): one.shape for name, one in saved.tensors.items()}, model, config, adapter_name)
    for name, layer in adapter_layers(model, adapter_name).items():
        if name in saved.factors:
            rows = saved.factors[name]["A"].shape[0] // layer.num_experts
            own = layer.spp_alpha[adapter_name] / layer.r[adapter_name]
            other = saved.alpha(layer.module_name) / max(rows, 1)
            if abs(own - other) > 1e-9 * max(abs(own), abs(other)):
                raise ValueError(
                    f"{saved.origin} was saved with different settings than adapter {adapter_name!r}: in module "
                    f"{layer.module_name!r} alpha / r is {other:g} there and {own:g} here. Load it under another "
                    "name, or without a `config`, so that it keeps its own settings."
                )


def check_tokens(origin: str, saved: SPPConfig, config: SPPConfig, adapter_name: str) -> None:
    """Check that the trained rows of a saved adapter are those of the tokens that a model has them for."""
    tokens, own = saved.trainable_token_indices, config.trainable_token_indices
    if not (tokens and own):
        return
    if isinstance(tokens, dict) == isinstance(own, dict):
        same = tokens == own
    else:  # a list is that of the embedding layer, which a dictionary names
        same = _lists(tokens) == _lists(own)
    if not same:
        raise ValueError(
            f"{origin} has trained other tokens than adapter {adapter_name!r}: `trainable_token_indices` is {tokens} "
            f"there and {own} here. Load it under another name."
        )


def _lists(indices: list[int] | dict[str, list[int]]) -> list[list[int]]:
    return list(indices.values()) if isinstance(indices, dict) else [indices]


def check_shapes(shapes: dict[str, tuple[int, ...]], model: nn.Module, config: SPPConfig, adapter_name: str) -> None:
    """Check that what an adapter has of a model's tensors has their shapes."""
    expected = _shapes_of(model, adapter_name)
    expected |= {name: one for name, one in expected_tensors(model, config, adapter_name).items() if one is not None}
    refuse_misfits(shapes, expected)


def refuse_misfits(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a `RuntimeError` if tensors of an adapter have other shapes than those of the same names in a model."""
    misfits = [
        f"{name} is {tuple(shapes[name])} in the adapter, {shape} in the model"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if misfits:
        raise RuntimeError(
            f"size mismatch for {len(misfits)} tensors of the adapter: {'; '.join(misfits[:3])}. The adapter was "
            "trained on a base model with other shapes, or with another `r`. Nothing was loaded."
        )


def _shapes_of(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's matrices, embeddings and modules to save among them, by the names in files."""
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {
        saved_name(_without_adapter(key, adapter_name)): shape
        for key, tensor in tensors
        # FSDP1 leaves a flat part in place of a sharded matrix
        if tensor.is_floating_point() and len(shape := whole_shape(tensor)) > 1
    }


def take_record(record: BaseRecord | None, model: nn.Module, config: SPPConfig, adapter_name: str) -> None:
    """Compare a model with the record of the weights that an adapter gets, and take over the record."""
    if record is not None and record.masks:
        # a body's adapter in a model with a head, or one that PEFT loads with `key_mapping`
        record = record.renamed({layer.module_name for layer in adapter_layers(model, adapter_name).values()})
        record = record if record.masks else None
    before, config.base_record = config.base_record, record
    try:
        check_base(config, model, adapter_name)
    except ValueError:
        config.base_record = before
        raise


def check_loaded(
    model: nn.Module, config: SPPConfig, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Check the tensors that PEFT is about to write into a model, under the names that the model has for them."""
    origin = "the state dict of the adapter" if (current := loading_of(adapter_name)) is None else current.saved.origin
    tensors = {_without_adapter(key, adapter_name): tensor for key, tensor in state_dict.items()}
    check_count(origin, tensors, model, config, adapter_name, may_have_biases=current is None)
    if current is not None:
        return
    if not any(isinstance(module, BaseTuner) for module in model.modules()):
        # a `PeftModel` checks the shapes itself, and knows whether PEFT leaves out what does not fit
        shapes = {saved_name(name): tuple(tensor.shape) for name, tensor in tensors.items()}
        check_shapes(shapes, model, config, adapter_name)
    listed = list_loaded(origin, tensors)
    for name, one in listed.items():
        check_finite(origin, name, one)
    check_dtypes(origin, listed, model, adapter_name)
    if config.record_of_weights is not None:
        take_record(config.record_of_weights, model, config, adapter_name)
        config.record_of_weights = None


def check_dtypes(origin: str, tensors: Mapping[str, Stored], model: nn.Module, adapter_name: str) -> None:
    """Check that the values of an adapter's tensors stay finite numbers in the dtypes that a model has for them."""
    dtypes = {
        saved_name(_without_adapter(key, adapter_name)): parameter.dtype
        for key, parameter in model.named_parameters(remove_duplicate=False)
    }
    for name, one in tensors.items():
        dtype = dtypes.get(saved_name(name))
        if dtype is None or not dtype.is_floating_point or one.dtype == dtype:
            continue
        if not isinstance(one.dtype, torch.dtype) or not one.dtype.is_floating_point:
            raise ValueError(
                f"{origin}: tensor {name!r} has dtype {one.dtype}, but {dtype} in the model. Save the adapter again."
            )
        if torch.finfo(one.dtype).max > torch.finfo(dtype).max:
            check_finite_as(origin, name, one.load(), dtype)


def _without_adapter(key: str, adapter_name: str) -> str:
    """The name under which a tensor of a model is saved."""
    parts = key.split(".")
    for at in range(1, len(parts)):
        if parts[at] == adapter_name and parts[at - 1] in BY_ADAPTER:
            return ".".join(parts[: at - (parts[at - 1] == "modules_to_save")] + parts[at + 1 :])
    return key
