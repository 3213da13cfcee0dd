"""The pictures of a report, each a function of the runs; None where no run has what it would show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from launcher.picture import GREY, LINES, drawing, grid
from launcher.units import GIB, MIB
from tools.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 5.6
"""Narrow, so that letters stay readable where a phone shows the whole width."""
Drawing = Callable[[Sequence[RunRecord]], "Figure | None"]

MOST_POINTS = 1200
"""Of one line: more than a screen has columns, few enough for a page to open at once."""
HALF_LIFE_SHARE = 0.02
"""Of the records: how far back a smoothed value looks until a record weighs half."""
LOSS_SCALE = 20
"""Above this ratio of the largest to the smallest loss the axis is logarithmic."""


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean, free of its start's bias (as Adam's moments are: Kingma and Ba 2015, section 3)."""
    keep = 0.5 ** (1 / max(1.0, HALF_LIFE_SHARE * len(values)))
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most about MOST_POINTS: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(values) <= MOST_POINTS:
        return list(steps), list(values)
    stretch = -(-len(values) // (MOST_POINTS // 2))
    kept: list[int] = []
    for start in range(0, len(values), stretch):
        places = range(start, min(start + stretch, len(values)))
        kept += sorted({min(places, key=values.__getitem__), max(places, key=values.__getitem__)})
    return [steps[place] for place in kept], [values[place] for place in kept]


def loss(runs: Sequence[RunRecord]) -> Figure | None:
    """Every record faint, the smoothed line over it, held-out losses as dots."""
    if not any(run.steps for run in runs):
        return None
    with drawing(WIDTH_INCHES, 3.8) as figure:
        axes = figure.subplots()
        every: list[float] = []
        for run, color in zip(runs, _colors(runs), strict=True):
            steps, values = run.column("loss")
            every += [value for value in values if value > 0]
            axes.plot(*thinned(steps, values), color=color, alpha=0.3, linewidth=1)
            axes.plot(*thinned(steps, smoothed(values)), color=color, linewidth=1.8, label=_label(runs, run, "trained"))
            at, held = run.column("loss", "evaluations")
            if held:
                label = _label(runs, run, "held out") if len(runs) == 1 else f"{run.name}, held out"
                axes.plot(at, held, "o", color=color, markeredgecolor=GREY, markersize=6, label=label)
        if every and max(every) > LOSS_SCALE * min(every):
            axes.set_yscale("log")
        _finish(axes, "loss per target (nats)", "step", with_zero=False)
    return figure


def _series(key: str, label: str) -> Drawing:
    def draw(runs: Sequence[RunRecord]) -> Figure | None:
        if not any(run.column(key)[0] for run in runs):
            return None
        with drawing(WIDTH_INCHES, 2.6) as figure:
            axes = figure.subplots()
            for run, color in zip(runs, _colors(runs), strict=True):
                steps, values = run.column(key)
                axes.plot(*thinned(steps, values), color=color, label=run.name)
            _finish(axes, label, "step", with_zero=True, with_legend=len(runs) > 1)
        return figure

    return draw


learning_rate = _series("lr", "learning rate")
gradient_norm = _series("grad_norm", "gradient norm before clipping")
throughput = _series("tokens_per_second", "tokens/s")


def scores(runs: Sequence[RunRecord]) -> Figure | None:
    """What was measured on held-out samples on the way: a panel for each metric but the loss, which has its own."""
    names = dict.fromkeys(name for run in runs for r in run.evaluations for name in r if _is_metric(name, r[name]))
    shown = [name for name in names if any(len(run.column(name, "evaluations")[0]) > 1 for run in runs)][:6]
    if not shown:
        return None
    with drawing(WIDTH_INCHES, 1.9 * len(shown)) as figure:
        panels = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
        for axes, name in zip(panels, shown, strict=True):
            for run, color in zip(runs, _colors(runs), strict=True):
                axes.plot(*run.column(name, "evaluations"), marker="o", color=color, label=run.name)
            _finish(axes, name, "step" if axes is panels[-1] else "", with_zero=False, with_legend=len(runs) > 1)
    return figure


def _is_metric(name: str, value: object) -> bool:
    return isinstance(value, float) and name not in ("step", "loss")


def memory(runs: Sequence[RunRecord]) -> Figure | None:
    """A bar for each plan, item on item, and beside it what the largest rank's allocator held."""
    bars: list[tuple[str, dict[str, float]]] = []
    for run in runs:
        bars.append((f"{run.name}: planned", {item["name"]: item["num_bytes"] for item in run.plan["memory"]["items"]}))
        if measured := run.column("peak_reserved_bytes")[1]:
            bars.append((f"{run.name}: measured", {"reserved at the peak": max(measured)}))
    unit, name = (GIB, "GiB") if max(sum(items.values()) for _, items in bars) >= GIB else (MIB, "MiB")
    in_unit = [(bar, {item: size / unit for item, size in items.items()}) for bar, items in bars]
    return _stacked(in_unit, f"{name} per rank at the peak")


def step_time(runs: Sequence[RunRecord]) -> Figure | None:
    """A bar for each plan, item on item, and beside it the median of the measured steps."""
    bars: list[tuple[str, dict[str, float]]] = []
    for run in runs:
        bars.append(
            (f"{run.name}: planned", {item["name"]: item["seconds"] for item in run.plan["step_time"]["items"]})
        )
        if measured := run.column("step_seconds")[1]:
            wait = median_wait_seconds(run)
            middle = sorted(measured)[len(measured) // 2]
            bars.append((f"{run.name}: measured", {"step": middle - wait, "waiting for data": wait}))
    return _stacked(bars, "seconds per optimiser step")


def median_wait_seconds(run: RunRecord) -> float:
    """Waiting for data in a step, the median over the records."""
    records = [r for r in run.steps if r.get("seconds") and r.get("step_seconds") and "data_wait_seconds" in r]
    waits = sorted(r["data_wait_seconds"] * r["step_seconds"] / r["seconds"] for r in records)
    return float(waits[len(waits) // 2]) if waits else 0.0


def _stacked(bars: list[tuple[str, dict[str, float]]], label: str) -> Figure | None:
    """Items in one colour wherever they stand; what is under 1% of its bar shares the last colour."""
    largest = {name for _, items in bars for name, size in items.items() if size >= 0.01 * sum(items.values())}
    names = [name for name in dict.fromkeys(n for _, items in bars for n in items) if name in largest]
    with drawing(WIDTH_INCHES, 0.55 * len(bars) + 0.26 * (len(names) // 2 + 1) + 0.9) as figure:
        axes = figure.subplots()
        for place, (_, items) in enumerate(bars):
            left = 0.0
            for name in [*names, *(other for other in items if other not in largest)]:
                width = items.get(name, 0.0)
                color = LINES[names.index(name) % len(LINES)] if name in largest else GREY
                style = "//" if name in largest and names.index(name) >= len(LINES) else None
                axes.barh(place, width, left=left, color=color, hatch=style, height=0.6, edgecolor="none")
                left += width
        for number, name in enumerate(names):
            style = "//" if number >= len(LINES) else None
            axes.barh(0, 0, color=LINES[number % len(LINES)], hatch=style, label=name)
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.invert_yaxis()
        axes.set_xlabel(label)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _colors(runs: Sequence[RunRecord]) -> list[str]:
    return [LINES[number % len(LINES)] for number in range(len(runs))]


def _label(runs: Sequence[RunRecord], run: RunRecord, alone: str) -> str:
    return alone if len(runs) == 1 else run.name


def _finish(axes: Axes, above: str, below: str, *, with_zero: bool, with_legend: bool = True) -> None:
    grid(axes)
    axes.set_title(above, fontsize=11, loc="left")
    axes.set_xlabel(below)
    if with_zero:
        axes.set_ylim(bottom=0)
    if with_legend:
        axes.legend(frameon=False, fontsize=9)
