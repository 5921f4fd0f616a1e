# SPDX-License-Identifier: Apache-2.0
"""Which dimension of a stored weight is the input: `(out, in)` as `nn.Linear`, or `(in, out)` as `Conv1D`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .names import matches


CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
"""The `model_type`s of transformers that use `Conv1D`. (GPTBigCode and GPT-Neo reuse its names with `nn.Linear`.)"""

CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_fc", "c_proj"})
"""What the `Conv1D` layers of those models are called."""

TRANSPOSED_EXPERTS_MODEL_TYPES = frozenset(
    {"aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter"}
)
"""The `model_type`s whose fused experts are stored `(experts, in, out)` and not `(experts, out, in)`."""


def says_transposed(module: object) -> bool | None:
    """What a module says of the layout of its fused experts, as Transformers' do; `None` if it does not."""
    said = getattr(module, "is_transposed", None)
    return said if isinstance(said, bool) else None


def has_transposed_experts(model_types: Collection[str]) -> bool:
    """Whether models of these types store fused experts `(experts, in, out)`, where the modules do not say."""
    return not TRANSPOSED_EXPERTS_MODEL_TYPES.isdisjoint(model_types)


def model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """The `model_type`s in a model's configuration, those of its parts included."""
    found: set[str] = set()
    if isinstance(config.get("model_type"), str):
        found.add(config["model_type"])
    for value in config.values():
        if isinstance(value, Mapping):
            found |= model_types(value)
    return frozenset(found)


class Layout:
    """Tells the layout of a weight by its name, for weights that come without their module.

    In this order: what the caller says; the `model_type`; and the biases, since a bias is as long as there are
    outputs: if any layer of a name (`c_fc`, say) can only be `(in, out)`, every layer of that name is. Otherwise
    `(out, in)`.

    Args:
        shapes (`Mapping[str, Sequence[int]]`): The shapes of all tensors, by plain name (`...weight`, `...bias`).
        config (`Mapping[str, Any]`): The content of the model's `config.json`, empty if there is none.
        conv1d (`bool`, `str`, `Sequence[str]` or `None`): What the caller says; see [`sparsity_report`].
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        config: Mapping[str, Any],
        conv1d: bool | str | Sequence[str] | None,
    ) -> None:
        self._conv1d = conv1d
        self._model_types = model_types(config)
        self._transposed_names = self._read_biases(shapes)

    @staticmethod
    def _read_biases(shapes: Mapping[str, Sequence[int]]) -> frozenset[str]:
        transposed, straight = set(), set()
        for name, shape in shapes.items():
            bias = shapes.get(f"{name.removesuffix('weight')}bias") if name.endswith("weight") else None
            if bias is None or len(bias) != 1 or len(shape) != 2 or shape[0] == shape[1]:
                continue
            last = name.removesuffix(".weight").rpartition(".")[2]
            if shape[1] == bias[0]:
                transposed.add(last)
            elif shape[0] == bias[0]:
                straight.add(last)
        return frozenset(transposed - straight)

    def is_transposed(self, name: str, dims: int) -> bool:
        """Whether a module's weight is stored `(in, out)`."""
        if isinstance(self._conv1d, bool):
            return self._conv1d
        if self._conv1d is not None:
            return matches(name, self._conv1d)
        if dims == 3:
            return has_transposed_experts(self._model_types)
        last = name.rpartition(".")[2]
        if last in CONV1D_NAMES and self._model_types & CONV1D_MODEL_TYPES:
            return True
        return last in self._transposed_names
