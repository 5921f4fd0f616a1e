# SPDX-License-Identifier: Apache-2.0
"""Resizing the vocabulary of a model whose head is compressed: refused before anything changes."""

from __future__ import annotations

import functools
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from .layer import CompressedLinear


def guard_resizing() -> None:
    """Check models before their vocabulary is resized. Calling it again is a no-op."""
    resize = PreTrainedModel.resize_token_embeddings
    if not hasattr(resize, "checks_compressed"):
        setattr(PreTrainedModel, "resize_token_embeddings", _checked(resize))  # noqa: B010  (for mypy)


def _checked(resize: Any) -> Any:
    @functools.wraps(resize)
    def resize_token_embeddings(
        self: PreTrainedModel,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Transformers resizes the input first, and then fails at the head
        name = _compressed_head(self)
        if name is None or new_num_tokens is pad_to_multiple_of is None:
            return resize(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        embeddings = cast(nn.Embedding, self.get_input_embeddings())
        tokens, multiple = new_num_tokens or embeddings.num_embeddings, pad_to_multiple_of or 1
        if -(-tokens // multiple) * multiple == embeddings.num_embeddings:
            return embeddings
        raise ValueError(
            f"the vocabulary cannot be resized, since {name} is compressed: make the model dense first with "
            "peft_spp.decompress(model), or load it such that modules_to_not_convert of BitmaskConfig has "
            f"{name!r}"
        )

    resize_token_embeddings.checks_compressed = True  # type: ignore[attr-defined]
    return resize_token_embeddings


def _compressed_head(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    layer = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    if not isinstance(layer, CompressedLinear):
        return None
    return next(name for name, module in model.named_modules() if module is head)
