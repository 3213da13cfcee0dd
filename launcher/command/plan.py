"""`fleetune plan`: what is decided, and every file that follows from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.command.options import AsJson, Overrides, SpecPath, Via, ViaOption
from launcher.errors import ABSENT, UserError

if TYPE_CHECKING:
    from launcher.job import JobSpec
    from launcher.plan import Plan

SweepOption = Annotated[
    list[str],
    typer.Option(
        "--sweep",
        metavar="KEY=V,V",
        help="A plan for each value: nodes, gpus_per_node, gpu, micro_batch_size, strategy, seq_len, global_batch_size"
        " or any dotted key; given again, every combination.",
    ),
]


def plan(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    emit: Annotated[Path | None, typer.Option(help="Folder to write every generated file into.")] = None,
    via: ViaOption = Via.auto,
    sweep: SweepOption = [],  # noqa: B006 - typer copies it
    plot: Annotated[Path | None, typer.Option(help="Draw the sweep into this .png or .html file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how the job will be laid over the ranks, what memory and time it takes, and why."""
    from launcher.plan.explain import explain

    if sweep or plot:
        return _swept(spec_path, overrides, sweep, plot, as_json, emit)
    spec, made = made_plan(spec_path, overrides)
    files = emitted(spec, made, emit)  # also where nothing is written: a preset that is wrong is said before a run
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
    return None


def made_plan(spec_path: Path, overrides: list[str], advise: bool = True) -> tuple[JobSpec, Plan]:
    """Raises `PlanError` where nothing fits; `advise` has it say what would, which takes seconds at worst."""
    from launcher.cost.cache import cached_cost
    from launcher.emit import check_runnable
    from launcher.job import load_cluster, load_spec
    from launcher.plan import make_plan

    spec = load_spec(spec_path, overrides)
    cluster, samples = load_cluster(spec.cluster.name), _num_samples(spec)
    made = make_plan(spec, cached_cost(spec), cluster, samples, cached_cost, advise=advise)
    check_runnable(spec, made)
    return spec, made


def _num_samples(spec: JobSpec) -> int | None:
    """Training samples of a job given in epochs, where its data are prepared; the folder itself is opened by a run."""
    from launcher.data.fingerprint import options_fingerprint

    index = Path(spec.prepared_dir) / "index.json"
    if spec.training.num_epochs is None or not index.is_file():
        return None
    told = json.loads(index.read_text(encoding="utf-8"))
    of_this_spec = told["options_fingerprint"] == options_fingerprint(spec)
    return int(told["splits"]["train"]["num_samples"]) if of_this_spec else None


def _swept(
    spec_path: Path, overrides: list[str], sweep: list[str], plot: Path | None, as_json: bool, emit: Path | None
) -> None:
    """Rows that cannot be planned say why, and are no failure of the command."""
    from launcher.command.plot import check_plot, write_plot
    from launcher.command.sweep import parse_axes, sweep_json, sweep_rows, sweep_table

    if not sweep:
        raise UserError("--plot", str(plot), "has nothing to draw", "add e.g. --sweep nodes=1,2,4,8")
    if emit is not None:
        raise UserError(
            "--emit", str(emit), "writes the files of one plan, and a sweep has many", "leave one of them out"
        )
    if plot is not None:
        check_plot(plot)
    axes = parse_axes(sweep)
    rows = sweep_rows(axes, lambda swept: made_plan(spec_path, [*overrides, *swept], advise=False)[1])
    typer.echo(json.dumps(sweep_json(rows), indent=2) if as_json else sweep_table(rows))
    if plot is not None:
        write_plot(plot, rows, f"{spec_path.stem} by {', '.join(axis.name for axis in axes)}")
        typer.echo(f"wrote {plot}", err=True)


def emitted(spec: JobSpec, made: Plan, folder: Path | None = None) -> dict[str, str]:
    """Every generated file by name; those that name another say where it is in `folder`."""
    from launcher.emit import accelerate_config, deepspeed_config, fsdp_settings, load_preset
    from launcher.emit.fsdp import STRATEGIES

    files = {"plan.json": json.dumps(made.to_json(), indent=2) + "\n"}
    if made.engine == "deepspeed":
        config = deepspeed_config(made, spec, load_preset(spec, made.chosen.layout))
        files["deepspeed.json"] = json.dumps(config, indent=2) + "\n"
    elif made.chosen.strategy in STRATEGIES:
        files["fsdp.json"] = json.dumps(fsdp_settings(made), indent=2) + "\n"
    accelerate = accelerate_config(made, str((folder or Path()).absolute() / "deepspeed.json"))
    if accelerate is not None:
        files["accelerate.yaml"] = accelerate
    return files


def batch_script(spec: JobSpec, made: Plan, spec_path: Path, overrides: list[str]) -> str:
    from launcher.command.launch_slurm import batch_job
    from launcher.emit import render_sbatch
    from launcher.job import load_cluster

    return render_sbatch(
        made, load_cluster(spec.cluster.name).slurm, batch_job(spec, made, spec_path, overrides, array=[])
    )


def _refuse_others(folder: Path, files: dict[str, str]) -> None:
    """Before the first is written, so that a folder never holds the files of two plans."""
    for path in (folder / name for name in files):
        if path.exists() and (not path.is_file() or path.read_bytes() != files[path.name].encode()):
            raise UserError(
                str(path), ABSENT, "exists with other content and is not overwritten", "name another folder"
            )
