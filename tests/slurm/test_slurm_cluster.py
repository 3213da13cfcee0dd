"""The rendered script on a real Slurm of three nodes, each with its own network and processes (`lab.sh`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.data.prepare import prepare
from launcher.job import parse_spec
from tests.support import REPO, job, rank_environment, records, run_ranks, torchrun

LAB = Path(__file__).with_name("lab.sh")
RUN = REPO / "launcher" / "run.py"
HOSTILE = 'it\'s "my" $(touch x) #1;& 50% é'
STEPS = 6


def script(lab: Path, command: str, timeout_seconds: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LAB": str(lab)}
    argv = [str(LAB), command]
    log = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False}
    return subprocess.run(argv, env=environment, timeout=timeout_seconds, **log)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment of a login node of a cluster that is gone afterwards."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("dpkg") is None:
        pytest.skip("the cluster needs root, for namespaces, on Debian or Ubuntu, for Slurm's packages")
    if subprocess.run(["unshare", "-n", "-u", "-p", "-m", "--fork", "true"], check=False).returncode != 0:
        pytest.skip("the cluster needs namespaces, which this container may not make")
    lab = Path(f"/tmp/slurmlab-{os.getpid()}")
    done = script(lab, "install", timeout_seconds=300)
    if done.returncode != 0:
        pytest.skip(f"slurm-wlm and munge are not installed, and apt-get cannot fetch them: {done.stderr[-200:]}")
    done = script(lab, "up")
    try:
        assert done.returncode == 0, done.stderr
        outside = {"SLURM_CONF": f"{lab}/etc/outside.conf", "PATH": f"{lab}/bin:{os.environ['PATH']}"}
        yield {**rank_environment(), **outside}
    finally:
        assert script(lab, "wipe").returncode == 0
        assert not lab.exists()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where jobs are launched from, with a name that must never reach a shell unquoted."""
    folder = tmp_path_factory.mktemp("slurm") / HOSTILE
    folder.mkdir()
    site = yaml.safe_load((REPO / "slurm" / "clusters" / "cpu.yaml").read_text())
    site["slurm"] = {"time": "00:05:00", "extra": ["--nodelist=n1,n2"], "setup": ["echo set up on $(uname -n)"]}
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    return folder


@pytest.fixture(scope="module")
def write_spec(root: Path, corpus: Path) -> Callable[..., Path]:
    """`write_spec(name, strategy)`: the file of a job for 2 nodes with one rank each; its data are prepared."""

    def write(name: str, strategy: str, **overrides: Any) -> Path:
        nodes = {"name": "site.yaml", "nodes": 2, "gpus_per_node": 1}
        parallel = {"strategy": strategy, "micro_batch_size": 4, "recompute": "none", "precision": "fp32"}
        values = {"data__prepared": str(root / "data"), "training__max_steps": STEPS, "cluster": nodes, **overrides}
        raw = job(Path("runs", name), corpus, "gpt", parallel=parallel, **values)
        path = root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        if "data__prepared" not in overrides:
            prepare(parse_spec(raw))
        return path

    return write


