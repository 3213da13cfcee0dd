"""`fleetune`, also `python -m launcher`: one word per stage of a job. Each command imports only what it needs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.errors import ABSENT, EXIT_DONE, EXIT_INTERRUPTED, EXIT_OURS, EXIT_USER, FleetuneError, UserError

if TYPE_CHECKING:
    from launcher.emit import Via as Starter
    from launcher.job import JobSpec
    from launcher.plan import Plan

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One job spec in, a fine-tuned GPT- or BERT-style model out: init, plan, prepare, launch, convert, eval.",
)

# What typer raises for a wrong command line. Newer releases carry their own copy of click, whose classes are not click's.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="Job spec in YAML.", show_default=False)]
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one key: training.lr=1e-4.")]


class Via(str, Enum):
    auto = "auto"
    local = "local"
    torchrun = "torchrun"
    deepspeed = "deepspeed"
    slurm = "slurm"


ViaOption = Annotated[Via, typer.Option(help="Who starts the ranks; auto and local: torchrun on this machine.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("job.yaml"),
    task: Annotated[str, typer.Option(help="causal_lm or sequence_classification.")] = "causal_lm",
) -> None:
    """Write a commented starter spec."""
    from launcher.job.starter import starter

    text = starter(task)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(str(path), ABSENT, "exists and is not overwritten", "name another file") from None
    typer.echo(f"wrote {path}; next: fleetune plan {path}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the job spec, for editors."""
    from launcher.job.spec import JobSpec

    typer.echo(json.dumps(JobSpec.model_json_schema(), indent=2))


@app.command()
def plan(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    emit: Annotated[Path | None, typer.Option(help="Folder to write every generated file into.")] = None,
    via: ViaOption = Via.auto,
    as_json: AsJson = False,
) -> None:
    """Say how the job will be laid over the ranks, what memory it takes, and why."""
    from launcher.plan.explain import explain

    spec, made = _plan(spec_path, overrides)
    files = _emitted(spec, made)  # also where nothing is written: a preset that is wrong is said before a run
    if via is Via.slurm:
        files["job.sbatch"] = _batch_script(spec, made, spec_path, overrides)
    if emit is not None:
        _refuse_others(emit, files)
    typer.echo(json.dumps(made.to_json(), indent=2) if as_json else explain(made))
    if emit is not None:
        emit.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (emit / name).write_text(text)
            typer.echo(f"wrote {emit / name}", err=True)


@app.command()
def prepare(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006
    force: Annotated[bool, typer.Option("--force", help="Replace data prepared from other inputs or options.")] = False,
) -> None:
    """Read, split and tokenise the data once, into a folder that `datasets` opens."""
    from launcher.data.prepare import prepare as prepare_data
    from launcher.job import load_spec

    spec = load_spec(spec_path, overrides)
    with _progress() as progress:
        done = prepare_data(spec, force=force, progress=progress)
    typer.echo(f"{'prepared' if done.is_new else 'found'} {done.folder}")
    for name, split in done.index["splits"].items():
        counts = (f"{split[key]:,} {key.removeprefix('num_')}" for key in ("num_records", "num_samples", "num_tokens"))
        typer.echo(f"  {name}: {', '.join(counts)}, {len(split['shards'])} shards")


@app.command()
def launch(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print exactly what would run, and run nothing.")] = False,
    via: ViaOption = Via.auto,
) -> None:
    """Plan, then start the ranks: here with the launcher that fits the plan, or as a Slurm job."""
    spec, made = _plan(spec_path, overrides)
    if via is Via.slurm:
        _launch_by_slurm(spec, _batch_script(spec, made, spec_path, overrides), dry_run)
    else:
        _launch_here(spec, made, spec_path, overrides, via, dry_run)


