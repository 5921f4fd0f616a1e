# SPDX-License-Identifier: Apache-2.0
"""Two pictures: what was won back against sparsity, and against the number of trained parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, PercentFormatter

from ..harness import plots
from .analysis import Analysis, Outcome
from .design import Pruning
from .methods import METHODS
from .suites import PRUNERS, REQUESTS


# the re-masked LoRA is what LoRA is where the zeros are to stay; the other two are marked as dense
DENSE = {"unmerged", "merged"}
PANEL_HEIGHT = 2.7


def draw_sparsity(analysis: Analysis, model: str, environment: Mapping[str, Any], path: Path) -> None:
    """
    Draw what was won back, by what the model was pruned to, a panel for each pruning method.

    Args:
        analysis (`Analysis`): The outcomes.
        model (`str`): Of which model.
        environment (`Mapping[str, Any]`): Where it was measured.
        path (`Path`): The picture.
    """
    pruners = [pruner for pruner in PRUNERS if any(p.method == pruner for m, p in analysis.studied if m == model)]
    note = (
        "Share of the log-perplexity lost by pruning that fine-tuning won back (100% = the dense model), sparse "
        f"models only.\nMean and range over seeds where there are several. {plots.machine_note(environment)}"
    )
    figure, panels = plots.panels(
        len(pruners), 1, "Won back, by sparsity", note, panel_height=1.9, share_x=True, share_y=False
    )
    shown: dict[str, plots.Style] = {}
    for (axes,), pruner in zip(panels, pruners, strict=True):
        _sparsity_panel(axes, analysis, model, pruner, shown)
        axes.set_title(Pruning(pruner, 0.5).label.rpartition(" ")[0], loc="left")
    panels[-1][0].set_xticks(range(len(REQUESTS)), [_request_label(request) for request in REQUESTS])
    _legend(figure, shown)
    plots.save_figure(figure, path)


def draw_parameters(analysis: Analysis, model: str, environment: Mapping[str, Any], path: Path) -> None:
    """
    Draw what was won back by the number of trained parameters, a panel for each pruning that all methods were run on.

    Args:
        analysis (`Analysis`): The outcomes.
        model (`str`): Of which model.
        environment (`Mapping[str, Any]`): Where it was measured.
        path (`Path`): The picture.
    """
    own_rates = {one.pruning for one in analysis.outcomes if one.model == model and len(one.rates) > 1}
    prunings = [pruning for name, pruning in analysis.studied if name == model and pruning in own_rates]
    note = (
        "Share of the log-perplexity lost by pruning that was won back, at equal tokens, and range over seeds.\n"
        f"Hollow: the merged model is dense. {plots.machine_note(environment)}"
    )
    figure, panels = plots.panels(
        1,
        max(len(prunings), 1),
        "Won back, by trained parameters",
        note,
        panel_height=PANEL_HEIGHT,
        share_x=True,
        share_y=False,
    )
    shown: dict[str, plots.Style] = {}
    for axes, pruning in zip(panels[0], prunings, strict=False):
        for outcome in analysis.of(model, pruning):
            if outcome.equal == "time" or outcome.deployment == "unmerged":
                continue
            style = METHODS[outcome.method].style
            shown[outcome.method] = style
            _point(axes, outcome.measured("trainable"), outcome, style)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("trained parameters")
        axes.set_title(pruning.label, loc="left")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(figure, shown)
    plots.save_figure(figure, path)


def _sparsity_panel(axes: Axes, analysis: Analysis, model: str, pruner: str, shown: dict[str, plots.Style]) -> None:
    sparse = [
        one
        for m, p in analysis.studied
        if m == model and p.method == pruner
        for one in analysis.of(m, p)
        if one.deployment not in DENSE or one.method != "lora"
    ]
    methods = [name for name in METHODS if any(one.method == name for one in sparse)]
    for index, name in enumerate(methods):
        style = shown[name] = METHODS[name].style
        for one in sparse:
            if one.method == name and not one.options and one.equal is None:
                place = REQUESTS.index(one.pruning.request) + 0.12 * (index - (len(methods) - 1) / 2)
                _point(axes, place, one, style)
    axes.set_xlim(-0.5, len(REQUESTS) - 0.5)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.axhline(0.0, color=plots.GRAY, linewidth=0.8)


def _point(axes: Axes, place: float, outcome: Outcome, style: plots.Style) -> None:
    recovery = outcome.recovery
    values = [(outcome.pruned_loss - loss) / (outcome.pruned_loss - outcome.dense_loss) for loss in outcome.losses]
    axes.vlines(place, min(values), max(values), color=style.color, linewidth=1.2)
    dense = outcome.method == "lora" and outcome.deployment in DENSE
    axes.plot(
        [place],
        [recovery.mean],
        color=style.color,
        marker=style.marker,
        markersize=5,
        linestyle="none",
        markerfacecolor="white" if dense else style.color,
        markeredgecolor=plots.BLACK if style.color == plots.YELLOW else style.color,
    )


def _legend(figure: Figure, styles: Mapping[str, plots.Style]) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=style.color,
            marker=style.marker,
            linestyle="none",
            label="LoRA, masked again" if name == "lora" else style.label,
            markeredgecolor=plots.BLACK if style.color == plots.YELLOW else style.color,
        )
        for name, style in styles.items()
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False)


def _request_label(request: str | float) -> str:
    return Pruning("wanda", request).request_label
