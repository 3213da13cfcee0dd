"""The batch script of a plan: the template `slurm/job.sbatch` with the values of one job and one site.

The script's ways are the template's, what a site asks for is the cluster file's; this file only joins and quotes them.
Two readers with two grammars read the values: Slurm the `#SBATCH` lines, bash the rest.
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

from launcher.emit.argv import RUN_FILE, rank_environment
from launcher.emit.environment import SECRET_GLOBS, SHELL, allowed
from launcher.errors import SpecError
from launcher.job.cluster import Container, SlurmSite
from launcher.job.resources import resource_dir
from launcher.plan.values import Plan
from launcher.units import show_time

MARKER = "# Written by fleetune for sbatch."
"""Second line of every rendered script; a file without it is the user's and is not overwritten."""
LOG_NAME = "slurm-%j.out"
"""In the output folder; %j is the job's id."""
ARRAY_LOG_NAME = "slurm-%A_%a.out"
SLURM_LOOKS_EVERY_SECONDS = 60
"""Slurm looks for jobs to signal once a minute."""
LEAST_LEAD_SECONDS = 120
START_SECONDS = 60
"""What a job takes before its first step, at the least: Python, the model, the data."""


@dataclass(frozen=True)
class BatchJob:
    """What the script runs. Paths are absolute, except those inside the spec, which start at `workdir`."""

    spec_path: str
    overrides: tuple[str, ...]
    workdir: str
    output_dir: str
    python: str
    """Interpreter with fleetune's packages, seen by all nodes."""
    launcher: str = str(RUN_FILE.parent)
    """fleetune's own folder, seen by all nodes."""
    environment: tuple[str, ...] = ()
    """Names of further variables that go to the ranks."""
    trials: tuple[tuple[str, ...], ...] = ()
    """For an array: the overrides of each task; its output folder is `output_dir` with the task's number."""
    prepared_dir: str = ""
    """Of an array: the prepared data that all tasks share."""
    save_seconds: float = 0.0
    """How long a checkpoint takes, measured where a run of this job was, else predicted."""


class _BashTemplate(Template):
    delimiter = "@@"  # `$` is bash's


def render_sbatch(plan: Plan, site: SlurmSite, job: BatchJob) -> str:
    """A bash script for `sbatch`: one task per node, which starts torchrun, which starts the node's ranks.

    Its length does not depend on the number of nodes. Raises `SpecError` for an output folder Slurm cannot log to and
    for a time limit in which no checkpoint could be made.
    """
    num_cores = site.cpus_per_task or plan.gpus_per_node
    _check_time(site, job)
    names = allowed(job.environment)
    return _filled(
        "job.sbatch",
        site,
        job,
        directives=_lines(f"#SBATCH {line}" for line in _directives(plan, site, job, num_cores)),
        output_dir=shlex.quote(job.output_dir),
        launcher=shlex.quote(_launcher(site, job)),
        ranks_per_node=str(plan.gpus_per_node),
        job=_lines(f"  {line}" for line in _job_arguments(job)),
        trials=_trials(job),
        shell_names=_wrapped(SHELL),
        rank_names=_wrapped(names),
        secret_names=_wrapped(SECRET_GLOBS),
        environment=_lines(_exports(rank_environment(plan, num_cores), site)),
        cpus_per_task=str(num_cores),
        prolog=_hook(site.prolog),
        epilog=_hook(site.epilog),
        inside=_inside(site.container),
        srun_extra=_srun_options(site.container),
        rank_inside='"${inside[@]}" ' if site.container and site.container.runtime == "apptainer" else "",
    )


def render_step(plan: Plan, site: SlurmSite, job: BatchJob, name: str, command: Iterable[str]) -> str:
    """A script for one node that runs one fleetune command: a further link of a chain. command: the words after it."""
    lines = [
        f"--job-name={job_name(job.output_dir)}-{name}",
        "--nodes=1",
        "--ntasks-per-node=1",
        f"--cpus-per-task={site.cpus_per_task or plan.gpus_per_node}",
        *_common(site),
        f"--output={_for_slurm(_log_pattern(job.output_dir, f'{name}-%j.out'))}",
        *site.extra,
    ]
    return _filled(
        "step.sbatch",
        site,
        job,
        directives=_lines(f"#SBATCH {line}" for line in lines),
        launcher=shlex.quote(str(Path(_launcher(site, job)).parent)),
        command=_lines(f"  {shlex.quote(word)}" for word in command),
        environment=_lines(_exports({}, site)),
        inside=_inside(site.container),
    )


