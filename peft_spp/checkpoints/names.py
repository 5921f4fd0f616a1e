# SPDX-License-Identifier: Apache-2.0
"""What the name of a weight tells: the module's plain name, and whether it is a linear layer that counts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache


WRAPPER_PARTS = frozenset(
    {
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",  # FSDP1
        "_checkpoint_wrapped_module",  # torch's activation checkpointing and offloading
        "_fpw_module",  # FairScale's FSDP
        "_forward_module",  # Lightning Fabric
    }
)
"""The names under which wrapping modules hold what they wrap. They are private: no layer of a model has one."""

_PEFT_PARTS = {"base_layer", "original_module", "token_adapter"}
_PEFT_PREFIX = re.compile(r"^(module\.)?base_model\.model\.")
_ADAPTER_PART = re.compile(
    r"(^|\.)(((spp|lora|ia3|hada|lokr|oft|boft|vera|randlora|adamss)_\w+)|modules_to_save)(\.|$)"
)

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|score|classifier|qa_outputs|cls\.predictions)(\.|$)")
# The module that chooses experts or weighs them, and the layers inside it: `mlp.gate`, `router.proj`, `router_gate`,
# `shared_expert_gate`, `modality_router`. The `gateway.gate` of D-FINE mixes two inputs.
_ROUTER = re.compile(r"(?<!gateway)(^|\.)(gate|router|\w+_router|router_gate|shared_experts?_gate)(\.|$)")
_EMBEDDING = re.compile(r"(^|\.)(embed_\w+|\w*_?(embed|embedding|embeddings)|wte|wpe|shared|relative_attention_bias)$")
_NORM = re.compile(r"(^|\.)(\w*_?(norm|layernorm)\d*|ln_\w+)$")
# What quantized experts store next to their weights.
_QUANTIZATION = re.compile(r"(bias|scales?|scale_inv|zeros|zero_point|blocks)$")


def unwrapped_name(name: str) -> str:
    """A name without the parts that engines add: `torch.compile`, FSDP1, activation checkpointing."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)


def plain_name(name: str) -> str:
    """A module's name without what PEFT, `torch.compile` and FSDP wrap around it."""
    parts = [part for part in unwrapped_name(name).split(".") if part not in _PEFT_PARTS]
    return _PEFT_PREFIX.sub("", ".".join(parts))


def wrapped_by_adapters(names: Iterable[str]) -> frozenset[str]:
    """The modules that hold a `base_layer`, so that whatever else they hold belongs to an adapter."""
    wrapped: set[str] = set()
    for name in names:
        parts = name.split(".")
        wrapped.update(".".join(parts[:at]) for at, part in enumerate(parts) if part == "base_layer")
    return frozenset(wrapped)


def is_adapter(name: str, wrapped: frozenset[str]) -> bool:
    """Whether a weight belongs to an adapter and not to the model underneath."""
    if _ADAPTER_PART.search(name):
        return True
    parts = name.split(".")
    return any(".".join(parts[:at]) in wrapped and parts[at] != "base_layer" for at in range(len(parts)))


def special_role(name: str) -> str | None:
    """The role of a module that a pruning run leaves alone, if its name says so."""
    # the router of a Switch Transformer holds a `classifier`
    for role, expression in (("router", _ROUTER), ("head", _HEAD), ("embedding", _EMBEDDING), ("norm", _NORM)):
        if expression.search(name):
            return role
    return None


def is_fused_experts(name: str) -> bool:
    """Whether a 3-D weight of this name holds the linear layers of all experts of a mixture."""
    parts = name.split(".")
    if _QUANTIZATION.search(parts[-1]):
        return False
    return "experts" in parts[:-1] or parts[-1] in ("input_linear", "output_linear")


def matches(name: str, wanted: str | Sequence[str]) -> bool:
    """Whether a name is asked for, by the rule of PEFT's `target_modules`."""
    if isinstance(wanted, str):
        return compiled(wanted).fullmatch(name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def paired_by_ends(old: Iterable[str], new: Iterable[str]) -> dict[str, str]:
    """
    Which names of two models mean the same module: equal ones, and of the others those with the longest common ends.
    What has no partner, or several, is left out.
    """
    left, wanted = set(old), set(new)
    pairs = {name: name for name in left & wanted}
    left, wanted = left - pairs.keys(), wanted - pairs.keys()
    for length in range(max((name.count(".") + 1 for name in left), default=0), 0, -1):
        ends, others = _by_end(left, length), _by_end(wanted, length)
        found = {ends[end][0]: others[end][0] for end in ends if len(ends[end]) == len(others.get(end, ())) == 1}
        pairs |= found
        left, wanted = left - found.keys(), wanted - set(found.values())
    return pairs


def _by_end(names: Iterable[str], length: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        if name.count(".") + 1 >= length:
            found.setdefault(".".join(name.split(".")[-length:]), []).append(name)
    return found


def as_names(wanted: str | Iterable[str] | None) -> str | Sequence[str] | None:
    """The same, to be read more than once."""
    return wanted if wanted is None or isinstance(wanted, str) else tuple(wanted)


def without_match(wanted: str | Sequence[str], is_matched: Callable[[str | Sequence[str]], bool]) -> str:
    """The entries that nothing matches, for messages: they may be misspelled."""
    entries = [(wanted, wanted)] if isinstance(wanted, str) else [(one, (one,)) for one in wanted]
    return ", ".join(repr(shown) for shown, entry in entries if not is_matched(entry))


def warn_of_names_without_layers(
    is_matched: Callable[[str | Sequence[str]], bool], **settings: str | Sequence[str] | None
) -> None:
    """Say which entries of `target_modules`, or another setting, no layer matches."""
    for setting, wanted in settings.items():
        if wanted is not None and (missing := without_match(wanted, is_matched)):
            warnings.warn(f"{setting}: no linear layer of the model matches {missing}.", stacklevel=3)


def names_or_expression(values: Sequence[str], option: str) -> str | list[str]:
    """What the values of an option say about modules, by the rule of PEFT's `target_modules`."""
    expressions = [value for value in values if not re.fullmatch(r"[\w.-]+", value)]
    for expression in expressions:
        compiled(expression, option)
    if len(expressions) > 1 or (expressions and len(values) > 1):
        raise ValueError(
            f"{option} takes names, or one regular expression, and {expressions[0]!r} is one of {len(values)} values. "
            f"Join them to one expression: {'|'.join(f'({value})' for value in values)!r}"
        )
    return expressions[0] if expressions else list(values)


def targets_of_peft(values: Sequence[str], option: str) -> str | list[str]:
    """The same for an adapter, for which PEFT also knows 'all-linear'."""
    return values[0] if list(values) == ["all-linear"] else names_or_expression(values, option)


@lru_cache
def compiled(expression: str, option: str = "") -> re.Pattern[str]:
    """A regular expression; a `ValueError` that names the option if it is not valid."""
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        where = f"{option}: " if option else ""
        raise ValueError(f"{where}{expression!r} is not a valid regular expression: {error}") from error
