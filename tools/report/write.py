"""The page and the pictures: what is said of runs, as HTML that fetches nothing and as PNGs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from launcher.picture import page, svg, write_png
from launcher.units import show_bytes, show_count, show_time
from tools.report import figures
from tools.report.record import RunRecord

_HERE = Path(__file__).parent

PICTURES: tuple[tuple[str, str, figures.Drawing], ...] = (
    ("loss", "Loss", figures.loss),
    ("scores", "Scores on held-out samples", figures.scores),
    ("learning-rate", "Learning rate", figures.learning_rate),
    ("gradient-norm", "Gradient norm", figures.gradient_norm),
    ("throughput", "Throughput", figures.throughput),
    ("memory", "Memory: planned and measured", figures.memory),
    ("step-time", "Step time: planned and measured", figures.step_time),
)
"""(file name, heading, drawing)."""


def write_pngs(runs: Sequence[RunRecord], folder: Path) -> list[Path]:
    """One file for each picture that there is something to show in."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, _, draw in PICTURES:
        if (figure := draw(runs)) is not None:
            write_png(figure, folder / f"{name}.png")
            written.append(folder / f"{name}.png")
    return written


def report_html(runs: Sequence[RunRecord], now: datetime) -> str:
    """The whole page; equal runs at an equal time give the equal text."""
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=False)
    environment.filters |= {"bytes": show_bytes, "time": show_time, "count": lambda number: f"{number:,}"}
    names = ", ".join(run.name for run in runs)
    drawn = [(heading, _note(name, runs), draw(runs)) for name, heading, draw in PICTURES]
    body = environment.from_string((_HERE / "body.html").read_text(encoding="utf-8")).render(
        title=f"Run {names}" if len(runs) == 1 else f"Runs {names}",
        written=f"written by fleetune, {now:%Y-%m-%d %H:%M}",
        runs=runs,
        summary=_summary(runs),
        scores=list(_score_rows(runs)),
        pictures=[(heading, note, Markup(svg(figure))) for heading, note, figure in drawn if figure is not None],
        differences=differences(runs),
        mixture=lambda run: ((run.spec or {}).get("data") or {}).get("mixture") or [],
        memory_note=_memory_note,
        time_note=_time_note,
        spec_text=_spec_text,
        versions_text=lambda run: ", ".join(f"{name} {number}" for name, number in sorted(run.versions.items())),
    )
    return page(names, body, (_HERE / "body.css").read_text(encoding="utf-8"))


def _note(name: str, runs: Sequence[RunRecord]) -> str:
    if name == "memory" and not any(run.column("peak_reserved_bytes")[0] for run in runs):
        return "Nothing was measured: only an accelerator's allocator says how much it holds."
    return ""


def _summary(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Rows of (name, a cell for each run); a row that says nothing of any run is left out."""
    rows: list[tuple[str, Callable[[RunRecord], str]]] = [
        ("state", lambda run: run.ended),
        ("model", lambda run: _model(run)),
        ("task", lambda run: str(((run.spec or {}).get("task") or {}).get("name", ""))),
        ("method", lambda run: str(((run.spec or {}).get("method") or {}).get("name", ""))),
        ("layout", _layout),
        ("steps", lambda run: f"{run.last_step:,}" + (f" of {run.num_steps:,}" if run.num_steps else "")),
        ("last loss", lambda run: _last(run, "loss", "steps")),
        ("held-out loss", lambda run: _last(run, "loss", "evaluations")),
        ("tokens/s", lambda run: _median(run, "tokens_per_second", show_count)),
        ("step time", lambda run: _median(run, "step_seconds", show_time)),
        ("planned", lambda run: f"{show_time(run.plan['step_time']['seconds'])} per step"),
        ("time recorded", lambda run: show_time(sum(run.column("seconds")[1])) if run.steps else ""),
        ("lines unread", lambda run: f"{run.num_bad_lines} of metrics.jsonl" if run.num_bad_lines else ""),
    ]
    made = [(name, [cell(run) for run in runs]) for name, cell in rows]
    return [(name, cells) for name, cells in made if any(cells)]


def _model(run: RunRecord) -> str:
    model = (run.spec or {}).get("model") or {}
    source = model.get("from_config")
    kind = source.get("model_type") if isinstance(source, dict) else source
    return str(model.get("path") or (f"{kind}, random weights" if kind else ""))


def _layout(run: RunRecord) -> str:
    plan = run.plan["plan"]
    batch = f"{plan['micro_batch_size']} x {plan['accumulation_steps']}"
    ranks = plan["nodes"] * plan["gpus_per_node"]
    return (
        f"{plan['strategy']} on {ranks} ranks, {plan['precision']}, micro-batch {batch}, recompute {plan['recompute']}"
    )


def _last(run: RunRecord, key: str, kind: str) -> str:
    values = run.column(key, kind)[1]
    return f"{values[-1]:.4f}" if values else ""


def _median(run: RunRecord, key: str, show: Callable[[float], str]) -> str:
    values = sorted(run.column(key)[1])
    return show(values[len(values) // 2]) if values else ""


def _score_rows(runs: Sequence[RunRecord]) -> Iterator[tuple[str, ...]]:
    """What `fleetune eval` wrote, with its intervals; where it was not run, the run's own last scores."""
    for run in runs:
        for row in run.scores:
            interval = f"{row['low']:.4g} to {row['high']:.4g}" if row.get("low") is not None else ""
            value = "" if row.get("value") is None else f"{row['value']:.4g}"
            yield run.name, str(row["metric"]), value, interval, str(row.get("n", "")), row["file"]
        if not run.scores and run.evaluations:
            last = run.evaluations[-1]
            for name, value in last.items():
                if isinstance(value, float):
                    yield run.name, name, f"{value:.4g}", "", "", f"the run itself, step {last['step']}"


def _memory_note(run: RunRecord) -> str:
    usable, measured = run.plan["memory"]["usable_bytes"], run.column("peak_reserved_bytes")[1]
    said = [f"of {show_bytes(usable)} usable"] if usable else []
    if measured:
        off = max(measured) / run.plan["memory"]["total_bytes"] - 1
        said.append(f"measured {show_bytes(max(measured))} ({off:+.0%})")
    return "; ".join(said)


def _time_note(run: RunRecord) -> str:
    planned, values = run.plan["step_time"]["seconds"], sorted(run.column("step_seconds")[1])
    if not values:
        return ""
    middle = values[len(values) // 2]
    return f"measured {show_time(middle)} in the median ({middle / planned - 1:+.0%})"


def _spec_text(run: RunRecord) -> str:
    if run.spec is None:
        return "not known before the first checkpoint"
    return yaml.safe_dump(run.spec, sort_keys=False, allow_unicode=True)


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """(dotted key, value in each run) of the keys that are not the same in all; the folders always differ."""
    flat = [dict(_flat(run.spec or {})) for run in runs]
    keys = dict.fromkeys(key for spec in flat for key in spec)
    rows = [(key, [str(spec.get(key, "")) for spec in flat]) for key in keys if key != "output_dir"]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(value: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{path}{key}.")
        else:
            yield f"{path}{key}", inner