def _filled(template: str, site: SlurmSite, batch: BatchJob, **values: str) -> str:
    text = (resource_dir("slurm") / template).read_text(encoding="utf-8")
    python = shlex.quote(_python(site, batch))
    return _BashTemplate(text).substitute(
        marker=MARKER, workdir=shlex.quote(batch.workdir), python=python, setup=_setup(site), **values
    )


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _python(site: SlurmSite, job: BatchJob) -> str:
    if site.container is not None:
        return site.container.python
    return f"{site.venv}/bin/python" if site.venv else job.python


def _launcher(site: SlurmSite, job: BatchJob) -> str:
    return site.container.launcher if site.container and site.container.launcher else job.launcher


def _directives(plan: Plan, site: SlurmSite, job: BatchJob, num_cores: int) -> Iterator[str]:
    yield f"--job-name={job_name(job.output_dir)}"
    yield f"--nodes={plan.nodes}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={num_cores}"
    yield from _accelerators(plan, site)
    if job.trials:
        yield f"--array=0-{len(job.trials) - 1}"
    yield from _common(site)
    yield f"--output={_for_slurm(_log_pattern(job.output_dir, ARRAY_LOG_NAME if job.trials else LOG_NAME))}"
    yield "--open-mode=append"  # a job that is queued again keeps its id, and with it its log
    yield "--requeue"  # also where the cluster's own habit is not to
    yield f"--signal=USR2@{lead_seconds(job.save_seconds)}"
    yield from site.extra


def _common(site: SlurmSite) -> Iterator[str]:
    for option in ("partition", "account", "qos", "constraint", "mem", "time"):
        if (value := getattr(site, option)) is not None:
            yield f"--{option}={_for_slurm(value)}"


def _accelerators(plan: Plan, site: SlurmSite) -> Iterator[str]:
    directive = site.gpus_directive or ("none" if plan.device == "cpu" else "gpus-per-node")
    kind = f"{site.gpu_type}:" if site.gpu_type else ""
    if directive != "none":
        number = plan.gpus_per_node
        yield f"--gres=gpu:{kind}{number}" if directive == "gres" else f"--gpus-per-node={kind}{number}"


def lead_seconds(save_seconds: float) -> int:
    """From the signal to the time limit: Slurm's own minute, then the save twice, since it may be slow that day."""
    return max(LEAST_LEAD_SECONDS, round(SLURM_LOOKS_EVERY_SECONDS + 2 * save_seconds))


def _check_time(site: SlurmSite, job: BatchJob) -> None:
    limit, lead = limit_seconds(site.time), lead_seconds(job.save_seconds)
    needed = lead + START_SECONDS
    if limit is not None and limit < needed:
        rule = (
            f"is shorter than a start and one checkpoint ({show_time(job.save_seconds)} to save, signalled {lead} s before "
            "the limit): the job would never get on"
        )
        raise SpecError("slurm.time", site.time, rule, f"give it {-(-needed // 60)} minutes or more, better hours")


def limit_seconds(text: str) -> int | None:
    """Slurm's forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]; None is no limit."""
    if text == "UNLIMITED":
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, parts[0], parts[1] if len(parts) > 1 else 0
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def job_name(output_dir: str) -> str:
    """`fleetune-` and the folder's name, with `_` for what squeue, file patterns or a shell could take amiss."""
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", Path(output_dir).name)
    return f"fleetune-{name}"[:64].rstrip("-")


def _log_pattern(output_dir: str, name: str = LOG_NAME) -> str:
    """The log's path as Slurm reads it: % starts a replacement, and a backslash anywhere would switch them all off."""
    if re.search(r"[\x00-\x1f\x7f\\]", output_dir):
        rule = "cannot be the folder of a Slurm log, having a line break, control character or backslash in its name"
        raise SpecError("output_dir", output_dir, rule, "name a folder without them")
    return f"{output_dir.replace('%', '%%')}/{name}"


