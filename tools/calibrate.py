"""Hold the planner against published runs (`published`, `memory`), one CSV row per run, or runs of its own (`measure`).

The models of such tables are built from their sizes alone, no weights and no torch: `tools.published_models`. Every
constant that the predictions use is a figure of `slurm/clusters/`; none belongs to a row or a model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_DONE, UserError
from launcher.job.cluster import Cluster
from launcher.plan.layout import Layout
from launcher.plan.memory import rank_memory
from launcher.plan.step_time import step_time
from launcher.units import GIB
from tools.measured import add_measure_options, measured
from tools.measured_runs import DONE, Measured
from tools.published_models import llama_cost, mpt_cost
from tools.published_table import Row, cluster_of, read_table

STRATEGIES = {"FULL_SHARD": "fsdp", "SHARD_GRAD_OP": "zero2"}
"""Of llm-foundry's table: its names are FSDP1's; the second keeps the parameters gathered, as ZeRO-2 does."""
REDUCE_BYTES = {"PURE": 2, "DEFAULT": 4}
"""Bytes of a gradient element on its way between ranks, by FSDP1's mixed precision in Composer."""
STATE_BYTES = {"bf16": 2, "amp_bf16": 4, "amp_fp8": 4}
"""Bytes of an element of parameters, gradients and moments, by Composer's precision: `bf16` trains in bf16 throughout."""
RANKS_PER_NODE = 8
MEASURED = "measured"
"""What a figure of our own runs is called where those of others are `published`."""


@dataclass(frozen=True)
class Case:
    """One published run beside what the planner says of it."""

    line: int
    """Of the CSV file, the header is 1."""
    label: str
    published: float
    """Tokens per second and GPU, or GiB; of our own runs what was measured, GiB or seconds per step."""
    predicted: float
    fits: bool
    """Whether the memory model lets it run, as it did."""
    memory_gib: float
    bound_by: str | None

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def published_case(row: Row, known: Cluster | None = None) -> Case:
    """A row of llm-foundry's table of MPT models; `known` in place of the cluster file of its GPU."""
    strategy = STRATEGIES[row.choice("sharding", tuple(STRATEGIES))]
    precision = row.choice("precision", tuple(STATE_BYTES))
    reduce_bytes = REDUCE_BYTES[row.choice("fsdp_mixed_precision", tuple(REDUCE_BYTES))]
    cluster, cost = known or cluster_of(row), mpt_cost(row)
    nodes, ranks_per_node = _nodes(row)
    layout = Layout(
        strategy=strategy,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        micro_batch_size=row.count("micro_batch_size"),
        accumulation_steps=row.count("grad_accum"),
        seq_len=row.count("seq_len"),
        recompute="full" if row.flag("activation_checkpointing") else "none",
        precision="bf16",
        reduce_bytes=reduce_bytes,
        state_bytes=STATE_BYTES[precision],
        fp8=precision == "amp_fp8",
    )
    if layout.fp8 and cluster.gpu.fp8_speedup is None:
        raise row.problem("precision", f"is in fp8, for which {cluster.gpu.name} has no figure", "leave the row out")
    time = step_time(cost, cluster, layout)
    memory = rank_memory(cost, cluster, layout)
    return Case(
        line=row.line,
        label=f"{_label(row)} {row.text['precision']} {row.text['sharding']}{' recompute' * (layout.recompute == 'full')}",
        published=row.positive("tokens_per_s_per_gpu"),
        predicted=time.tokens_per_second_per_rank,
        fits=memory.fits,
        memory_gib=memory.total_bytes / GIB,
        bound_by=time.bound_by,
    )


def memory_case(row: Row) -> Case:
    """A row of torchtitan's tables of Llama models under FSDP2."""
    row.choice("strategy", ("fsdp2 reshard",))
    cluster, (cost, recompute) = cluster_of(row), llama_cost(row)
    nodes, ranks_per_node = _nodes(row)
    layout = Layout(
        strategy="fsdp",
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        micro_batch_size=row.count("micro_batch_size"),
        accumulation_steps=1,
        seq_len=row.count("seq_len"),
        recompute=recompute,
        precision="bf16",
    )
    memory = rank_memory(cost, cluster, layout)
    gib = memory.total_bytes / GIB
    compiled = " compiled" if row.flag("compile") else ""
    published = row.positive("peak_reserved_gib")
    return Case(row.line, f"{_label(row)}{compiled}", published, gib, memory.fits, gib, None)


