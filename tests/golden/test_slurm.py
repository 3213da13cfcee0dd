"""The batch script, whole, for sites of three styles; hostile names; what shellcheck and bash themselves say of it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher.emit import BatchJob, render_sbatch
from launcher.emit.slurm import MARKER, job_name
from launcher.errors import SpecError
from launcher.job import SlurmSite
from launcher.job.load import decode
from launcher.plan.layout import Layout
from launcher.plan.values import Candidate, Memory, Plan, StepTime
from tests.golden.compare import Golden

HOSTILE = 'it\'s "my" $(touch x) `touch y` #1;& 50% é'
JOB = BatchJob(
    spec_path="/home/ann/jobs/gpt.yaml",
    overrides=("training.lr=1e-4", "seed=3"),
    workdir="/home/ann/jobs",
    output_dir="/scratch/ann/runs/my-gpt",
    python="/home/ann/venv/bin/python",
    run_file="/home/ann/fleetune/launcher/run.py",
)
HOSTILE_JOB = BatchJob(
    spec_path=f"/home/{HOSTILE}/line\nbreak.yaml",
    overrides=(f"model.path=/models/{HOSTILE}\n$(touch z)",),
    workdir=f"/home/{HOSTILE}\nnext",
    output_dir=f"/scratch/{HOSTILE}",
    python=f"/home/{HOSTILE}/bin/python",
    run_file=f"/home/{HOSTILE}/launcher/run.py",
)


def plan(strategy: str, nodes: int, gpus_per_node: int, device: str) -> Plan:
    chosen = Candidate(Layout(strategy, 1, 1, 1, 1, 1, "none", "fp32"), Memory((), 1), 0, StepTime((), 0, 1, 0))
    return Plan(chosen, nodes, gpus_per_node, device, 64, 1024, 10, None, "", (), ())


def site(**values: Any) -> SlurmSite:
    return decode(SlurmSite, values)


MODULES = site(
    partition="gpu",
    account="nlp-2026",
    qos="long",
    constraint="h100&ib",
    time="2-00:00:00",
    gpus_directive="gpus-per-node",
    cpus_per_task=96,
    mem="0",
    extra=["--exclusive", "--mail-type=END"],
    setup=["module purge", "module load cuda/12.8 nccl"],
)
GRES = site(partition="a100", time="12:00:00", gpus_directive="gres", cpus_per_task=32)
VENV = site(setup=["source /opt/site/env/bin/activate", "export GLOO_SOCKET_IFNAME=eth0"])
SCRIPTS = {
    "modules": render_sbatch(plan("fsdp", 16, 8, "cuda"), MODULES, JOB),
    "gres": render_sbatch(plan("zero3", 2, 4, "cuda"), GRES, JOB),
    "cpu-venv": render_sbatch(plan("zero2", 2, 2, "cpu"), VENV, JOB),
    "hostile": render_sbatch(plan("ddp", 1, 1, "cpu"), site(), HOSTILE_JOB),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, golden: Golden) -> None:
    """What fleetune hands to sbatch, compared whole."""
    golden.check(f"slurm/{name}.sbatch", SCRIPTS[name])


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(name: str) -> None:
    """But for what our quoting is for: `$(...)` in single quotes is meant literally; and the site's own `source`."""
    done = subprocess.run(
        ["shellcheck", "--exclude=SC2016,SC1091", "-"], input=SCRIPTS[name], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_bash_reads_back_hostile_names(tmp_path: Path) -> None:
    """Every value reaches its variable character by character, and nothing in it is carried out."""
    head, _, _ = SCRIPTS["hostile"].partition("fail() {")
    shown = head + 'printf \'%s\\0\' "$workdir" "$output_dir" "$python" "${job[@]}"\n'
    done = subprocess.run(["bash"], input=shown, capture_output=True, text=True, check=True, cwd=tmp_path)
    job = HOSTILE_JOB
    arguments = [job.run_file, "--spec", job.spec_path, "--set", job.overrides[0]]
    assert done.stdout.split("\0")[:-1] == [job.workdir, job.output_dir, job.python, *arguments]
    assert list(tmp_path.iterdir()) == []


def test_directives_of_hostile_names_stay_on_their_lines() -> None:
    """sbatch takes quotes and backslashes off as a POSIX shell does, and expands nothing but %."""
    lines = [line for line in SCRIPTS["hostile"].splitlines() if line.startswith("#SBATCH ")]
    options = dict(shlex.split(line)[1].split("=", 1) for line in lines)
    assert options["--output"] == f"/scratch/{HOSTILE.replace('%', '%%')}/slurm-%j.out"
    assert re.fullmatch(r"[A-Za-z0-9._+-]+", options["--job-name"])


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/runs/my-gpt", "fleetune-my-gpt"),
        ("/runs/a b$(x)\n", "fleetune-a_b_x_"),
        ("/", "fleetune"),
        ("/" + 100 * "a", "fleetune-" + 55 * "a"),
    ],
)
def test_job_name(folder: str, name: str) -> None:
    assert job_name(folder) == name


@pytest.mark.parametrize("folder", ["/runs/a\nb", "/runs/a\\b", "/runs/a\tb"])
def test_a_folder_that_slurm_cannot_log_to_is_refused(folder: str) -> None:
    job = BatchJob("/job.yaml", (), "/", folder, "/python", "/run.py")
    with pytest.raises(SpecError, match=r"^output_dir: .* cannot be the folder of a Slurm log.*; name a folder"):
        render_sbatch(plan("ddp", 1, 1, "cpu"), site(), job)


def test_length_does_not_depend_on_the_number_of_nodes() -> None:
    """1,000 nodes differ from 2 in one number."""
    few, many = (render_sbatch(plan("fsdp", nodes, 8, "cuda"), MODULES, JOB) for nodes in (2, 1000))
    assert few.replace("--nodes=2\n", "--nodes=1000\n") == many


def test_second_line_marks_the_script_as_ours() -> None:
    assert [script.splitlines()[1] for script in SCRIPTS.values()] == [MARKER] * len(SCRIPTS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"time": 86400},
            "time: 86400 must be a non-empty text; time limit as Slurm writes it, in quotes, since YAML reads 24:00:00 "
            "as the number 86400 (default 24:00:00)",
        ),
        (
            {"account": "a\n#SBATCH --uid=0"},
            r"account: 'a\n#SBATCH --uid=0' must be a non-empty text or null; account that is charged",
        ),
        (
            {"gpus_directive": "gpu-per-node"},
            "gpus_directive: gpu-per-node must be one of gpus-per-node, gres, none or null; did you mean `gpus-per-node`?",
        ),
    ],
)
def test_a_mistake_in_the_site_section_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        site(**values)
    assert str(caught.value) == message
