"""`fleetune launch`: from a plan to running ranks, here, on machines by name, through Slurm, or as a manifest for Kubernetes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from launcher.command.options import Overrides, SpecPath, Via, ViaOption
from launcher.command.plan import made_plan
from launcher.command.stages import launch_stages, refuse_elsewhere
from launcher.errors import SpecError

ArrayOption = Annotated[
    list[str],
    typer.Option(
        "--array",
        metavar="KEY=V,V",
        help="slurm: one task of an array per value, each in a folder of its own: seed=1,2,3; given again, every combination.",
    ),
]


def launch(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print exactly what would run, and run nothing.")] = False,
    via: ViaOption = Via.auto,
    hosts: Annotated[str | None, typer.Option(metavar="A,B", help="Machines to start on over ssh, in order.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="The same as a file: `name slots=8` per line.")] = None,
    include: Annotated[str | None, typer.Option(help="Of these machines only some: n1@n2:0,2.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Of these machines without some: n3.")] = None,
    array: ArrayOption = [],  # noqa: B006
    chain: Annotated[
        Path | None, typer.Option("--chain", help="slurm: then convert into this folder, then score it; three jobs.")
    ] = None,
    dependency: Annotated[str | None, typer.Option(help="slurm: passed to sbatch, such as afterok:123.")] = None,
    export: Annotated[
        list[str],
        typer.Option("--export", metavar="NAME", help="A further environment variable that goes to the ranks."),
    ] = [],  # noqa: B006
) -> None:
    """Plan, then start the ranks: here, on other machines, or as a Slurm job; stages one by one."""
    raw, names = _stages(spec_path, overrides)
    if names:
        if dry_run or via is not Via.auto:
            raise refuse_elsewhere(names)
        raise typer.Exit(launch_stages(spec_path, raw, names, overrides))
    words = {"hosts": hosts.split(",") if hosts else None, "hostfile": hostfile and str(hostfile)}
    words |= {"include": include, "exclude": exclude, "environment": export or None}
    told = [
        f"launch.{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix('...').strip()}"
        for key, value in words.items()
        if value
    ]
    overrides = [*overrides, *told]
    spec, made = made_plan(spec_path, overrides)
    way = Via(spec.launch.via) if via is Via.auto else via
    if way is not Via.slurm and (array or chain or dependency):
        option = "--array" if array else "--chain" if chain else "--dependency"
        raise SpecError(option, way.value, "is of no use to this launcher", "add --via slurm")
    if way is Via.slurm:
        from launcher.command.launch_slurm import launch_by_slurm

        return launch_by_slurm(spec, made, spec_path, overrides, array, chain, dependency, dry_run)
    if way is Via.kubernetes:
        from launcher.command.launch_kubernetes import show_manifest

        return show_manifest(spec, made, spec_path, overrides)
    from launcher.command.launch_here import launch_here
    from launcher.command.launch_hosts import launch_on_hosts
    from launcher.emit.hosts import hosts_of

    machines = hosts_of(spec.launch, spec.cluster.gpus_per_node)
    if machines or made.nodes > 1:
        return launch_on_hosts(spec, machines, spec_path, overrides, way, dry_run)
    return launch_here(spec, made, spec_path, overrides, way, dry_run)


def _stages(spec_path: Path, overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The spec as written, and its stages where none of them is chosen."""
    from launcher.job.load import apply_override, read_yaml
    from launcher.job.stages import STAGE, stage_names

    raw = read_yaml(spec_path, what="job spec")
    for override in overrides:
        apply_override(raw, override)
    return raw, [] if STAGE in raw else stage_names(raw)
