"""`fleetune plan --sweep nodes=1,2,4,8`: one plan for every combination of swept values, as a table, JSON or a picture."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.errors import SpecError, UserError
from launcher.units import show_bytes, show_count, show_time

if TYPE_CHECKING:
    from launcher.plan import Plan

KEYS = {
    "nodes": "cluster.nodes",
    "gpus_per_node": "cluster.gpus_per_node",
    "gpu": "cluster.name",
    "cluster": "cluster.name",
    "micro_batch_size": "parallel.micro_batch_size",
    "strategy": "parallel.strategy",
    "seq_len": "training.seq_len",
    "global_batch_size": "training.global_batch_size",
}
"""Short names; any other key is given in full, `parallel.recompute=none,full`."""
MOST_ROWS = 1000


@dataclass(frozen=True)
class Axis:
    """One swept key with its values, as they were written."""

    name: str
    values: tuple[str, ...]

    @property
    def key(self) -> str:
        """Dotted path in the spec."""
        return KEYS.get(self.name, self.name)


@dataclass(frozen=True)
class Row:
    """One combination: its plan, or why there is none."""

    values: dict[str, str]
    plan: Plan | None
    problem: str | None


def parse_axes(sweeps: list[str]) -> list[Axis]:
    """`nodes=1,2,4` and so on. Raises `SpecError` for what is of another form."""
    axes = []
    for sweep in sweeps:
        name, equals, values = sweep.partition("=")
        written = tuple(value.strip() for value in values.split(","))
        if not equals or not all(written) or not (name in KEYS or "." in name):
            known = ", ".join(KEYS)
            way_out = f"write e.g. --sweep nodes=1,2,4,8; keys: {known}, or a dotted one such as parallel.recompute"
            raise SpecError("--sweep", sweep, "is not of the form key=value,value", way_out)
        axes.append(Axis(name, written))
    twice = sorted({axis.key for axis in axes if sum(other.key == axis.key for other in axes) > 1})
    if twice:
        raise SpecError("--sweep", twice[0], "is swept twice", "give all its values in one --sweep")
    num_rows = 1
    for axis in axes:
        num_rows *= len(axis.values)
    if num_rows > MOST_ROWS:
        raise SpecError("--sweep", f"{num_rows} plans", f"are more than {MOST_ROWS}", "give fewer values")
    return axes


def sweep_rows(axes: list[Axis], plan_of: Callable[[list[str]], Plan]) -> list[Row]:
    """A plan for each combination, the last axis turning fastest. plan_of: from overrides, raising `UserError`."""
    rows = []
    for values in itertools.product(*(axis.values for axis in axes)):
        named = {axis.name: value for axis, value in zip(axes, values, strict=True)}
        overrides = [f"{axis.key}={value}" for axis, value in zip(axes, values, strict=True)]
        try:
            rows.append(Row(named, plan_of(overrides), None))
        except UserError as error:
            rows.append(Row(named, None, _without_way_out(error)))
    return rows


def _without_way_out(error: UserError) -> str:
    """The first problem: a table has no room for more."""
    found, _, _ = str(error.problems[0]).rpartition(f"; {error.problems[0].way_out}")
    return found


def figures(plan: Plan) -> dict[str, Any]:
    """What a row says of its plan, numbers in base units; None where it is not known."""
    chosen = plan.chosen
    return {
        "digest": plan.digest(),
        "layout": chosen.label,
        "num_ranks": plan.num_ranks,
        "memory_bytes": chosen.memory.total_bytes,
        "usable_bytes": chosen.memory.usable_bytes,
        "step_seconds": chosen.step_time.seconds,
        "tokens_per_second": chosen.step_time.tokens_per_second,
        "tokens_per_second_per_rank": chosen.step_time.tokens_per_second_per_rank,
        "mfu": chosen.step_time.mfu,
        "bound_by": chosen.step_time.bound_by,
        "job_seconds": plan.job_seconds,
        "gpu_hours": plan.gpu_hours,
        "price": plan.price,
        "currency": plan.currency,
    }


def sweep_json(rows: list[Row]) -> dict[str, Any]:
    """`{"rows": [{"values", "fits", "problem", ...}]}`; a row without a plan has none of its figures."""
    return {
        "rows": [
            {
                "values": row.values,
                "fits": row.plan is not None,
                "problem": row.problem,
                **(figures(row.plan) if row.plan else {}),
            }
            for row in rows
        ]
    }


def sweep_table(rows: list[Row]) -> str:
    """Columns of plain text; a row that has no plan says why."""
    names = list(rows[0].values)
    with_job = any(row.plan and row.plan.job_seconds is not None for row in rows)
    head = [*names, "ranks", "memory/rank", "step", "tokens/s", "per rank", "MFU"]
    head += ["job", "GPU-hours", "price"] if with_job else []
    cells = [[*head, "layout"], *([*row.values.values(), *_cells(row.plan, with_job)] for row in rows if row.plan)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    widths[: len(names)] = [max(len(name), *(len(row.values[name]) for row in rows)) for name in names]
    lines = [_line(cells[0], widths)]
    for row in rows:
        values = list(row.values.values())
        if row.plan:
            lines.append(_line([*values, *_cells(row.plan, with_job)], widths))
        else:
            lines.append(f"{_line(values, widths)}  {row.problem}")
    return "\n".join(lines)


def _cells(plan: Plan, with_job: bool) -> list[str]:
    chosen, time = plan.chosen, plan.chosen.step_time
    memory = f"{show_bytes(chosen.memory.total_bytes)} {_share(plan):.0%}"
    cells = [str(plan.num_ranks), memory, show_time(time.seconds), _rate(time.tokens_per_second)]
    cells += [_rate(time.tokens_per_second_per_rank), f"{time.mfu:.1%}"]
    if with_job:
        job = "" if plan.job_seconds is None else show_time(plan.job_seconds)
        hours = "" if plan.gpu_hours is None else f"{plan.gpu_hours:,.4g}"
        cells += [job, hours, _price(plan)]
    return [*cells, chosen.label]


def _price(plan: Plan) -> str:
    return "" if plan.price is None else f"{plan.price:,.0f} {plan.currency}"


def _share(plan: Plan) -> float:
    return plan.chosen.memory.total_bytes / (plan.chosen.memory.usable_bytes or float("inf"))


def _rate(per_second: float) -> str:
    return show_count(float(f"{per_second:.3g}"))


def _line(cells: list[str], widths: list[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=False)) + "".join(
        f"  {cell}" for cell in cells[len(widths) :]
    )
