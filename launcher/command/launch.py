"""`fleetune launch`: from a plan to running ranks, here or through Slurm."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.command.options import Overrides, SpecPath, Via, ViaOption
from launcher.command.plan import batch_script, emitted, made_plan
from launcher.command.stages import launch_stages, refuse_elsewhere
from launcher.errors import ABSENT, EXIT_DONE, EXIT_OURS, UserError

if TYPE_CHECKING:
    from launcher.emit import Via as Starter
    from launcher.job import JobSpec
    from launcher.plan import Plan


def launch(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print exactly what would run, and run nothing.")] = False,
    via: ViaOption = Via.auto,
) -> None:
    """Plan, then start the ranks: here with the launcher that fits the plan, or as a Slurm job; stages one by one."""
    raw, names = _stages(spec_path, overrides)
    if names:
        if dry_run or via is not Via.auto:
            raise refuse_elsewhere(names)
        raise typer.Exit(launch_stages(spec_path, raw, names, overrides))
    spec, made = made_plan(spec_path, overrides)
    if via is Via.slurm:
        _launch_by_slurm(spec, batch_script(spec, made, spec_path, overrides), dry_run)
    else:
        _launch_here(spec, made, spec_path, overrides, via, dry_run)


def _stages(spec_path: Path, overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The spec as written, and its stages where none of them is chosen."""
    from launcher.job.load import apply_override, read_yaml
    from launcher.job.stages import STAGE, stage_names

    raw = read_yaml(spec_path, what="job spec")
    for override in overrides:
        apply_override(raw, override)
    return raw, [] if STAGE in raw else stage_names(raw)


def _launch_here(spec: JobSpec, made: Plan, spec_path: Path, overrides: list[str], via: Via, dry_run: bool) -> None:
    import os

    from launcher.emit import launch_command
    from launcher.job.packages import check_packages
    from launcher.plan.explain import explain
    from launcher.spawn import free_port, run_until_done

    if made.nodes > 1:
        way_out = "launch with --via slurm, or set cluster.nodes to 1"
        raise UserError("cluster.nodes", made.nodes, "is more than this machine, which launch starts", way_out)
    starter: Starter = "deepspeed" if via is Via.deepspeed else "torchrun"
    command = launch_command(made, str(spec_path), tuple(overrides), os.cpu_count() or 1, free_port(), starter)
    if dry_run:
        typer.echo(explain(made))
        for name, text in emitted(spec, made).items():
            if name not in ("plan.json", "accelerate.yaml"):  # said above; not what is run here
                typer.echo(f"\n# {name}\n{text}")
        typer.echo(f"\n# command\n{command}")
        return
    check_packages(spec)
    started = time.time()
    code = run_until_done(command.argv, command.environment)
    raise typer.Exit(_outcome(Path(spec.output_dir), started, code))


def _launch_by_slurm(spec: JobSpec, script: str, dry_run: bool) -> None:
    """The script is written beside its log, in a folder that Slurm needs to exist."""
    from launcher.emit.slurm import LOG_NAME, MARKER

    if dry_run:
        typer.echo(script, nl=False)
        return
    path = Path(spec.output_dir).absolute() / "job.sbatch"
    if path.exists() and MARKER not in path.read_text(encoding="utf-8", errors="replace").splitlines()[:2]:
        rule = "exists, was not written by fleetune, and is not overwritten"
        raise UserError(str(path), ABSENT, rule, "move it away, or submit it with sbatch")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    job_id = _submit(path)
    typer.echo(f"submitted job {job_id}; log: {path.parent / LOG_NAME.replace('%j', job_id)}")


def _submit(script: Path) -> str:
    from launcher.spawn import sbatch

    try:
        done = sbatch(script)
    except FileNotFoundError:
        way_out = "run `sbatch` on this file where Slurm is, or launch with --via local"
        raise UserError(str(script), ABSENT, "was written, but sbatch is not on the PATH here", way_out) from None
    if done.returncode != 0:
        rule = f"was refused by sbatch: {' '.join(done.stderr.split())}"
        raise UserError(str(script), ABSENT, rule, "mend `slurm` in the cluster file, or the job's `cluster`")
    return done.stdout.strip().partition(";")[0]  # `id;cluster` where several clusters are joined


def _outcome(output_dir: Path, started: float, code: int) -> int:
    """The run's own exit code: launchers report 1 for anything that is not 0."""
    try:
        outcome = json.loads((output_dir / "outcome.json").read_text())
    except (OSError, ValueError):
        return code if code == EXIT_DONE else EXIT_OURS
    return int(outcome["exit_code"]) if code != EXIT_DONE and outcome["time"] >= started else code
