"""How long scripts take to render, and nodes to be put in order: `python -m tools.bench launch [--json]`.

1,000 nodes of eight: the batch script against that of two nodes, in the same process; 1,024 hosts of eight from a hostfile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from launcher.emit import BatchJob, render_sbatch
from launcher.emit.hosts import parse_hostfile, rank_table
from launcher.errors import EXIT_DONE
from launcher.job import SlurmSite
from launcher.plan.layout import Layout
from launcher.plan.values import Candidate, Memory, Plan, StepTime
from launcher.units import show_time

REPEATS = 20
LIMIT_SECONDS = 0.2


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 where 1,000 nodes take longer than the promise."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench launch", description=__doc__)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    found = measured()
    sys.stdout.write((json.dumps(found, indent=2) if options.json else _table(found)) + "\n")
    return EXIT_DONE if found["render_1000_nodes_seconds"] < LIMIT_SECONDS else 1


def measured() -> dict[str, Any]:
    job = BatchJob("/home/a/job.yaml", ("seed=1",), "/home/a", "/scratch/a/run", "/home/a/venv/bin/python")
    many, few = (_seconds(partial(render_sbatch, _plan(nodes), SlurmSite(), job)) for nodes in (1000, 2))
    text = "".join(f"node{number:04d} slots=8\n" for number in range(1024))
    return {
        "render_1000_nodes_seconds": many,
        "render_2_nodes_seconds": few,
        "ratio": many / few,
        "rank_table_8192_ranks_seconds": _seconds(lambda: rank_table(parse_hostfile(text, "hosts"))),
    }


def _plan(nodes: int) -> Plan:
    layout = Layout("fsdp", 8 * nodes, 1, 1, 1, 1, "none", "bf16")
    chosen = Candidate(layout, Memory((), 1), 0, StepTime((), 0, 1, 0))
    return Plan(chosen, nodes, 8, "cuda", 8 * nodes, 1024, 10, None, "", (), ())


def _seconds(body: Callable[[], object]) -> float:
    """Median of repeats."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        body()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _table(found: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"render for 1,000 nodes  {show_time(found['render_1000_nodes_seconds'])}",
            f"render for 2 nodes      {show_time(found['render_2_nodes_seconds'])} (x{found['ratio']:.2f})",
            f"order of 8,192 ranks    {show_time(found['rank_table_8192_ranks_seconds'])}",
        ]
    )
