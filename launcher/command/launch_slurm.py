"""`fleetune launch --via slurm`: the script beside its log, submitted; arrays of trials, and a chain of three jobs."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launcher.errors import ABSENT, SpecError, UserError

if TYPE_CHECKING:
    from launcher.emit import BatchJob
    from launcher.job import JobSpec
    from launcher.plan import Plan


def launch_by_slurm(
    spec: JobSpec,
    made: Plan,
    spec_path: Path,
    overrides: list[str],
    array: list[str],
    chain: Path | None,
    dependency: str | None,
    dry_run: bool,
) -> None:
    """The scripts are written into a folder that Slurm needs to exist, that of their logs."""
    from launcher.emit import render_sbatch
    from launcher.job import load_cluster

    if array and chain:
        raise SpecError("--chain", str(chain), "converts one run, and --array makes many", "leave one of them out")
    site = load_cluster(spec.cluster.name).slurm
    batch = batch_job(spec, made, spec_path, overrides, array)
    scripts = {"job": render_sbatch(made, site, batch)}
    for name, command in _further(spec, chain).items():
        scripts[name] = _step(made, spec, batch, name, command)
    if dry_run:
        typer.echo("\n".join(scripts.values()), nl=False)
        return
    folder = Path(spec.output_dir).absolute()
    for name in scripts:
        _refuse_a_users(folder / f"{name}.sbatch")
    _check_size(made, site.partition)
    folder.mkdir(parents=True, exist_ok=True)
    before = dependency
    for name, text in scripts.items():
        path = folder / f"{name}.sbatch"
        path.write_text(text, encoding="utf-8")
        job_id = _submit(path, [f"--dependency={before}"] if before else [])
        typer.echo(f"submitted job {job_id}; log: {folder / _log_name(name, job_id, bool(array))}")
        before = f"afterok:{job_id}"


def batch_job(spec: JobSpec, made: Plan, spec_path: Path, overrides: list[str], array: list[str]) -> BatchJob:
    from launcher.emit import BatchJob

    return BatchJob(
        spec_path=str(spec_path.absolute()),
        overrides=tuple(overrides),
        workdir=str(Path.cwd()),
        output_dir=str(Path(spec.output_dir).absolute()),
        python=sys.executable,
        environment=spec.launch.environment,
        trials=_trials(array),
        prepared_dir=str(Path(spec.prepared_dir).absolute()),
        save_seconds=save_seconds(spec, made),
    )


def _trials(array: list[str]) -> tuple[tuple[str, ...], ...]:
    """Every combination of the values, the last key turning fastest. Raises `SpecError`."""
    axes = []
    for text in array:
        key, equals, values = text.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise SpecError("--array", text, "is not of the form key=value,value", "write e.g. --array seed=1,2,3")
        if key in ("output_dir", "data.prepared"):
            raise SpecError("--array", text, "is what keeps the tasks apart", "leave it out: each gets its own")
        axes.append([f"{key}={value}" for value in values.split(",")])
    trials = tuple(itertools.product(*axes)) if axes else ()
    if len(trials) > 1000:
        raise SpecError("--array", f"{len(trials)} tasks", "are more than 1000", "give fewer values")
    return trials


def save_seconds(spec: JobSpec, made: Plan) -> float:
    """Of one checkpoint: the longest that this run has measured, else bytes over the disk's rate of the cluster file."""
    from launcher.job import load_cluster

    path = Path(spec.output_dir) / "metrics.jsonl"
    measured = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            if record["kind"] == "checkpoint":
                measured.append(float(record["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue
    if measured:
        return max(measured)
    rate = load_cluster(spec.cluster.name).host.disk_gb_per_s * 1e9 * made.nodes
    return made.chosen.disk.total_bytes / (spec.checkpoint.keep_last + 1) / rate


def _further(spec: JobSpec, chain: Path | None) -> dict[str, list[str]]:
    """The links after the training, as words after `fleetune`."""
    if chain is None:
        return {}
    model = str(chain.absolute())
    task = ["--task", spec.task.name, "--prepared", spec.prepared_dir]
    return {"convert": ["convert", spec.output_dir, f"hf:{model}"], "evaluate": ["eval", model, *task]}


def _step(made: Plan, spec: JobSpec, batch: BatchJob, name: str, command: list[str]) -> str:
    from launcher.emit.slurm import render_step
    from launcher.job import load_cluster

    return render_step(made, load_cluster(spec.cluster.name).slurm, batch, name, command)


def _log_name(name: str, job_id: str, is_array: bool) -> str:
    from launcher.emit.slurm import ARRAY_LOG_NAME, LOG_NAME

    if name != "job":
        return f"{name}-{job_id}.out"
    return ARRAY_LOG_NAME.replace("%A", job_id).replace("%a", "*") if is_array else LOG_NAME.replace("%j", job_id)


def _refuse_a_users(path: Path) -> None:
    from launcher.emit.slurm import MARKER

    if path.exists() and MARKER not in path.read_text(encoding="utf-8", errors="replace").splitlines()[:2]:
        rule = "exists, was not written by fleetune, and is not overwritten"
        raise UserError(str(path), ABSENT, rule, "move it away, or submit it with sbatch")


def _check_size(made: Plan, partition: str | None) -> None:
    """Some sites queue for ever what they can never give. Raises `SpecError`."""
    from launcher.spawn import run_captured

    try:
        said = run_captured(["sinfo", "-h", "-o", "%D %R", *([f"--partition={partition}"] if partition else [])])
    except FileNotFoundError:
        return  # sbatch says it better
    sizes: Counter[str] = Counter()
    for line in said.stdout.splitlines():  # one for each state that nodes are in
        number, _, name = line.strip().partition(" ")
        sizes[name] += int(number)
    if partition and said.returncode == 0 and not sizes:
        known = run_captured(["sinfo", "-h", "-o", "%R"]).stdout.split()
        raise SpecError("slurm.partition", partition, "is no partition here", f"known: {', '.join(sorted(set(known)))}")
    largest = max(sizes, key=lambda name: sizes[name], default=None)
    if largest is not None and made.nodes > sizes[largest]:
        rule = f"is more than the {sizes[largest]} nodes of partition {largest}"
        raise SpecError("cluster.nodes", made.nodes, rule, "ask for fewer, or name another slurm.partition")


def _submit(script: Path, options: list[str]) -> str:
    from launcher.spawn import sbatch

    try:
        done = sbatch(script, options)
    except FileNotFoundError:
        way_out = "run `sbatch` on this file where Slurm is, or launch with --via local"
        raise UserError(str(script), ABSENT, "was written, but sbatch is not on the PATH here", way_out) from None
    if done.returncode != 0:
        rule = f"was refused by sbatch: {' '.join(done.stderr.split())}"
        raise UserError(str(script), ABSENT, rule, "mend `slurm` in the cluster file, or the job's `cluster`")
    return done.stdout.strip().partition(";")[0]  # `id;cluster` where several clusters are joined
