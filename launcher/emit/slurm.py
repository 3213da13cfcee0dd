"""The batch script of a plan: the template `slurm/job.sbatch` with the values of one job and one site.

The script's ways are the template's, what a site asks for is the cluster file's; this file only joins and quotes them.
Two readers with two grammars read the values: Slurm the `#SBATCH` lines, bash the rest.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

from launcher.emit.argv import RUN_FILE
from launcher.errors import SpecError
from launcher.job.cluster import SlurmSite
from launcher.job.resources import resource_dir
from launcher.plan.values import Plan

MARKER = "# Written by fleetune for sbatch."
"""Second line of every rendered script; a file without it is the user's and is not overwritten."""
LOG_NAME = "slurm-%j.out"
"""In the output folder; %j is the job's id."""
SAVE_SECONDS = 120
"""From the signal to the time limit. Slurm looks once a minute, so 60 s are certain; `extra` may ask for more."""


@dataclass(frozen=True)
class BatchJob:
    """What the script runs. Paths are absolute, except those inside the spec, which start at `workdir`."""

    spec_path: str
    overrides: tuple[str, ...]
    workdir: str
    output_dir: str
    python: str
    """Interpreter with fleetune's packages, seen by all nodes."""
    run_file: str = str(RUN_FILE)


class _BashTemplate(Template):
    delimiter = "@@"  # `$` is bash's


def render_sbatch(plan: Plan, site: SlurmSite, job: BatchJob) -> str:
    """A bash script for `sbatch`: one task per node, which starts torchrun, which starts the node's ranks.

    Its length does not depend on the number of nodes. Raises `SpecError` for an output folder Slurm cannot log to.
    """
    num_cores = site.cpus_per_task or plan.gpus_per_node
    template = _BashTemplate((resource_dir("slurm") / "job.sbatch").read_text(encoding="utf-8"))
    return template.substitute(
        marker=MARKER,
        directives="\n".join(f"#SBATCH {line}" for line in _directives(plan, site, job, num_cores)),
        workdir=shlex.quote(job.workdir),
        output_dir=shlex.quote(job.output_dir),
        python=shlex.quote(job.python),
        ranks_per_node=plan.gpus_per_node,
        job="\n".join(f"  {line}" for line in _job_arguments(job)),
        environment="\n".join(f"export {name}={value}" for name, value in _environment(plan, num_cores).items()),
        setup=_setup(site),
        cpus_per_task=num_cores,
    )


def _directives(plan: Plan, site: SlurmSite, job: BatchJob, num_cores: int) -> Iterator[str]:
    yield f"--job-name={job_name(job.output_dir)}"
    yield f"--nodes={plan.nodes}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={num_cores}"
    yield from _accelerators(plan, site)
    for option in ("partition", "account", "qos", "constraint", "mem", "time"):
        if (value := getattr(site, option)) is not None:
            yield f"--{option}={_for_slurm(value)}"
    yield f"--output={_for_slurm(_log_pattern(job.output_dir))}"
    yield "--open-mode=append"  # a job that Slurm requeues keeps its id, and with it its log
    yield f"--signal=USR2@{SAVE_SECONDS}"
    yield from site.extra


def _accelerators(plan: Plan, site: SlurmSite) -> Iterator[str]:
    directive = site.gpus_directive or ("none" if plan.device == "cpu" else "gpus-per-node")
    if directive != "none":
        yield f"--gres=gpu:{plan.gpus_per_node}" if directive == "gres" else f"--gpus-per-node={plan.gpus_per_node}"


def job_name(output_dir: str) -> str:
    """`fleetune-` and the folder's name, with `_` for what squeue, file patterns or a shell could take amiss."""
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", Path(output_dir).name)
    return f"fleetune-{name}"[:64].rstrip("-")


def _log_pattern(output_dir: str) -> str:
    """The log's path as Slurm reads it: % starts a replacement, and a backslash anywhere would switch them all off."""
    if re.search(r"[\x00-\x1f\x7f\\]", output_dir):
        rule = "cannot be the folder of a Slurm log, having a line break, control character or backslash in its name"
        raise SpecError("output_dir", output_dir, rule, "name a folder without them")
    return f"{output_dir.replace('%', '%%')}/{LOG_NAME}"


def _for_slurm(value: str) -> str:
    """sbatch splits `#SBATCH` lines at blanks, ends them at `#`, takes off quotes and backslashes; it expands nothing."""
    if re.fullmatch(r"[\w./:=,@%+&|*()\[\]-]+", value):
        return value
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'"{escaped}"'


def _job_arguments(job: BatchJob) -> Iterator[str]:
    yield shlex.quote(job.run_file)
    yield f"--spec {shlex.quote(job.spec_path)}"
    for override in job.overrides:
        yield f"--set {shlex.quote(override)}"


def _environment(plan: Plan, num_cores: int) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": str(max(1, num_cores // plan.gpus_per_node))}
    return {**threads, "DS_ACCELERATOR": "cpu"} if plan.device == "cpu" and plan.engine == "deepspeed" else threads


def _setup(site: SlurmSite) -> str:
    """The site's lines as they are; `module` and `activate` read variables that may be unset."""
    return "\n".join(["", "set +u # the site's own lines", *site.setup, "set -u", ""]) if site.setup else ""
