"""A sweep as a picture: throughput above, memory below, against the first swept key; one line for each of the rest.

PNG, or a page of HTML: the same picture over the table.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.command.sweep import Row, sweep_table
from launcher.errors import UserError
from launcher.picture import GREY, LINES, check_matplotlib, drawing, grid, page, svg, write_png
from launcher.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".html")


def check_plot(path: Path) -> None:
    """Before anything is planned. Raises `UserError` for another format, or without matplotlib."""
    if path.suffix.lower() not in FORMATS:
        raise UserError("--plot", str(path), f"ends in neither {' nor '.join(FORMATS)}", "name a file that does")
    check_matplotlib("--plot")


def write_plot(path: Path, rows: list[Row], title: str) -> None:
    """Draw `rows` into a `.png` or `.html` file."""
    figure = _figure(rows, title)
    if path.suffix.lower() == ".png":
        write_png(figure, path)
    else:
        path.write_text(_page(figure, rows, title), encoding="utf-8")


def _figure(rows: list[Row], title: str) -> Figure:
    """Two panels over one axis, tall rather than wide: a phone shows it whole."""
    with drawing(6.4, 7.6) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        for axes in (above, below):
            grid(axes)
        _draw(above, below, rows)
        figure.suptitle(title, fontsize=12)
    return figure


def _draw(above: Axes, below: Axes, rows: list[Row]) -> None:
    swept, *others = rows[0].values
    places = list(dict.fromkeys(row.values[swept] for row in rows))
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(", ".join(f"{name} {row.values[name]}" for name in others), []).append(row)
    for number, (name, members) in enumerate(lines.items()):
        color = LINES[number % len(LINES)]
        _line(above, members, swept, places, color, name, lambda plan: plan.chosen.step_time.tokens_per_second)
        _line(below, members, swept, places, color, name, lambda plan: plan.chosen.memory.total_bytes / GIB)
    _usable(below, list(lines.values()), places, swept)
    _missing(below, rows, places, swept)
    above.set_ylabel("tokens/s")
    above.set_ylim(bottom=0)
    below.set_ylabel("GiB per rank at the peak")
    below.set_ylim(bottom=0)
    below.set_xticks(range(len(places)), places, rotation=30 if max(map(len, places)) > 6 else 0)
    below.set_xlabel(swept)
    if others or below.get_legend_handles_labels()[1]:
        below.legend(frameon=False, fontsize=9)


def _line(axes: Axes, rows: list[Row], swept: str, places: list[str], color: str, name: str, value: Any) -> None:
    """A gap where a row has no plan."""
    heights = dict.fromkeys(places, float("nan"))
    heights |= {row.values[swept]: value(row.plan) for row in rows if row.plan is not None}
    axes.plot(range(len(places)), list(heights.values()), marker="o", color=color, label=name or None)


def _usable(axes: Axes, lines: list[list[Row]], places: list[str], swept: str) -> None:
    """What a rank may use, dashed: once where all have the same, else for each line in its colour."""
    limits = []
    for members in lines:
        usable = {row.values[swept]: (row.plan.chosen.memory.usable_bytes or 0) / GIB for row in members if row.plan}
        limits.append([usable.get(place, float("nan")) for place in places])
    known = {height for heights in limits for height in heights if height == height}  # a gap equals nothing
    if len(known) == 1:
        axes.axhline(known.pop(), linestyle="--", linewidth=1, color=GREY, label="usable")
        return
    for number, heights in enumerate(limits):
        color = LINES[number % len(LINES)] if len(limits) > 1 else GREY
        axes.plot(range(len(places)), heights, linestyle="--", linewidth=1, color=color)
    axes.plot([], [], linestyle="--", linewidth=1, color=GREY, label="usable")


def _missing(axes: Axes, rows: list[Row], places: list[str], swept: str) -> None:
    """A cross on the axis where no row has a plan."""
    without = [at for at, place in enumerate(places) if not any(r.plan for r in rows if r.values[swept] == place)]
    if without:
        axes.plot(without, [0] * len(without), "x", color="#d62728", clip_on=False, label="no plan", zorder=5)


def _page(figure: Figure, rows: list[Row], title: str) -> str:
    return page(title, f"{svg(figure)}\n<pre>{html.escape(sweep_table(rows))}</pre>")
