# SPDX-License-Identifier: Apache-2.0
"""The look of the pictures: readable at 800 pixels, in colors that color-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from peft_spp.durable import write_file

from .statistics import Summary


WIDTH_INCHES = 8.0
# twice the 800 pixels that a README shows, for sharp screens
DPI = 200

# Okabe and Ito's colors for all kinds of color vision
BLACK = "#000000"
GRAY = "#7f7f7f"
ORANGE = "#e69f00"
SKY_BLUE = "#56b4e9"
GREEN = "#009e73"
YELLOW = "#f0e442"
BLUE = "#0072b2"
VERMILLION = "#d55e00"
PURPLE = "#cc79a7"

_REFERENCE_LINE: Any = {"color": BLACK, "linewidth": 1.0, "linestyle": (0, (4, 2))}

matplotlib.rcParams.update(
    {
        "font.size": 9.0,
        "axes.titlesize": 9.0,
        "axes.labelsize": 9.0,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
    }
)


@dataclass(frozen=True)
class Style:
    """How a contestant appears in all pictures and tables.

    Args:
        label (`str`): Its name for readers.
        color (`str`): One of the colors above.
        marker (`str`): A Matplotlib marker, so that color is never the only difference.
    """

    label: str
    color: str
    marker: str


def panels(
    rows: int,
    columns: int,
    title: str,
    note: str,
    *,
    panel_height: float = 2.2,
    share_x: bool = False,
    share_y: bool = False,
) -> tuple[Figure, list[list[Axes]]]:
    """
    A figure with a grid of panels below a title.

    Args:
        rows (`int`): The rows of the grid.
        columns (`int`): Its columns.
        title (`str`): What is compared.
        note (`str`): Lines below the title: how to read the figure, and the machine.
        panel_height (`float`): The height of one panel in inches.
        share_x (`bool`): Whether all panels have a common horizontal axis.
        share_y (`bool`): Whether the panels of a row have a common vertical axis.

    Returns:
        `tuple[Figure, list[list[Axes]]]`: The figure and its panels by row and column.
    """
    lines = note.count("\n") + 1
    height = panel_height * rows + 0.9 + 0.16 * lines
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share_x, sharey="row" if share_y else False)
    # the layout engine knows of no title in two faces, so its room is kept free by hand
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, 0, 1, 1 - (0.36 + 0.16 * lines) / height))  # type: ignore[call-arg]
    figure.text(0.01, 1 - 0.08 / height, title, fontsize=11, fontweight="bold", va="top")
    figure.text(0.01, 1 - 0.31 / height, note, fontsize=8.5, color="#444444", va="top", linespacing=1.35)
    return figure, [list(row) for row in axes]


def add_legend(
    figure: Figure, styles: Iterable[Style], *, reference: str, lines: bool = False, columns: int = 4
) -> None:
    """
    Explain the contestants' colors below the panels.

    Args:
        figure (`Figure`): A figure of [`panels`].
        styles (`Iterable[Style]`): The contestants.
        reference (`str`): What stands at [`reference_line`].
        lines (`bool`): Whether contestants are lines with markers; otherwise they are bars.
        columns (`int`): Of the legend.
    """
    handles: list[Artist] = [
        Line2D([], [], color=s.color, marker=s.marker, label=s.label)
        if lines
        else Patch(facecolor=s.color, label=s.label)
        for s in styles
    ]
    handles.append(Line2D([], [], label=f"{reference} = 1", **_REFERENCE_LINE))
    figure.legend(handles=handles, loc="outside lower left", ncols=min(columns, len(handles)), frameon=False)


def machine_note(environment: Mapping[str, Any]) -> str:
    """The machine and the version of PyTorch in a line, for below a title."""
    hardware = environment["hardware"]
    if hardware["gpu"] is not None:
        machine = hardware["gpu"]["name"]
    else:
        threads = environment["threads"]["torch"]
        machine = f"{hardware['cpu']} ({hardware['cpu_capability']}), {threads} thread{'s' if threads > 1 else ''}"
    return f"{machine}, PyTorch {environment['versions']['torch']}"


def save_figure(figure: Figure, path: Path) -> None:
    """Write the picture as PNG."""
    write_file(path, lambda aside: figure.savefig(aside, dpi=DPI, facecolor="white"))


def grouped_bars(
    axes: Axes,
    groups: Sequence[str],
    series: Mapping[str, Sequence[Summary | None]],
    styles: Mapping[str, Style],
    *,
    value_labels_of: Collection[str] = (),
) -> None:
    """
    Draw a bar for the median of every contestant in every group, and a line over its quartiles.

    Args:
        axes (`Axes`): Where to.
        groups (`Sequence[str]`): The names of the groups, from left to right.
        series (`Mapping[str, Sequence[Summary | None]]`):
            By contestant, one summary a group; `None` where it ran out of memory.
        styles (`Mapping[str, Style]`): The contestants to draw, from left to right in a group.
        value_labels_of (`Collection[str]`): The contestants whose medians are written over their bars.
    """
    width = 0.84 / len(styles)
    for index, (name, style) in enumerate(styles.items()):
        for group, summary in enumerate(series[name]):
            place = group - 0.42 + (index + 0.5) * width
            if summary is None:
                _write_over(axes, "out of memory", place, 0.0, color=style.color, rotation=90)
                continue
            axes.bar(place, summary.median, width, color=style.color, edgecolor="white", linewidth=0.4)
            axes.vlines(place, summary.lower_quartile, summary.upper_quartile, color="#333333", linewidth=0.8)
            if name in value_labels_of:
                _write_over(axes, f"{summary.median:.2f}", place, summary.upper_quartile, fontweight="bold")
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)


def ratio_lines(
    axes: Axes, places: Sequence[float], series: Mapping[str, Sequence[Summary]], styles: Mapping[str, Style]
) -> None:
    """
    Draw a line through the medians of every contestant, on logarithmic axes, and a bar over their quartiles.

    Args:
        axes (`Axes`): Where to.
        places (`Sequence[float]`): Where on the horizontal axis, powers of two.
        series (`Mapping[str, Sequence[Summary]]`): By contestant, one summary a place.
        styles (`Mapping[str, Style]`): The contestants to draw.
    """
    for name, style in styles.items():
        medians = [summary.median for summary in series[name]]
        below = [summary.median - summary.lower_quartile for summary in series[name]]
        above = [summary.upper_quartile - summary.median for summary in series[name]]
        axes.errorbar(
            places, medians, yerr=(below, above), color=style.color, marker=style.marker, markersize=4, linewidth=1.3
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    log_y(axes)


def log_y(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def reference_line(axes: Axes) -> None:
    """Mark the ratio 1, where the reference lies."""
    axes.axhline(1.0, **_REFERENCE_LINE)


def _write_over(axes: Axes, text: str, x: float, y: float, **settings: Any) -> None:
    axes.annotate(
        text, (x, y), xytext=(0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=7.5, **settings
    )
