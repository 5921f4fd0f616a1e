# SPDX-License-Identifier: Apache-2.0
"""Competitors by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from ..harness.plots import Style


@dataclass(frozen=True)
class Competitor:
    """A method to compare.

    Args:
        name (`str`): Its name on the command line and in results.
        style (`Style`): How it appears in pictures.
        adapt (`Callable[[nn.Module], nn.Module]`):
            Adapts every linear layer inside the transformer blocks of a model, in place, freezes the rest, and returns
            the model to train. Layers may be replaced; frozen weights stay the same `Parameter` objects.
    """

    name: str
    style: Style
    adapt: Callable[[nn.Module], nn.Module]


COMPETITORS: dict[str, Competitor] = {}


def competitor(
    name: str, style: Style
) -> Callable[[Callable[[nn.Module], nn.Module]], Callable[[nn.Module], nn.Module]]:
    """Register the decorated function as a competitor."""

    def register(adapt: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
        COMPETITORS[name] = Competitor(name, style, adapt)
        return adapt

    return register


def styles_of(names: Iterable[str]) -> dict[str, Style]:
    """The styles of those names that are competitors, in their order."""
    return {name: COMPETITORS[name].style for name in names if name in COMPETITORS}
