# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the SPP authors' code (https://github.com/Lucky-Lance/SPP).

Their code is a fork of PEFT 0.2.0 whose LoRA layer computes SPP. It saves, for each layer, `lora_A.weight` (the input
factor, always of 16 rows) and `lora_A.weight_col` (the output factor, of shape (m, 1), or (1, m) with the layer that
their DeepSpeed recipe puts in). The update is `P(A) ⊙ B ⊙ W · lora_alpha / r`, with the `lora_alpha` and `r` of the
configuration (16 and 8 in their scripts): r does not say how many rows A has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoints.safetensors_files import read_json
from ..tuner import SPPConfig
from ..tuner.adapter_files import NOT_A_PICKLE, PREFIX
from .content import AdapterContent
from .report import ExchangedModule


_CARD = """# SPP adapter

Converted by `peft-spp convert` from a checkpoint of the [SPP authors' code](https://github.com/Lucky-Lance/SPP)."""
_FACTOR = re.compile(r"(.+)\.lora_A\.(weight|weight_col)")
# their scripts leave these as they are, and what they would add to a checkpoint is not read here
_UNUSED = {"bias": "none", "enable_lora": None, "fan_in_fan_out": False, "modules_to_save": None}


def read_authors_adapter(folder: Path, base: str | None = None) -> AdapterContent:
    """Read an adapter that the authors' code has saved."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not an adapter: it has no {CONFIG_NAME}")
    settings = read_json(file)
    scaling = _check_settings(file, settings)
    weights, stored = _load_tensors(folder)
    factors = _pair_factors(weights, stored)
    r = _common_rank(weights, factors)
    tensors: dict[str, Tensor] = {}
    modules = []
    for name, (A, B) in factors.items():
        tensors[f"{PREFIX}{name}.spp_A.weight"] = A
        tensors[f"{PREFIX}{name}.spp_B.weight"] = B
        modules.append(ExchangedModule(name, A.shape[1], B.shape[0], r, scaling, A.numel() + B.numel()))
    config = SPPConfig(
        r=r,
        spp_alpha=scaling * r,
        spp_dropout=settings.get("lora_dropout") or 0.0,
        target_modules=_target_modules(settings.get("target_modules"), list(factors)),
        base_model_name_or_path=base or settings.get("base_model_name_or_path") or None,
        task_type=settings.get("task_type"),
        inference_mode=True,
    )
    return AdapterContent(config, tensors, tuple(modules), (), _CARD)


def _check_settings(file: Path, settings: Mapping[str, Any]) -> float:
    """Check that the settings are what the authors' code writes, and return the scaling."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file} has peft_type {settings.get('peft_type')!r}; the authors' code writes 'LORA'")
    for name, expected in _UNUSED.items():
        if settings.get(name, expected) != expected:
            raise ValueError(f"{file} has {name}={settings[name]!r}, and only {expected!r} can be converted")
    r, alpha = settings.get("r"), settings.get("lora_alpha")
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in (r, alpha))
    if not numbers or r <= 0 or not math.isfinite(alpha):  # type: ignore[operator,arg-type]
        raise ValueError(f"{file} has r={r!r} and lora_alpha={alpha!r}, which do not define a scaling")
    return float(alpha / r)  # type: ignore[operator]


def _load_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    for file in (folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME):
        if not file.is_file():
            continue
        try:
            # of a pickle, tensors alone are read: nothing in it is run
            stored = (
                load_file(file)
                if file.suffix == ".safetensors"
                else torch.load(file, map_location="cpu", weights_only=True)
            )
        except (SafetensorError, *NOT_A_PICKLE) as error:
            raise ValueError(f"{file} cannot be read as tensors (truncated or damaged): {error}") from error
        if not isinstance(stored, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in stored.items()
        ):
            raise ValueError(f"{file} does not contain a dictionary of names and tensors")
        return file, stored
    raise FileNotFoundError(f"{folder} has neither {WEIGHTS_NAME} nor {SAFETENSORS_WEIGHTS_NAME}")


def _pair_factors(file: Path, stored: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        match = _FACTOR.fullmatch(key.removeprefix(PREFIX))
        if match is None or not key.startswith(PREFIX):
            raise ValueError(
                f"{file} contains tensor {key!r}, which is not in adapters of the SPP authors' code. A LoRA adapter "
                "cannot be converted: its update does not keep zeros."
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: tensor {key!r} has values that are not finite floating-point numbers")
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise ValueError(f"{file} contains no tensors: there is nothing to convert")
    return {name: _factors(file, name, pair) for name, pair in found.items()}


def _factors(file: Path, name: str, pair: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    if len(pair) < 2:
        missing = "lora_A.weight" if "weight_col" in pair else "lora_A.weight_col"
        raise ValueError(f"{file} contains only half of the adapter of module {name!r}: {missing} is missing")
    A, column = pair["weight"], pair["weight_col"]
    if A.ndim != 2 or not A.numel() or column.ndim != 2 or 1 not in column.shape:
        raise ValueError(
            f"{file}: the factors of module {name!r} have shapes {tuple(A.shape)} and {tuple(column.shape)}, not "
            "(16, in) and (out, 1) or (1, out)"
        )
    B = column.reshape(-1, 1)
    if B.shape[0] % A.shape[0]:
        raise ValueError(
            f"{file}: module {name!r} has {B.shape[0]} output rows, which its {A.shape[0]} row blocks do not divide. "
            "For such a module the authors' code uses different blocks in training and in merging."
        )
    # pickled tensors may share their memory, which safetensors does not write
    return tuple(one.detach().clone(memory_format=torch.contiguous_format) for one in (A, B))  # type: ignore[return-value]


def _common_rank(file: Path, factors: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    ranks = {A.shape[0]: name for name, (A, _) in factors.items()}
    if len(ranks) > 1:
        shown = ", ".join(f"{r} in {name}" for r, name in ranks.items())
        raise ValueError(
            f"{file}: in the authors' code all input factors have the same number of rows, but found {shown}"
        )
    return next(iter(ranks))


def _target_modules(wanted: Any, names: list[str]) -> list[str]:
    """The targets of the settings that this model has; the full names if those do not mean the same in PEFT."""
    ends = [wanted] if isinstance(wanted, str) else wanted if isinstance(wanted, list) else []
    used = [end for end in ends if any(name == end or name.endswith(f".{end}") for name in names)]
    covered = all(any(name == end or name.endswith(f".{end}") for end in used) for name in names)
    return used if covered else names
