# SPDX-License-Identifier: Apache-2.0
"""The format of compressed weights: its name in a model's configuration, and its version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


METHOD = "bitmask"
VERSION = 1


def check_version(version: object) -> None:
    """Raise a `ValueError` if this package does not know a version of the format."""
    if version != VERSION or isinstance(version, bool):
        raise ValueError(
            f"the weights are compressed in version {version!r} of the format, and this peft_spp knows version "
            f"{VERSION}: update peft_spp"
        )


def names_format(config: Mapping[str, Any]) -> bool:
    """Whether the configuration of a model says that its weights are compressed, though none may be."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def check_config(config: Mapping[str, Any]) -> None:
    """[`check_version`] of the configuration of a model, whose weights may not be compressed."""
    if names_format(config):
        check_version(config["quantization_config"].get("version", VERSION))
