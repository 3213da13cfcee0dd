"""`fleetune doctor`: what this machine has, and a cluster file measured on it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.command.options import AsJson
from launcher.errors import ABSENT, EXIT_DONE, EXIT_USER, UserError

if TYPE_CHECKING:
    from launcher.doctor.environment import Check

RANKS_ON_CPU = 2
"""Enough to measure what ranks share; each holds the libraries in memory."""

Device = Annotated[str, typer.Option(help="What is measured: auto, cuda or cpu.")]
Ranks = Annotated[
    int | None, typer.Option(min=1, help="Ranks that measure together; left out: all accelerators, two on a CPU.")
]
InterNode = Annotated[
    float | None,
    typer.Option(min=1e-3, max=10_000, metavar="GB/S", help="Network of a node per rank, one way: it is not measured."),
]
Price = Annotated[float | None, typer.Option(min=1e-4, max=10_000, help="What an accelerator costs per hour.")]


def doctor(
    write_cluster: Annotated[Path | None, typer.Option(metavar="FILE", help="Measure, and write this file.")] = None,
    as_json: AsJson = False,
    device: Device = "auto",
    ranks: Ranks = None,
    inter_node_gb_per_s: InterNode = None,
    price_per_gpu_hour: Price = None,
    nvme: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder on a local NVMe disk, to measure.")] = None,
) -> None:
    """Say what this machine has and lacks; with --write-cluster, measure it and write a cluster file."""
    if write_cluster is not None:
        _write_cluster(write_cluster, device, ranks, inter_node_gb_per_s, price_per_gpu_hour, nvme)
        return
    from launcher.doctor.environment import examine

    checks = examine(Path.cwd())
    typer.echo(json.dumps([dataclasses.asdict(check) for check in checks], indent=2) if as_json else shown(checks))
    raise typer.Exit(EXIT_USER if any(check.status == "problem" for check in checks) else EXIT_DONE)


def shown(checks: list[Check]) -> str:
    """A line per check, and below it what to do."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<8} {check.name:<{width}}  {check.found}")
        if check.advice:
            lines.append(f"{'':<8} {'':<{width}}  -> {check.advice}")
    counts = ", ".join(
        f"{sum(check.status == word for check in checks)} {word}" for word in ("ok", "warning", "problem")
    )
    return "\n".join([*lines, counts])


def _write_cluster(
    path: Path, device: str, ranks: int | None, inter_node: float | None, price: float | None, nvme: Path | None
) -> None:
    import datetime

    from launcher.doctor.cluster_file import Told, cluster_file
    from launcher.doctor.measure import measure

    _check_paths(path, nvme)
    kind, num_ranks = _who_measures(device, ranks)
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    typer.echo(f"measuring {num_ranks} ranks ({kind}) of {threads} threads, a minute or two", err=True)
    notes = _busy()
    for note in notes:
        typer.echo(f"warning: {note}", err=True)
    folder = path.absolute().parent
    machine = measure(kind, num_ranks, threads, folder, nvme, lambda what: typer.echo(f"  {what}", err=True))
    machine = dataclasses.replace(machine, notes=[*machine.notes, *notes])
    told = Told(datetime.date.today().isoformat(), inter_node, price)
    with path.open("x", encoding="utf-8") as file:
        file.write(cluster_file(machine, told))
    name = path if "/" in str(path) else f"./{path}"
    typer.echo(f"wrote {path}; next: fleetune plan job.yaml --set cluster.name={name}")


def _busy() -> list[str]:
    """Other programs take from every figure; the spread in the sources shows it as well."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    return [f"the machine was busy, load {load:.1f} on {cores} cores: its figures are low"] if load > cores / 2 else []


def _check_paths(path: Path, nvme: Path | None) -> None:
    """Before a minute of measuring, not after it."""
    if path.suffix not in (".yaml", ".yml"):
        raise UserError("--write-cluster", str(path), "is not the name of a YAML file", "end it in .yaml")
    if path.exists():
        raise UserError(str(path), ABSENT, "exists and is not overwritten", "name another file")
    if not path.absolute().parent.is_dir():
        raise UserError(str(path), ABSENT, "lies in a folder that is not there", "make the folder first")
    if nvme is not None and not nvme.is_dir():
        raise UserError("--nvme", str(nvme), "is no folder", "give a folder on the disk to be measured")


def _who_measures(device: str, ranks: int | None) -> tuple[str, int]:
    import torch

    if device not in ("auto", "cuda", "cpu"):
        raise UserError("--device", device, "is no kind of device", "give auto, cuda or cpu")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not seen:
        raise UserError(
            "--device", device, "is not there: torch sees no accelerator", "see fleetune doctor, or give cpu"
        )
    if seen and device != "cpu":
        if ranks is not None and ranks > seen:
            raise UserError("--ranks", ranks, f"is more than the {seen} accelerators of this machine", "give fewer")
        return "cuda", ranks or seen
    return "cpu", ranks or min(RANKS_ON_CPU, len(os.sched_getaffinity(0)))
