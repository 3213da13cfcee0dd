"""The batch script, whole, for sites of every style; hostile names; what shellcheck and bash themselves say of it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.emit import BatchJob, render_sbatch
from launcher.emit.slurm import MARKER, job_name, limit_seconds, render_step
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
    launcher="/home/ann/fleetune/launcher",
)
HOSTILE_JOB = BatchJob(
    spec_path=f"/home/{HOSTILE}/line\nbreak.yaml",
    overrides=(f"model.path=/models/{HOSTILE}\n$(touch z)",),
    workdir=f"/home/{HOSTILE}\nnext",
    output_dir=f"/scratch/{HOSTILE}",
    python=f"/home/{HOSTILE}/bin/python",
    launcher=f"/home/{HOSTILE}/launcher",
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
GRES = site(partition="a100", time="12:00:00", gpus_directive="gres", gpu_type="a100", cpus_per_task=32)
PER_NODE = site(partition="gpu", gpus_directive="gpus-per-node", environment={"NCCL_IB_HCA": "mlx5_0,mlx5_1"})
CONTAINER = site(
    gpus_directive="gpus-per-node",
    container={
        "image": "/images/torch 2.13.sqsh",
        "mounts": ["/home:/home", "/scratch:/scratch"],
        "python": "/opt/venv/bin/python",
    },
    epilog=['rm -rf "/dev/shm/fleetune-$SLURM_JOB_ID"', 'echo "left with $code"'],
)
APPTAINER = site(gpus_directive="gres", container={"image": "/images/torch.sif", "runtime": "apptainer"})
MODULE = site(gpus_directive="gpus-per-node", modules=["cuda/12.8", "nccl/2.27"], prolog=["nvidia-smi -L"])
VENV = site(venv="/opt/site/env", environment={"GLOO_SOCKET_IFNAME": "eth0"}, scratch="/local/${SLURM_JOB_ID}")
ACCOUNT = site(account="nlp-2026", qos="long", time="UNLIMITED")
SWEEP = replace(JOB, trials=(("seed=1",), ("seed=2", "model.path=it's $(touch x)")), prepared_dir="/scratch/ann/data")
HOSTILE_SWEEP = replace(HOSTILE_JOB, trials=((f"seed={HOSTILE}",),), prepared_dir=f"/data/{HOSTILE}")
SCRIPTS = {
    "modules": render_sbatch(plan("fsdp", 16, 8, "cuda"), MODULES, JOB),
    "gres": render_sbatch(plan("zero3", 2, 4, "cuda"), GRES, JOB),
    "gpus-per-node": render_sbatch(plan("fsdp", 2, 8, "cuda"), PER_NODE, JOB),
    "container": render_sbatch(plan("fsdp", 2, 8, "cuda"), CONTAINER, JOB),
    "apptainer": render_sbatch(plan("fsdp", 2, 8, "cuda"), APPTAINER, JOB),
    "module": render_sbatch(plan("fsdp", 2, 8, "cuda"), MODULE, JOB),
    "venv": render_sbatch(plan("zero2", 2, 2, "cpu"), VENV, JOB),
    "account": render_sbatch(plan("ddp", 2, 8, "cpu"), ACCOUNT, JOB),
    "array": render_sbatch(plan("ddp", 1, 2, "cpu"), site(), SWEEP),
    "hostile": render_sbatch(plan("ddp", 1, 1, "cpu"), site(), HOSTILE_JOB),
    "hostile-array": render_sbatch(plan("ddp", 1, 1, "cpu"), site(), HOSTILE_SWEEP),
    "step": render_step(plan("ddp", 2, 8, "cuda"), GRES, JOB, "convert", ["convert", "/runs/a", "hf:/models/a"]),
    "hostile-step": render_step(plan("ddp", 1, 1, "cpu"), site(), HOSTILE_JOB, "convert", ["convert", HOSTILE]),
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
    arguments = ["--spec", job.spec_path, "--set", job.overrides[0]]
    assert done.stdout.split("\0")[:-1] == [job.workdir, job.output_dir, job.python, *arguments]
    assert list(tmp_path.iterdir()) == []


def test_directives_of_hostile_names_stay_on_their_lines() -> None:
    """sbatch takes quotes and backslashes off as a POSIX shell does, and expands nothing but %."""
    lines = [line for line in SCRIPTS["hostile"].splitlines() if line.startswith("#SBATCH ")]
    options = dict(shlex.split(line)[1].split("=", 1) for line in lines if "=" in line)
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


@pytest.mark.parametrize("name", ["hostile", "hostile-array"])
def test_the_whole_script_carries_hostile_names_out_nowhere(name: str, tmp_path: Path) -> None:
    """Run by bash up to its own check that Slurm is there: nothing in a name is carried out on the way."""
    environment = {"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": "0"}
    argv = ["bash", "-c", SCRIPTS[name]]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.stderr == "error: this is a Slurm job; submit it with sbatch\n"
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_filtered_and_secrets_are_not_shown(tmp_path: Path) -> None:
    """What is not on the list is gone, what is on it is printed, and a secret by its name alone."""
    script = SCRIPTS["gres"]
    begin, end = script.index("shell_names=("), script.index("inside=(")
    told = {"NCCL_DEBUG": "INFO", "HF_TOKEN": "hf_secret", "MY_OWN": "x", "WANDB_API_KEY": "k", "OMP_PLACES": "a b"}
    shown = script[begin:end].replace("set -u\n", "") + "compgen -e\n"
    done = subprocess.run(
        ["bash", "-c", shown], capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"], **told}
    )
    lines = done.stdout.splitlines()
    assert "environment: NCCL_DEBUG='INFO'" in lines
    assert "environment: OMP_PLACES='a b'" in lines
    assert "environment: HF_TOKEN is set, and not shown" in lines
    assert "hf_secret" not in done.stdout
    assert "MY_OWN" not in lines
    assert {"HF_TOKEN", "WANDB_API_KEY"} <= set(lines)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("UNLIMITED", None)],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int | None) -> None:
    assert limit_seconds(text) == seconds


def test_a_limit_shorter_than_one_checkpoint_is_refused() -> None:
    """A checkpoint of ten minutes does not fit into twenty: signalled 21 minutes before the end."""
    with pytest.raises(
        SpecError, match=r"^slurm.time: 20 is shorter than a start and one checkpoint .* 22 minutes or more"
    ):
        render_sbatch(plan("ddp", 1, 1, "cpu"), site(time="20"), replace(JOB, save_seconds=600))
    script = render_sbatch(plan("ddp", 1, 1, "cpu"), site(time="60"), replace(JOB, save_seconds=600))
    assert "--signal=USR2@1260\n" in script


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
