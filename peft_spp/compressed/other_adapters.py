# SPDX-License-Identifier: Apache-2.0
"""
Other methods of PEFT on compressed layers: what works, and refusing the rest before anything changes.

PEFT takes a [`CompressedLinear`] for a plain linear layer, and its `weight` for a matrix. A method that only calls the
layer does not notice. One that reads the weight fails with an error about shapes, or computes something else without
one, as DeLoRA's norms and the merge of IA3 do.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from .experts import find_compressed_stacks
from .layer import CompressedLinear


TRAIN = frozenset(
    "SPP LORA ADALORA BEFT BOFT C3A FOURIERFT GRALORA IA3 MISS OFT PVERA RANDLORA ROAD UNILORA VBLORA VERA "
    "WAVEFT".split()
)
"""The methods whose outputs and gradients on compressed layers are tested to be those on dense ones."""

_MERGE = ("spp_", "beft_")
"""What the parameters of methods begin with that leave the places of the zeros alone, or the whole weight."""


def guard_other_adapters() -> None:
    """Check adapters on compressed layers before they are added and before they are merged. Again, it does nothing."""
    if hasattr(BaseTuner.inject_adapter, "checks_compressed"):
        return
    setattr(BaseTuner, "inject_adapter", _inject_adapter(BaseTuner.inject_adapter))  # noqa: B010  (for mypy)
    for method in PEFT_TYPE_TO_TUNER_MAPPING.values():
        if "_pre_injection_hook" in vars(method):
            # FRoD reads the weights in it, before anything is injected
            setattr(method, "_pre_injection_hook", _before(method._pre_injection_hook))  # noqa: B010
    for name in ("merge_adapter", "merge_and_unload"):
        setattr(BaseTuner, name, _checked(getattr(BaseTuner, name)))


def check_adapter(tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """Raise a `ValueError` if an adapter that is about to be added cannot train on a compressed layer."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, CompressedLinear)]
    # without the part of another adapter that is there already
    names, stacks = (
        [name.replace(".base_layer", "") for name in found] for found in (layers, find_compressed_stacks(model))
    )
    if not names and not stacks:
        return
    config = tuner.peft_config[adapter_name]
    saved = tuple(config.modules_to_save or ()) if hasattr(config, "modules_to_save") else ()
    for name in (*names, *stacks):
        parts = name.split(".")
        around = [".".join(parts[: at + 1]) for at in range(len(parts))]
        found = next((one for one in saved if any(module.endswith(one) for module in around)), None)
        if found is not None:
            raise ValueError(
                f"modules_to_save has {found!r}, and the weight of {name} is compressed, which is frozen: leave it "
                "out, or make the model dense first with peft_spp.decompress(model)"
            )
    what = _reads_weight(config)
    target = what and next((name for name in names if _is_target(tuner, model, config, name, kwargs)), None)
    if target:
        raise ValueError(
            f"{what} cannot train on {target}, whose weight is compressed: make the model dense first with "
            "peft_spp.decompress(model), or leave compressed layers out of target_modules"
        )
    wanted = getattr(config, "target_parameters", None) or ()
    stack = next((name for name in stacks if any(f".{name}".endswith(f".{one}") for one in wanted)), None)
    if stack is not None and _method(config) != "SPP":
        raise ValueError(
            f"an adapter of the method {_method(config)} cannot train on {stack}, which is compressed: make the "
            "model dense first with peft_spp.decompress(model), or leave it out of target_parameters"
        )


def allow_merges(module: nn.Module) -> None:
    """Let adapters merge into layers that are dense again."""
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer) and getattr(layer.__dict__.get("merge"), "func", None) is _refuse_merge:
            del layer.merge


def is_spp(layer: BaseTunerLayer) -> bool:
    """Whether an adapter's layer is one of SPP, which is made for the kind of weight that it finds."""
    return any(name.startswith("spp_") for name in layer.adapter_layer_names)


def _check_merge(tuner: BaseTuner) -> None:
    name = next(iter(_cannot_merge(tuner.model)), None)
    if name is not None:
        _refuse_merge(name)


def _cannot_merge(model: nn.Module) -> dict[str, BaseTunerLayer]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
        and isinstance(layer.get_base_layer(), CompressedLinear)
        and not all(one.startswith(_MERGE) for one in layer.adapter_layer_names)
    }


def _refuse_merge(name: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(
        f"cannot merge the adapter of {name}: the weight of this layer is compressed, and the method merges into "
        "dense weights only. Keep the adapter unmerged, or make the model dense first with peft_spp.decompress(model)"
    )


def _inject_adapter(original: Any) -> Any:
    @functools.wraps(original)
    def inject_adapter(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter(self, model, adapter_name, *args, **kwargs)
        original(self, model, adapter_name, *args, **kwargs)
        for name, layer in _cannot_merge(model).items():
            # some, such as diffusers' fuse_lora, merge layer by layer
            layer.merge = functools.partial(_refuse_merge, name)  # type: ignore[method-assign]

    inject_adapter.checks_compressed = True  # type: ignore[attr-defined]
    return inject_adapter


def _before(hook: Any) -> Any:
    @functools.wraps(hook)
    def checked(self: BaseTuner, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        check_adapter(self, model, adapter_name)
        hook(self, model, config, adapter_name)

    return checked


def _checked(merge: Any) -> Any:
    @functools.wraps(merge)
    def checked(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
        _check_merge(self)
        return merge(self, *args, **kwargs)

    return checked


def _method(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _reads_weight(config: PeftConfig) -> str | None:
    """What an adapter is called, if it is not known to leave the weight of its base layer unread."""
    method = _method(config)
    if method not in TRAIN:
        return f"an adapter of the method {method}"
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "orthogonal"):
        return f"a LoRA adapter with init_lora_weights={start!r}"
    option = next((name for name in ("use_dora", "kasa_config") if getattr(config, name, None)), None)
    return option and f"a LoRA adapter with {option}"


def _is_target(tuner: BaseTuner, model: nn.Module, config: PeftConfig, name: str, kwargs: dict[str, Any]) -> bool:
    if kwargs.get("state_dict") is not None:
        return any(key.startswith(f"{name}.") for key in kwargs["state_dict"])
    # as PEFT does, on a copy: it is told what stands for the defaults
    config = tuner._prepare_adapter_config(copy.copy(config), tuner.get_model_config(model))
    config = _maybe_include_all_linear_layers(config, model)
    return bool(tuner._check_target_module_exists(config, name))
