# SPDX-License-Identifier: Apache-2.0
"""What `config.json` says of a model with compressed weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoints.compressed_format import METHOD, VERSION, check_version
from ..checkpoints.names import compiled


class BitmaskConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """
    Weights whose zeros are not stored.

    Pass it to `from_pretrained` to compress a model while it loads; a compressed model brings its own. Nothing is
    rounded: the model computes what it computed before.

    Args:
        modules_to_not_convert (`Sequence[str]`, *optional*): Linear layers and experts that stay dense, by their name,
            the end of it, or a regular expression for its beginning. By default those that Transformers leaves alone
            when it quantizes: the head and what is tied to the embeddings. `[]` compresses an untied head as well.
        min_sparsity (`float`, *optional*): Layers with a smaller share of zeros, from 0 to 1, stay dense. By default
            a layer is compressed if that takes fewer bytes, from 1/16 zeros on at 2 bytes a value.
        version (`int`): The version of the format.

    Raises:
        ValueError: If an argument is of another kind, or the version is one that this peft_spp does not know.
    """

    def __init__(
        self,
        modules_to_not_convert: Sequence[str] | None = None,
        min_sparsity: float | None = None,
        version: int = VERSION,
        **kwargs: Any,
    ) -> None:
        method = kwargs.pop("quant_method", METHOD)
        check_version(version)
        if method != METHOD or kwargs:
            raise ValueError(
                f"BitmaskConfig does not know {', '.join(kwargs) or f'the quant_method {method!r}'}; it has "
                "modules_to_not_convert, min_sparsity and version"
            )
        names = modules_to_not_convert
        is_list = isinstance(names, Collection) and not isinstance(names, str)
        if names is not None and not (is_list and all(isinstance(name, str) for name in names)):
            raise ValueError(f"modules_to_not_convert must be a list of names, and is {names!r}")
        for name in names or ():
            compiled(name, "modules_to_not_convert")
        if min_sparsity is not None and not (isinstance(min_sparsity, (int, float)) and 0 <= min_sparsity <= 1):
            raise ValueError(f"min_sparsity must be between 0 and 1, and is {min_sparsity!r}")
        self.quant_method = METHOD  # type: ignore[assignment]  # it is registered, and not in the enum
        self.version = version
        self.modules_to_not_convert = None if names is None else list(names)
        self.min_sparsity = min_sparsity
