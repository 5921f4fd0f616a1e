# SPDX-License-Identifier: Apache-2.0
"""Pictures of what an inspection found. They need Matplotlib, of the extra `plot`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..durable import write_file
from ..reports import kind_of
from .adapter import AdapterInspection
from .checkpoint import CheckpointInspection


# a heat map with more cells than this has no numbers in them
_MAX_NUMBERS = 300
# how many outputs and inputs of a mask are shown weight by weight
_CORNER = (32, 64)
# a whole weight is shown in at most this many points a side
_POINTS = 256
_DPI = 150


def plot_checkpoint(inspection: CheckpointInspection, path: Path, module: str | None = None) -> None:
    """Draw the sparsity by layer and kind of module, and the mask of one weight."""
    name = module or _first(inspection.modules, inspection.source)
    nonzero = inspection.nonzero(name)
    cells = _by_layer_and_kind((one.name, one.sparsity.zeros, one.sparsity.numel) for one in inspection)
    figure = _figure(cells)
    left, whole, corner = _axes(figure)
    _heat_map(figure, left, cells, "share of zeros", lambda value: f"{100 * value:.0f}", vmin=0.0, vmax=1.0)
    left.set_title(f"Sparsity: {100 * inspection.total_sparsity:.1f} % of {inspection.numel:,} weights")
    _draw_whole(figure, whole, (~nonzero).float(), name, "share of zeros", vmin=0.0, vmax=1.0)
    _draw_corner(corner, nonzero)
    write_file(path, lambda aside: figure.savefig(aside, dpi=_DPI))


def plot_adapter(inspection: AdapterInspection, path: Path, module: str | None = None) -> None:
    """Draw how much an adapter changes the weights by layer and kind of module, and the change of one weight."""
    _first(inspection.modules, inspection.source)
    name = module or max(inspection, key=lambda one: one.change).name
    change = inspection.relative_change(name)
    cells = changes_by_layer_and_kind(inspection)
    figure = _figure(cells)
    left, whole, rows = _axes(figure)
    _heat_map(
        figure,
        left,
        cells,
        "relative change (root mean square)",
        lambda value: f"{100 * value:.2g}",
        vmin=0.0,
    )
    left.set_title("What training changed: s · P(A) ⊙ B")
    _draw_whole(figure, whole, change.abs(), name, "mean |change|", vmin=0.0)
    _draw_rows(rows, change, inspection[name].r)
    write_file(path, lambda aside: figure.savefig(aside, dpi=_DPI))


def changes_by_layer_and_kind(inspection: AdapterInspection) -> dict[str, dict[str, float]]:
    """The root mean square of the change over all weights, by kind of module and by layer."""
    squares = _by_layer_and_kind(
        (one.name, one.change**2 * math.prod(one.shape), math.prod(one.shape)) for one in inspection
    )
    return {kind: {layer: math.sqrt(one) for layer, one in row.items()} for kind, row in squares.items()}


def _first(modules: Iterable[str], source: str) -> str:
    name = next(iter(modules), None)
    if name is None:
        raise ValueError(f"{source} has no layers to draw")
    return name


def _by_layer_and_kind(values: Iterable[tuple[str, float, float]]) -> dict[str, dict[str, float]]:
    """Sums of the values over sums of the weights, by kind of module and by layer."""
    sums: dict[str, dict[str, list[float]]] = {}
    for name, value, weight in values:
        layer = next((part for part in name.split(".") if part.isdecimal()), "-")
        total = sums.setdefault(kind_of(name), {}).setdefault(layer, [0.0, 0.0])
        total[0] += value
        total[1] += weight
    return {kind: {layer: one / of for layer, (one, of) in row.items()} for kind, row in sums.items()}


def _layers(cells: dict[str, dict[str, float]]) -> list[str]:
    layers = dict.fromkeys(layer for row in cells.values() for layer in row)
    return sorted(layers, key=lambda layer: int(layer) if layer.isdecimal() else -1)


def _figure(cells: dict[str, dict[str, float]]) -> Figure:
    width = min(16.0, 4.5 + 0.45 * len(_layers(cells)))
    return Figure(figsize=(width + 6.5, max(5.6, 1.8 + 0.42 * len(cells))), layout="constrained")


def _axes(figure: Figure) -> tuple[Axes, Axes, Axes]:
    """A wide place on the left, and two above each other on the right."""
    width = figure.get_figwidth()
    grid = figure.add_gridspec(2, 2, width_ratios=(width - 6.5, 6.5), height_ratios=(1.15, 1.0))
    return figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])


def _heat_map(
    figure: Figure,
    axes: Axes,
    cells: dict[str, dict[str, float]],
    label: str,
    write: Callable[[float], str],
    *,
    vmin: float,
    vmax: float | None = None,
) -> None:
    kinds, layers = list(cells), _layers(cells)
    values = np.array([[cells[kind].get(layer, np.nan) for layer in layers] for kind in kinds])
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=vmin, vmax=vmax)
    axes.set_yticks(range(len(kinds)), kinds)
    step = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    axes.set_xlabel("layer")
    bar = figure.colorbar(image, ax=axes, label=label)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    if values.size > _MAX_NUMBERS:
        return
    low, high = image.get_clim()
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            # dark numbers on the light end of the colors
            color = "black" if value > low + 0.6 * (high - low) else "white"
            axes.text(column, row, write(float(value)), ha="center", va="center", color=color, fontsize=8)


def _draw_whole(figure: Figure, axes: Axes, values: Tensor, name: str, label: str, **limits: Any) -> None:
    """A weight with its own proportions, each point the mean of a part of it."""
    outputs, inputs = values.shape
    points = (min(outputs, _POINTS), min(inputs, _POINTS))
    pooled = adaptive_avg_pool2d(values[None, None], points)[0, 0]
    image = axes.imshow(
        pooled.numpy(), cmap="viridis", interpolation="nearest", extent=(0, inputs, outputs, 0), **limits
    )
    if not 0.25 < outputs / inputs < 4:
        axes.set_aspect("auto")
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("input")
    axes.set_ylabel("output")
    figure.colorbar(image, ax=axes, label=label).ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")


def _draw_corner(axes: Axes, nonzero: Tensor) -> None:
    """The first weights one by one, with a line between groups of four inputs."""
    corner = nonzero[: _CORNER[0], : _CORNER[1]]
    outputs, inputs = corner.shape
    axes.imshow(
        corner.numpy(), cmap=ListedColormap(["#e8e8e8", "#31688e"]), vmin=0, vmax=1, extent=(0, inputs, outputs, 0)
    )
    axes.set_xticks(range(0, inputs + 1, 4 if inputs <= 32 else 8))
    for group in range(4, inputs, 4):
        axes.axvline(group, color="white", linewidth=1.2)
    axes.set_title("Its first weights: blue are kept, gray are zero", fontsize=10)
    axes.set_xlabel("input, a line every four")
    axes.set_ylabel("output")


def _draw_rows(axes: Axes, change: Tensor, r: int) -> None:
    """The change of each output, with the borders of the row blocks."""
    rms = change.square().mean(dim=1).sqrt()
    axes.plot(range(len(rms)), 100 * rms.numpy(), linewidth=0.8, color="#31688e")
    axes.fill_between(range(len(rms)), 100 * rms.numpy(), color="#31688e", alpha=0.25, linewidth=0)
    for border in torch.linspace(0, len(rms), r + 1)[1:-1].tolist():
        axes.axvline(border, color="#bbbbbb", linewidth=0.6, zorder=0)
    axes.set_xlim(0, len(rms) - 1 or 1)
    axes.set_ylim(bottom=0)
    axes.set_title(f"By output; lines between the {r} row blocks", fontsize=10)
    axes.set_xlabel("output")
    axes.set_ylabel("change (rms), %")