def fleetune(cluster: dict[str, str], root: Path, *words: str) -> str:
    argv = [sys.executable, "-m", "launcher", *words]
    done = subprocess.run(argv, cwd=root, env=cluster, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def launch(cluster: dict[str, str], root: Path, spec: Path) -> str:
    """`fleetune launch --via slurm`; the job's id."""
    said = fleetune(cluster, root, "launch", spec.name, "--via", "slurm")
    job_id = said.split()[2].rstrip(";")
    assert said == f"submitted job {job_id}; log: {root / 'runs' / spec.stem}/slurm-{job_id}.out\n"
    return job_id


def sbatch(cluster: dict[str, str], path: Path) -> str:
    """Plain sbatch, from another directory."""
    argv = ["sbatch", "--parsable", str(path)]
    return subprocess.run(argv, cwd="/", env=cluster, capture_output=True, text=True, check=True).stdout.strip()


def facts(cluster: dict[str, str], job_id: str) -> dict[str, str]:
    argv = ["scontrol", "-o", "show", "job", job_id]
    shown = subprocess.run(argv, env=cluster, capture_output=True, text=True, check=True).stdout
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def ended(cluster: dict[str, str], job_id: str, timeout_seconds: float = 120) -> dict[str, str]:
    end = time.monotonic() + timeout_seconds
    while (job := facts(cluster, job_id))["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
        assert time.monotonic() < end, job
        time.sleep(0.2)
    return job


def log(root: Path, name: str, job_id: str) -> str:
    return (root / "runs" / name / f"slurm-{job_id}.out").read_text()


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


def test_two_jobs_at_once_on_two_nodes_train_as_local_ranks_do(
    cluster: dict[str, str], root: Path, write_spec: Callable[..., Path]
) -> None:
    """One launched by fleetune, one by plain sbatch from another directory: same nodes, same minute, same losses."""
    ddp, fsdp, local = write_spec("ddp", "ddp"), write_spec("fsdp", "fsdp"), write_spec("local", "ddp")
    fleetune(cluster, root, "plan", fsdp.name, "--via", "slurm", "--emit", "runs/fsdp")
    ids = {"ddp": launch(cluster, root, ddp), "fsdp": sbatch(cluster, root / "runs" / "fsdp" / "job.sbatch")}
    jobs = {name: ended(cluster, job_id) for name, job_id in ids.items()}

    for name, found in jobs.items():
        assert (found["JobState"], found["NodeList"]) == ("COMPLETED", "n[1-2]"), log(root, name, ids[name])
        assert "set up on n1" in log(root, name, ids[name])
        newest = root / "runs" / name / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json"
        assert json.loads(newest.read_text())["num_ranks"] == 2
    first, second = sorted(jobs.values(), key=lambda found: found["StartTime"])
    assert second["StartTime"] < first["EndTime"], "they ran one after the other"

    out = root / "log"
    in_root = ["bash", "-c", 'cd "$0" && exec "$@"', str(root)]
    assert run_ranks([*in_root, *torchrun(2, RUN, "--spec", local.name)], out) == 0, out.read_text()[-3000:]
    expected = losses(root / "runs" / "local")
    assert len(expected) == STEPS
    assert losses(root / "runs" / "ddp") == pytest.approx(expected, rel=0, abs=1e-6)
    assert losses(root / "runs" / "fsdp") == pytest.approx(expected, rel=0, abs=1e-6)
    assert not list(root.rglob("x"))


def test_a_failing_job_ends_with_the_runs_own_code_and_one_error(
    cluster: dict[str, str], root: Path, write_spec: Callable[..., Path]
) -> None:
    """Data that were never prepared: FAILED with exit code 2, where srun and torchrun would both say 1."""
    job_id = launch(cluster, root, write_spec("unprepared", "ddp", data__prepared="nowhere"))
    found = ended(cluster, job_id)
    lines = log(root, "unprepared", job_id).splitlines()
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "2:0"), lines
    (error,) = [line for line in lines if line.startswith("error:")]
    assert "nowhere" in error
    assert lines[-1] == f"fleetune: exit code 2: {error.removeprefix('error: ')}"


def stop_at(cluster: dict[str, str], run: Path, step: int, job_id: str, *options: str) -> dict[str, str]:
    """scancel with these options once this step is recorded; the facts of the ended job."""
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or records(run)[-1]["step"] < step:
        assert time.monotonic() < end, f"job {job_id} never reached step {step}"
        time.sleep(0.1)
    subprocess.run(["scancel", *options, job_id], env=cluster, check=True)
    return ended(cluster, job_id)


def saved_step(run: Path) -> int:
    """The last recorded step, of which there must be a complete checkpoint."""
    step = int(records(run)[-1]["step"])
    assert (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()
    assert json.loads((run / "outcome.json").read_text())["exit_code"] == 75
    return step


def test_told_to_stop_saves_and_goes_on_when_submitted_again(
    cluster: dict[str, str], root: Path, write_spec: Callable[..., Path]
) -> None:
    """USR2, as `#SBATCH --signal` sends it, and then scancel's TERM: both ranks save, and the next job goes on."""
    run = root / "runs" / "stopped"
    job_id = launch(cluster, root, write_spec("stopped", "ddp", training__max_steps=1000))
    found = stop_at(cluster, run, 3, job_id, "--signal=USR2")
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "75:0"), log(root, "stopped", job_id)
    first = saved_step(run)

    again = sbatch(cluster, run / "job.sbatch")
    found = stop_at(cluster, run, first + 3, again)
    assert found["JobState"] == "CANCELLED", log(root, "stopped", again)
    second = saved_step(run)
    assert [record["step"] for record in records(run)] == list(range(1, second + 1))
    assert f"step-{first:08d}" in log(root, "stopped", again)
