"""`fleetune plan`: what is decided, and every file that follows from it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.command.options import AsJson, Overrides, SpecPath, Via, ViaOption
from launcher.errors import ABSENT, UserError

if TYPE_CHECKING:
    from launcher.job import JobSpec
    from launcher.plan import Plan


def plan(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    emit: Annotated[Path | None, typer.Option(help="Folder to write every generated file into.")] = None,
    via: ViaOption = Via.auto,
    as_json: AsJson = False,
) -> None:
    """Say how the job will be laid over the ranks, what memory it takes, and why."""
    from launcher.plan.explain import explain

    spec, made = made_plan(spec_path, overrides)
    files = emitted(spec, made)  # also where nothing is written: a preset that is wrong is said before a run
    if via is Via.slurm:
        files["job.sbatch"] = batch_script(spec, made, spec_path, overrides)
    if emit is not None:
        _refuse_others(emit, files)
    typer.echo(json.dumps(made.to_json(), indent=2) if as_json else explain(made))
    if emit is not None:
        emit.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (emit / name).write_text(text)
            typer.echo(f"wrote {emit / name}", err=True)


def made_plan(spec_path: Path, overrides: list[str]) -> tuple[JobSpec, Plan]:
    from launcher.cost.cache import cached_cost
    from launcher.emit import check_runnable
    from launcher.job import load_cluster, load_spec
    from launcher.plan import make_plan

    spec = load_spec(spec_path, overrides)
    check_runnable(spec)
    cluster = load_cluster(spec.cluster.name)
    return spec, make_plan(spec, cached_cost(spec), cluster)


def emitted(spec: JobSpec, made: Plan) -> dict[str, str]:
    """Every generated file by name."""
    from launcher.emit import deepspeed_config, fsdp_settings, load_preset

    files = {"plan.json": json.dumps(made.to_json(), indent=2) + "\n"}
    if made.engine == "deepspeed":
        config = deepspeed_config(made, spec, load_preset(spec, made.chosen.layout))
        files["deepspeed.json"] = json.dumps(config, indent=2) + "\n"
    elif made.chosen.strategy == "fsdp":
        files["fsdp.json"] = json.dumps(fsdp_settings(made), indent=2) + "\n"
    return files


def batch_script(spec: JobSpec, made: Plan, spec_path: Path, overrides: list[str]) -> str:
    from launcher.emit import BatchJob, render_sbatch
    from launcher.job import load_cluster

    batch_job = BatchJob(
        spec_path=str(spec_path.absolute()),
        overrides=tuple(overrides),
        workdir=str(Path.cwd()),
        output_dir=str(Path(spec.output_dir).absolute()),
        python=sys.executable,
    )
    return render_sbatch(made, load_cluster(spec.cluster.name).slurm, batch_job)


def _refuse_others(folder: Path, files: dict[str, str]) -> None:
    """Before the first is written, so that a folder never holds the files of two plans."""
    for path in (folder / name for name in files):
        if path.exists() and (not path.is_file() or path.read_bytes() != files[path.name].encode()):
            raise UserError(
                str(path), ABSENT, "exists with other content and is not overwritten", "name another folder"
            )
