# SPDX-License-Identifier: Apache-2.0
"""The picture of the suite of a pretrained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from ...harness import plots
from ..analysis import remarks_of, with_remarks
from ..data import UNLIKE
from ..methods import METHODS
from ..store import Store
from .comparison import MAIN_TEXT, Comparison, Entry
from .results import machines, model_name


def draw(comparisons: Sequence[Comparison], store: Store, path: Path) -> None:
    """
    Draw perplexity and accuracy by pruning, all contenders on the first copy of each pruned model.

    Args:
        comparisons (`Sequence[Comparison]`): What was measured.
        store (`Store`): Where.
        path (`Path`): The picture.
    """
    note = (
        "Each pruned model, and what tuning makes of it; dashed: the dense model. Bars: standard error of the mean "
        f"accuracy.\nHollow: distilled, or zeros lost. Each at its best rate. {machines(store, capability=False)}"
    )
    comparisons = [one for one in comparisons if not one.copy]
    figure, ((left, middle, right),) = plots.panels(1, 3, model_name(store), note, panel_height=3.0)
    for place, one in enumerate(comparisons):
        shown = (entry for entry in one.entries if entry.deployment != "unmerged" and not entry.gave_way)
        entries = [one.pruned, *shown]
        for index, entry in enumerate(entries):
            x = place + 0.8 * ((index + 0.5) / len(entries) - 0.5)
            for axes, text in ((left, MAIN_TEXT), (middle, UNLIKE)):
                _mark(axes, x, entry.perplexity(text).mean, entry)
            right.errorbar([x], [100 * entry.accuracy], [100 * entry.accuracy_error], color="#bbbbbb", linewidth=0.8)
            _mark(right, x, 100 * entry.accuracy, entry)
    dense = comparisons[0].dense
    for axes, title, value in (
        (left, "perplexity, text like the tuning's", dense.perplexity(MAIN_TEXT).mean),
        (middle, "perplexity, text unlike it", dense.perplexity(UNLIKE).mean),
        (right, "mean accuracy of the tasks, %", 100 * dense.accuracy),
    ):
        axes.set_title(title, loc="left")
        axes.axhline(value, color=plots.BLACK, linewidth=0.8, linestyle=(0, (4, 2)))
        axes.set_xticks(range(len(comparisons)), [one.label.replace(" ", "\n", 1) for one in comparisons], fontsize=7)
        if axes is not right:
            plots.log_y(axes)
    handles, labels = left.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower left", ncols=2, frameon=False, fontsize=7)
    plots.save_figure(figure, path)


def _mark(axes: Axes, x: float, y: float, entry: Entry) -> None:
    style = METHODS[entry.settings["method"]].style if entry.settings else plots.Style("", plots.GRAY, "x")
    hollow = bool(entry.settings) and (entry.settings["options"].get("teacher") or entry.deployed[0].get("zeros_lost"))
    axes.plot(
        [x],
        [y],
        marker=style.marker,
        color=style.color,
        markerfacecolor="white" if hollow else style.color,
        markerfacecoloralt="white",
        fillstyle="left" if entry.saw_tasks else "full",
        markeredgecolor=plots.BLACK if style.color == plots.YELLOW else style.color,
        linestyle="none",
        markersize=5,
        label=_drawn_label(entry),
    )


def _drawn_label(entry: Entry) -> str:
    """For the legend of the picture: without ranks, as those at equal parameters or time have the same marks."""
    if not entry.settings:
        return entry.label
    remarks = remarks_of({**entry.settings, "equal": None}, entry.deployment)
    return with_remarks(METHODS[entry.settings["method"]].style.label, remarks)