def _for_slurm(value: str) -> str:
    """sbatch splits `#SBATCH` lines at blanks, ends them at `#`, takes off quotes and backslashes; it expands nothing."""
    if re.fullmatch(r"[\w./:=,@%+&|*()\[\]-]+", value):
        return value
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'"{escaped}"'


def _job_arguments(job: BatchJob) -> Iterator[str]:
    yield f"--spec {shlex.quote(job.spec_path)}"
    for override in job.overrides:
        yield f"--set {shlex.quote(override)}"


def _trials(job: BatchJob) -> str:
    """Of an array: what its tasks do not share."""
    if not job.trials:
        return ""
    lines = ["", "case ${SLURM_ARRAY_TASK_ID:-} in"]
    for number, overrides in enumerate(job.trials):
        folder = trial_dir(job.output_dir, number)
        own = (*overrides, f"output_dir={_as_yaml(folder)}", f"data.prepared={_as_yaml(job.prepared_dir)}")
        words = " ".join(f"--set {shlex.quote(override)}" for override in own)
        lines += [f"{number})", f"  output_dir={shlex.quote(folder)}", f"  job+=({words})", "  ;;"]
    return "\n".join(
        [*lines, '*) echo "error: no trial for task ${SLURM_ARRAY_TASK_ID:-}" >&2 && exit 1 ;;', "esac", ""]
    )


def trial_dir(output_dir: str, number: int) -> str:
    return f"{output_dir}/trial-{number:03d}"


def _as_yaml(text: str) -> str:
    """`--set` reads its value as YAML: JSON's quotes are YAML's."""
    return json.dumps(text)


def _exports(told: dict[str, str], site: SlurmSite) -> Iterator[str]:
    for name, value in {**told, **site.environment}.items():
        yield f"export {name}={shlex.quote(value)}"
    if site.scratch:
        yield f'export TMPDIR="{site.scratch}" # node.py makes it on every node'


def _setup(site: SlurmSite) -> str:
    """The site's lines as they are; `module` and `activate` read variables that may be unset."""
    lines = [*site.setup, *(f"module load {shlex.quote(name)}" for name in site.modules)]
    if site.venv:
        activate = shlex.quote(f"{site.venv}/bin/activate")
        lines += [
            f"[[ -r {activate} ]] || fail {shlex.quote(f'{site.venv} holds no Python environment; make it, or mend slurm.venv')}"
        ]
        lines += ["# shellcheck disable=SC1090,SC1091", f"source {activate}"]
    return _hook(lines)


def _hook(lines: Iterable[str]) -> str:
    told = list(lines)
    return "\n".join(["", "set +u # the site's own lines", *told, "set -u", ""]) if told else ""


def _inside(container: Container | None) -> str:
    """Words before the interpreter on the first node."""
    if container is None:
        return ""
    if container.runtime == "pyxis":
        return f"srun --nodes=1 --ntasks=1 --overlap {_srun_options(container)}".strip()
    binds = "".join(f" --bind {shlex.quote(mount)}" for mount in container.mounts)
    return f"apptainer exec --nv{binds} {shlex.quote(container.image)}"


def _srun_options(container: Container | None) -> str:
    if container is None or container.runtime != "pyxis":
        return ""
    mounts = f" {_quoted('--container-mounts=' + ','.join(container.mounts))}" if container.mounts else ""
    return f"{_quoted('--container-image=' + container.image)}{mounts} "


def _quoted(word: str) -> str:
    """In quotes even where a shell needs none: readers take a comma in an array for a slip."""
    return "'" + word.replace("'", "'\"'\"'") + "'"


def _wrapped(names: Iterable[str]) -> str:
    """Words of a bash array, in lines; a `*` is quoted, or it would name files."""
    words = [f"'{name}'" if "*" in name else name for name in dict.fromkeys(names)]
    return (
        "\n"
        + textwrap.fill(" ".join(words), 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        + "\n"
    )