def _launch_here(spec: JobSpec, made: Plan, spec_path: Path, overrides: list[str], via: Via, dry_run: bool) -> None:
    import os

    from launcher.emit import launch_command
    from launcher.plan.explain import explain
    from launcher.spawn import free_port, run_until_done

    if made.nodes > 1:
        way_out = "launch with --via slurm, or set cluster.nodes to 1"
        raise UserError("cluster.nodes", made.nodes, "is more than this machine, which launch starts", way_out)
    starter: Starter = "deepspeed" if via is Via.deepspeed else "torchrun"
    command = launch_command(made, str(spec_path), tuple(overrides), os.cpu_count() or 1, free_port(), starter)
    if dry_run:
        typer.echo(explain(made))
        for name, text in _emitted(spec, made).items():
            if name != "plan.json":  # said above, and complete with `fleetune plan --json`
                typer.echo(f"\n# {name}\n{text}")
        typer.echo(f"\n# command\n{command}")
        return
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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def convert(context: typer.Context) -> None:
    """Sharded checkpoint -> folder that transformers opens; same as `python -m tools.convert`."""
    from tools.convert import main as convert_main

    raise typer.Exit(convert_main(context.args))


@app.command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Score a model folder on a file; same as `python -m tools.evaluate`."""
    from tools.evaluate import main as evaluate_main

    raise typer.Exit(evaluate_main(context.args))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's data and runs go.")] = Path("runs/demo"),
) -> None:
    """Train, convert and score a small GPT and a small BERT on Python's own documentation, on two CPU ranks."""
    from tools.demo import run_demo

    run_demo(folder)


def _plan(spec_path: Path, overrides: list[str]) -> tuple[JobSpec, Plan]:
    from launcher.cost.cache import cached_cost
    from launcher.job import load_cluster, load_spec
    from launcher.plan import make_plan

    spec = load_spec(spec_path, overrides)
    cluster = load_cluster(spec.cluster.name)
    return spec, make_plan(spec, cached_cost(spec), cluster)


def _emitted(spec: JobSpec, made: Plan) -> dict[str, str]:
    """Every generated file by name."""
    from launcher.emit import deepspeed_config, fsdp_settings, load_preset

    files = {"plan.json": json.dumps(made.to_json(), indent=2) + "\n"}
    if made.engine == "deepspeed":
        config = deepspeed_config(made, spec, load_preset(spec, made.chosen.strategy))
        files["deepspeed.json"] = json.dumps(config, indent=2) + "\n"
    elif made.chosen.strategy == "fsdp":
        files["fsdp.json"] = json.dumps(fsdp_settings(made), indent=2) + "\n"
    return files


def _batch_script(spec: JobSpec, made: Plan, spec_path: Path, overrides: list[str]) -> str:
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


@contextmanager
def _progress() -> Iterator[Callable[[str, int], None]]:
    """`show(stage, number)`: one live line on a terminal, nothing when piped."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting") as status:
        yield lambda stage, number: status.update(f"{stage}: {number:,}")


def _outcome(output_dir: Path, started: float, code: int) -> int:
    """The run's own exit code: launchers report 1 for anything that is not 0."""
    try:
        outcome = json.loads((output_dir / "outcome.json").read_text())
    except (OSError, ValueError):
        return code if code == EXIT_DONE else EXIT_OURS
    return int(outcome["exit_code"]) if code != EXIT_DONE and outcome["time"] >= started else code


def main(argv: list[str] | None = None) -> None:
    """Entry point: exit codes 0, 2 (the user's to fix), 75 (saved, can go on), 1 (ours)."""
    raise SystemExit(guarded(lambda: app(args=argv, prog_name="fleetune", standalone_mode=False)))


def guarded(body: Callable[[], Any]) -> int:
    """Run a command; a mistake of the user's is a message on stderr, not a traceback."""
    try:
        result = body()
    except USAGE_ERROR as error:
        error.show()  # type: ignore[attr-defined]
        return EXIT_USER
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except FleetuneError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return result if isinstance(result, int) else EXIT_DONE


if __name__ == "__main__":
    main()
