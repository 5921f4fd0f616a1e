# SPDX-License-Identifier: Apache-2.0
"""Draws `spp.svg`, and `spp-narrow.svg` for phones, with the standard library alone: `python docs/pictures/spp.py`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path


ROWS, INPUTS, BLOCKS = 6, 8, 2
CELL, TOP, LEFT = 18, 66, 24
INK, PAPER, PRUNED, LINE = "#22304a", "#ffffff", "#eef1f6", "#c9d1de"
BLUE, ORANGE, GREEN = (57, 106, 177), (218, 124, 48), (62, 150, 81)

Color = Callable[[int, int], str]


def shade(color: tuple[int, int, int], strength: float) -> str:
    """A color, from nearly white at 0 to itself at 1."""
    share = 0.18 + 0.82 * strength
    return "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in color)


def text(x: float, y: float, words: str, size: int = 13, weight: str = "normal", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">{words}</text>'


def grid(x: float, rows: int, columns: int, color: Color) -> str:
    """A matrix of small squares."""
    return "".join(
        f'<rect x="{x + CELL * column:g}" y="{TOP + CELL * row}" width="{CELL - 2}" height="{CELL - 2}" rx="3" '
        f'fill="{color(row, column)}"/>'
        for row in range(rows)
        for column in range(columns)
    )


def draw(narrow: bool = False) -> str:
    """The picture of W' = W ⊙ (1 + s · P(A) ⊙ B), in one line or in three."""
    numbers = random.Random(4)
    weight = [[numbers.random() for _ in range(INPUTS)] for _ in range(ROWS)]
    kept = [
        [group * 4 + place for group in range(INPUTS // 4) for place in sorted(numbers.sample(range(4), 2))]
        for _ in range(ROWS)
    ]
    a = [[numbers.random() for _ in range(INPUTS)] for _ in range(BLOCKS)]
    b = [numbers.random() for _ in range(ROWS)]

    def block(row: int) -> int:
        return row * BLOCKS // ROWS

    def if_kept(row: int, column: int, color: str) -> str:
        return color if column in kept[row] else PRUNED

    wide, x = CELL * INPUTS, LEFT
    lines: list[list[str]] = [[]]
    widths: list[float] = []

    def add(columns: int, title: str, note: str, color: Color) -> None:
        nonlocal x
        width = CELL * columns
        center = x + width / 2 - 1
        lines[-1] += [
            grid(x, ROWS, columns, color),
            text(center, TOP - 18, title, 16, "bold"),
            text(center, TOP + CELL * ROWS + 20, note),
        ]
        x += width

    def sign(words: str, width: float) -> None:
        nonlocal x
        lines[-1].append(text(x + width / 2, TOP + CELL * ROWS / 2 + 6, words, 17))
        x += width

    def end_line() -> None:
        nonlocal x
        widths.append(x)
        x = LEFT
        lines.append([])

    add(INPUTS, "W", "frozen, pruned 2:4", lambda i, j: if_kept(i, j, shade(BLUE, weight[i][j])))
    sign("⊙ ( 1 + s ·", 118)
    if narrow:
        end_line()
    # the border between the two row blocks
    border = f"M{x - 5:g} {TOP + CELL * ROWS / BLOCKS - 1:g}h{wide + 8:g}"
    lines[-1].append(f'<path d="{border}" stroke="{INK}" stroke-width="1.5" stroke-dasharray="4 3"/>')
    add(INPUTS, "P(A)", "r rows, repeated", lambda i, j: shade(ORANGE, a[block(i)][j]))
    sign("⊙", 54)
    add(1, "B", "a column", lambda i, j: shade(ORANGE, b[i]))
    sign(")  =", 70)
    if narrow:
        end_line()
    add(
        INPUTS,
        "W′",
        "the same places are zero",
        lambda i, j: if_kept(i, j, shade(GREEN, (weight[i][j] + a[block(i)][j] * b[i]) / 2)),
    )
    widths.append(x)
    width, line_height = max(widths) + LEFT, TOP + CELL * ROWS + 30
    height = line_height * len(lines) + (58 if narrow else 32)
    start = LEFT if narrow else (width - 466) / 2
    lines.append([])
    for at, color, words in (
        (0, PRUNED, "pruned: zero, whatever A and B are"),
        (284, shade(ORANGE, 0.8), "trained: r·n + m numbers"),
    ):
        left, y = (start, 26 * (at > 0)) if narrow else (start + at, 0)
        outline = f' stroke="{LINE}"' if color == PRUNED else ""
        lines[-1].append(f'<rect x="{left:g}" y="{y:g}" width="14" height="14" rx="3" fill="{color}"{outline}/>')
        lines[-1].append(text(left + 22, y + 12, words, anchor="start"))
    parts = [
        f'<g transform="translate(0 {line_height * index})">\n' + "\n".join(line) + "\n</g>"
        for index, line in enumerate(lines)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" '
        f'font-family="system-ui, sans-serif" fill="{INK}" role="img">\n'
        "<title>SPP multiplies every weight that is left by a factor of its own</title>\n"
        f'<rect x="1" y="1" width="{width - 2:g}" height="{height - 2}" rx="10" fill="{PAPER}" stroke="{LINE}"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    folder = Path(__file__).parent
    (folder / "spp.svg").write_text(draw(), encoding="utf-8")
    (folder / "spp-narrow.svg").write_text(draw(narrow=True), encoding="utf-8")
