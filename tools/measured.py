"""`python -m tools.calibrate measure`: which cases run where, and what may not be asked."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from pathlib import Path

from launcher.doctor.cluster_file import DATA_SHEETS
from launcher.errors import UserError
from launcher.job import load_cluster
from tools.measured_cases import GridCase, cases_of
from tools.measured_runs import Measured, Place, run_cases


def add_measure_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="FILE.csv", type=Path, default=Path("measured.csv"), help="kept after each case"
    )
    parser.add_argument("--work", metavar="DIR", type=Path, help="folder of the runs; left out, beside the file")
    parser.add_argument("--cases", metavar="PATTERN", nargs="+", help="only cases so named: 'gpt-*-512-*'")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a small grid, step time only")
    parser.add_argument("--cluster", metavar="NAME", help="cluster file that predicts; left out, the device's own")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of every case")
    parser.add_argument("--threads", type=int, help="cores of a rank; left out, all cores shared by the ranks")
    parser.add_argument("--list", action="store_true", help="print the cases and run none")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def measured(options: argparse.Namespace) -> list[Measured]:
    """Run what is asked for; [] when the cases are only listed. Raises `UserError` where there is no such device."""
    cases = chosen(cases_of(options.device), options.cases)
    if options.list:
        sys.stdout.write("".join(f"{case.name}\n" for case in cases))
        return []
    cluster = options.cluster or _cluster_of(options.device)
    kind = load_cluster(cluster).gpu.kind
    if kind != options.device:
        raise UserError("--cluster", cluster, f"is of {kind}, not of {options.device}", "name another, or set --device")
    if options.device == "cuda":
        _check_ranks(options.ranks)
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.ranks)
    work = options.work or options.out.with_suffix("")
    cluster = str(Path(cluster).absolute()) if Path(cluster).is_file() else cluster
    place = Place(work.absolute(), cluster, options.ranks, threads)
    return run_cases(cases, options.out, place, lambda text: print(text, file=sys.stderr, flush=True))  # noqa: T201


def chosen(cases: list[GridCase], patterns: list[str] | None) -> list[GridCase]:
    """Those whose name fits one of the patterns, in the grid's order."""
    if patterns is None:
        return cases
    for pattern in patterns:
        if not fnmatch.filter([case.name for case in cases], pattern):
            raise UserError("--cases", pattern, "names none of the cases", "see --list")
    return [case for case in cases if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]


def _cluster_of(device: str) -> str:
    """The file of the GPU that torch sees, told by its name."""
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device", device, "is not there: torch sees no GPU", "give --device cpu for a small grid")
    name = torch.cuda.get_device_name(0)
    if name not in DATA_SHEETS:
        way_out = "measure it with `fleetune doctor --write-cluster here.yaml` and give --cluster ./here.yaml"
        raise UserError("--cluster", name, "is a device that no cluster file is of", way_out)
    return DATA_SHEETS[name]


def _check_ranks(ranks: int) -> None:
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if ranks > seen:
        raise UserError(
            "--ranks", ranks, f"is more than the {seen} GPUs that torch sees", "give fewer, or --device cpu"
        )