def _nodes(row: Row) -> tuple[int, int]:
    """Nodes and ranks of each: eight, as all of these tables have."""
    ranks = row.count("num_gpus")
    if ranks > RANKS_PER_NODE and ranks % RANKS_PER_NODE:
        raise row.problem("num_gpus", f"is not a multiple of {RANKS_PER_NODE}, the GPUs of a node", "mend the row")
    return max(1, ranks // RANKS_PER_NODE), min(ranks, RANKS_PER_NODE)


def _label(row: Row) -> str:
    batch = f"{row.count('micro_batch_size')} x {row.count('seq_len')}"
    return f"{row.text['model']} on {row.count('num_gpus')} {row.text['gpu']}, {batch}"


COMMANDS: dict[str, tuple[Callable[[Row], Case], str, str]] = {
    "published": (
        published_case,
        "tokens/s/GPU",
        "throughput of MPT models, in the columns of llm-foundry's benchmarks",
    ),
    "memory": (memory_case, "GiB", "peak memory of Llama models, in the columns of torchtitan's benchmarks"),
}


def summary(cases: list[Case]) -> dict[str, float]:
    """Fractions; `impossible` counts runs that took place and that the memory model refuses."""
    errors = sorted(abs(case.error) for case in cases)
    middle = len(errors) // 2
    return {
        "cases": len(cases),
        "median_abs_error": (errors[middle] + errors[~middle]) / 2,
        "p90_abs_error": errors[math.ceil(0.9 * len(errors)) - 1],
        "worst_abs_error": errors[-1],
        "impossible": sum(not case.fits for case in cases),
    }


def _summary_json(cases: list[Case]) -> dict[str, Any]:
    return {**summary(cases), "rows": [{**asdict(case), "error": case.error} for case in cases]}


def _shown(cases: list[Case], unit: str, as_json: bool, known: str = "published") -> str:
    total = summary(cases)
    if as_json:
        return json.dumps(_summary_json(cases), indent=1) + "\n"
    width = max(len(case.label) for case in cases)
    lines = [f"{'line':>5}  {'run':<{width}}  {known:>10}  {'predicted':>10}  {'error':>6}   ({unit})"]
    for case in cases:
        refused = "" if case.fits else f"   called impossible: {case.memory_gib:.1f} GiB"
        bound = f"   {case.bound_by}" if case.bound_by else ""
        numbers = f"{case.published:>10.6g}  {case.predicted:>10.5g}  {case.error:>+6.1%}"
        lines.append(f"{case.line:>5}  {case.label:<{width}}  {numbers}{bound}{refused}")
    errors = ", ".join(f"{name} {total[f'{name}_abs_error']:.1%}" for name in ("median", "p90", "worst"))
    return "\n".join([*lines, f"{total['cases']} cases: {errors}; called impossible: {total['impossible']}"]) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.calibrate", description=str(__doc__).partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, _, words) in COMMANDS.items():
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("table", metavar="FILE.csv", type=Path, help="the table, one run per row")
        command.add_argument("--json", action="store_true", help="print one JSON object")
    words = "run a grid of small real jobs here, and compare peak memory and step time with their plans"
    add_measure_options(commands.add_parser("measure", help=words, description=words))
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)
    try:
        if options.command == "measure":
            return _measure(options)
        case_of, unit, _ = COMMANDS[options.command]
        cases = [case_of(row) for row in read_table(options.table)]
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(_shown(cases, unit, options.json))
    return EXIT_DONE


def _measure(options: argparse.Namespace) -> int:
    """Peak memory first, as long as the device accounts for it, then step time."""
    rows = measured(options)
    done = [row for row in rows if row.status == DONE]
    memory = [memory_of(number, row) for number, row in enumerate(done, start=1) if row.peak_reserved_bytes]
    times = [time_of(number, row) for number, row in enumerate(done, start=1)]
    lost = [row for row in rows if row.status != DONE]
    if options.json:
        sys.stdout.write(json.dumps(_measured_json(memory, times, lost), indent=1) + "\n")
        return EXIT_DONE
    if memory:
        sys.stdout.write("peak memory, allocated and reserved by torch, against the plan's total\n")
        sys.stdout.write(_shown(memory, "GiB", False, MEASURED))
    elif times:
        sys.stdout.write("peak memory is not compared: a CPU keeps no account of it\n")
    if times:
        sys.stdout.write(_shown(times, "seconds per step", False, MEASURED))
    for row in lost:
        sys.stdout.write(f"{row.case}: {row.status}: {row.message}\n")
    return EXIT_DONE


def _measured_json(memory: list[Case], times: list[Case], lost: list[Measured]) -> dict[str, Any]:
    """The keys of the other commands are memory's where it was compared, else the step time's."""
    parts = {name: _summary_json(cases) for name, cases in (("memory", memory), ("step_time", times)) if cases}
    for part in parts.values():
        part["rows"] = [{MEASURED: row.pop("published"), **row} for row in part["rows"]]
    first = parts.get("memory") or parts.get("step_time") or {"cases": 0, "impossible": 0, "rows": []}
    return {**first, **parts, "lost": [asdict(row) for row in lost]}


def memory_of(number: int, row: Measured) -> Case:
    """What the allocator reserved, since that is what must be there; the context is outside of both figures."""
    gib = row.predicted_memory_bytes / GIB
    fits = row.predicted_memory_bytes <= row.usable_bytes
    return Case(number, row.case, row.peak_reserved_bytes / GIB, gib, fits, gib, None)


def time_of(number: int, row: Measured) -> Case:
    gib = row.predicted_memory_bytes / GIB
    fits = row.predicted_memory_bytes <= row.usable_bytes
    return Case(number, row.case, row.step_seconds, row.predicted_step_seconds, fits, gib, None)


if __name__ == "__main__":
    raise SystemExit(main())
