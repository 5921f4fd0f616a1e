# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint serve two modules: what is written for one would change the other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import transformers

from .names import special_role


_FLAG = "tie_word_embeddings"
_OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output_layer")


class TiedNames:
    """
    Tells tensors that Transformers ties to another.

    A model's class decides which ones it ties. Where Transformers has no class of that name (code from the Hub), or
    the class ties nothing itself (the body of a model), those that are named like embeddings count.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        flags = list(_flags(config))
        self._patterns: list[str] = []
        self._tied = any(flags)
        if flags and not self._tied:
            return  # without the classes, whose import takes a second
        classes = _model_classes(config)
        keys = [keys for cls in classes if isinstance(keys := getattr(cls, "_tied_weights_keys", None), Mapping)]
        self._patterns = [side for mapping in keys for pair in mapping.items() for side in pair]
        if not flags:
            # configurations leave out what is the default of their class
            defaults = [getattr(getattr(cls, "config_class", None), _FLAG, True) for cls in classes]
            self._tied = any(default is True for default in defaults)

    def __contains__(self, name: object) -> bool:
        if not self._tied or not isinstance(name, str):
            return False
        if self._patterns:
            return any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in self._patterns)
        module = name.rpartition(".")[0]
        return special_role(module) == "embedding" or module.rpartition(".")[2] in _OUTPUT_EMBEDDINGS


def _model_classes(config: Mapping[str, Any]) -> list[Any]:
    names = config.get("architectures")
    classes = []
    for name in names if isinstance(names, list) else []:
        try:
            classes.append(getattr(transformers, str(name), None))
        except (ImportError, RuntimeError):
            continue  # it needs a package that is not installed, so nobody here loads this model
    return [cls for cls in classes if cls is not None]


def _flags(config: Mapping[str, Any]) -> Iterator[bool]:
    for key, value in config.items():
        if key == _FLAG:
            yield bool(value)
        elif isinstance(value, Mapping):
            yield from _flags(value)
