# SPDX-License-Identifier: Apache-2.0
"""The entrances by which PEFT and Transformers load an adapter, each with a check of the adapter in front of it."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from peft import PeftModel
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from .adapter_tensors import belongs_to
from .config import SPPConfig
from .loading import check_fits, check_is_spp, loading, loading_of, read_if_ours, take_record
from .model import SPPModel
from .saved_adapter import SavedAdapter, from_state_dict
from .settings import check_patterns, expressions


_settings_are_given: ContextVar[bool] = ContextVar("settings_are_given", default=False)
"""Whether `from_pretrained` has the settings in `config`, so that the folder does not need them."""


def guard_entrances() -> None:
    """Check SPP adapters in `PeftModel.from_pretrained`, `PeftModel.load_adapter` and Transformers' `load_adapter`.

    Other methods' adapters are passed on to PEFT. A second call does nothing.
    """
    if hasattr(PeftModel.load_adapter, "checks_spp"):
        return
    from_pretrained = _guarded(PeftModel.__dict__["from_pretrained"].__func__, _from_pretrained)
    setattr(PeftModel, "from_pretrained", classmethod(from_pretrained))  # noqa: B010  (for mypy)
    setattr(PeftModel, "load_adapter", _guarded(PeftModel.load_adapter, _load_adapter))  # noqa: B010
    setattr(PeftAdapterMixin, "load_adapter", _guarded(PeftAdapterMixin.load_adapter, _load_into_transformers))  # noqa: B010


def _guarded(original: Callable[..., Any], guard: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the same arguments, which calls `guard(call, load)` with its bound arguments."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        return guard(_with_defaults(signature, call), functools.partial(original, *args, **kwargs))

    guarded.checks_spp = True  # type: ignore[attr-defined]
    return guarded


def _with_defaults(signature: inspect.Signature, call: inspect.BoundArguments) -> dict[str, Any]:
    call = signature.bind(*call.args, **call.kwargs)
    call.apply_defaults()
    return call.arguments


def _from_pretrained(arguments: dict[str, Any], load: Callable[[], Any]) -> Any:
    model, name, config, kwargs = (arguments[key] for key in ("model", "adapter_name", "config", "kwargs"))
    saved = read_if_ours(arguments["model_id"], kwargs, config)
    if saved is None:
        token = _settings_are_given.set(config is not None)
        try:
            return load()
        finally:
            _settings_are_given.reset(token)
    if {"cpu", "disk"}.intersection(map(str, (getattr(model, "hf_device_map", None) or {}).values())):
        # PEFT takes the hooks off before it adds the layers: whatever does not fit has to be found before that
        _try_on(saved, model, config or saved.config, name, kwargs)
    with loading(saved, name, kwargs):
        return load()


def _try_on(saved: SavedAdapter, model: nn.Module, config: SPPConfig, name: str, kwargs: dict[str, Any]) -> None:
    """Add an adapter to a model without memory for it, and take it away again: whatever fails, fails now."""
    with loading(saved, name, kwargs) as trial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again
        SPPModel(model, {name: copy.deepcopy(config)}, name, low_cpu_mem_usage=True)
        for step in trial.undo:
            step()
        trial.undo.clear()


def _load_adapter(arguments: dict[str, Any], load: Callable[[], Any]) -> Any:
    model, name, kwargs = (arguments[key] for key in ("self", "adapter_name", "kwargs"))
    current = loading_of(name)
    if current is not None:  # inside `from_pretrained`
        return _checked(load(), current.saved, name)
    own = model.peft_config.get(name)
    saved = read_if_ours(arguments["model_id"], kwargs, own)
    if saved is None:
        if isinstance(own, SPPConfig) and not _settings_are_given.get():
            check_is_spp(arguments["model_id"], kwargs, name)
        return load()
    if own is not None:
        check_fits(saved, model, own, name, bool(kwargs.get("ignore_mismatched_sizes", False)))
        before = own.check_base
        own.set_check_base(kwargs)
        try:
            take_record(saved.base, model, own, name)
        except ValueError:
            own.check_base = before
            raise
    with loading(saved, name, kwargs):
        return _checked(load(), saved, name)


def _load_into_transformers(arguments: dict[str, Any], load: Callable[[], Any]) -> Any:
    model, kwargs, config = arguments["self"], arguments["kwargs"], arguments["peft_config"]
    name = arguments["adapter_name"] or "default"
    download = getattr(arguments["load_config"], "download_kwargs", None) or {}
    source = arguments["peft_model_id"] or getattr(arguments["load_config"], "pretrained_model_name_or_path", None)
    if name in getattr(model, "peft_config", {}):
        return load()  # which is an error there
    saved: SavedAdapter | None
    if arguments["adapter_state_dict"] is not None and isinstance(config, SPPConfig):
        saved = from_state_dict(config, arguments["adapter_state_dict"])
    else:
        options = {**download, **kwargs, **(arguments["adapter_kwargs"] or {})}
        if arguments["local_files_only"]:
            options["local_files_only"] = True
        saved = read_if_ours(source, options, config)
    if saved is None:
        return load()
    if saved.config.is_from_file:
        # Transformers makes a configuration of its own of the file, which does not tell where it comes from
        check_patterns(expressions(vars(saved.config)), [module for module, _ in model.named_modules()])
    had_adapters = model._hf_peft_config_loaded
    with loading(saved, name, kwargs) as current:
        current.undo.append(lambda: setattr(model, "_hf_peft_config_loaded", had_adapters))
        return _checked(load(), saved, name)


def _checked(result: Any, saved: SavedAdapter, adapter_name: str) -> Any:
    """The result of loading, if PEFT found a tensor for each parameter of the adapter."""
    missing = sorted(key for key in result.missing_keys if belongs_to(key, adapter_name))
    if missing:
        raise ValueError(
            f"{saved.origin} is missing {len(missing)} tensors of the adapter under the names that this model uses, "
            f"such as {missing[0]}. Load the base model that the adapter was trained on."
        )
    return result
