"""The rendered script on a real Slurm of three nodes, each with its own network and processes (`lab.sh`).

All jobs are submitted at once and overlap; what befalls each is done to it when it has come to a certain step. The last
test prints the table of drills: `pytest tests/slurm -s`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launcher.attempt.chain import Attempt, attempts
from launcher.data.prepare import prepare
from launcher.job import parse_spec
from tests.support import REPO, job, rank_environment, records, run_ranks, torchrun

LAB = Path(__file__).with_name("lab.sh")
RUN = REPO / "launcher" / "run.py"
HOSTILE = 'it\'s "my" $(touch x) #1;& 50% é'
STEPS = 40
SLOW = {"checkpoint__every_steps": 1}
"""A checkpoint after every step: time enough to meet a run in the middle of it, and the same losses."""


def script(lab: Path, *command: str, timeout_seconds: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LAB": str(lab)}
    argv = [str(LAB), *command]
    log = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False}
    return subprocess.run(argv, env=environment, timeout=timeout_seconds, **log)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def lab() -> Path:
    """Folder of the cluster."""
    return Path(f"/tmp/slurmlab-{os.getpid()}")


@pytest.fixture(scope="module")
def cluster(lab: Path) -> Iterator[dict[str, str]]:
    """The environment of a login node of a cluster that is gone afterwards."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("dpkg") is None:
        pytest.skip("the cluster needs root, for namespaces, on Debian or Ubuntu, for Slurm's packages")
    if subprocess.run(["unshare", "-n", "-u", "-p", "-m", "--fork", "true"], check=False).returncode != 0:
        pytest.skip("the cluster needs namespaces, which this container may not make")
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
    told: dict[str, Any] = {"time": "00:10:00", "cpus_per_task": 4, "setup": ["echo set up on $(uname -n)"]}
    sites = {
        "site": {**told, "extra": ["--nodelist=n1,n2"]},
        "anywhere": told,
        "limited": {**told, "time": "00:04:00", "extra": ["--signal=USR2@200"]},
        "no-partition": {**told, "partition": "gpu"},
        "no-venv": {**told, "venv": "/opt/nowhere"},
    }
    (folder / "sites").mkdir()
    for name, slurm in sites.items():
        (folder / "sites" / f"{name}.yaml").write_text(yaml.safe_dump({**site, "slurm": slurm}))
    return folder


@pytest.fixture(scope="module")
def write_spec(root: Path, corpus: Path) -> Callable[..., Path]:
    """`write_spec(name, strategy)`: the file of a job for 2 nodes with one rank each; its data are prepared."""

    def write(name: str, strategy: str, nodes: int = 2, site: str = "site", **overrides: Any) -> Path:
        cluster = {"name": f"sites/{site}.yaml", "nodes": nodes, "gpus_per_node": 1}
        parallel = {"strategy": strategy, "micro_batch_size": 4, "recompute": "none", "precision": "fp32"}
        values = {
            "data__prepared": str(root / "data"),
            "training__max_steps": STEPS,
            "evaluation__max_samples": 8,
            "cluster": cluster,
            **overrides,
        }
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


def launch(cluster: dict[str, str], root: Path, spec: Path, *words: str) -> str:
    """`fleetune launch --via slurm`; the ids of the jobs."""
    said = fleetune(cluster, root, "launch", spec.name, "--via", "slurm", *words)
    return " ".join(line.split()[2].rstrip(";") for line in said.splitlines())


def sbatch(cluster: dict[str, str], path: Path) -> str:
    """Plain sbatch, from another directory."""
    argv = ["sbatch", "--parsable", str(path)]
    return subprocess.run(argv, cwd="/", env=cluster, capture_output=True, text=True, check=True).stdout.strip()


def facts(cluster: dict[str, str], job_id: str) -> dict[str, str]:
    argv = ["scontrol", "-o", "show", "job", job_id]
    shown = subprocess.run(argv, env=cluster, capture_output=True, text=True, check=False).stdout
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def step_of(run: Path) -> int:
    try:
        return int(records(run)[-1]["step"])
    except (OSError, IndexError, ValueError):
        return 0


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


def curve(run: Path) -> list[tuple[int, float, float]]:
    """What has to be the same bit for bit."""
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records(run)]


def rank_process(name: str, rank: int) -> psutil.Process:
    """As the host sees it, from outside of the node."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:2] != ["-u"] or not any(word.endswith(f"/{name}.yaml") for word in words):
            continue
        with suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank):
                return process
    raise AssertionError(f"no rank {rank} of {name}")


@dataclass
class Drill:
    """What befell one run."""

    name: str
    what: str
    at: float = 0.0
    """When, in seconds since the epoch."""
    step: int = 0
    """Recorded by then."""


@dataclass
class Campaign:
    ids: dict[str, str]
    states: dict[str, dict[str, str]]
    drills: dict[str, Drill]
    root: Path

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def log(self, name: str) -> str:
        return "".join(path.read_text() for path in sorted(self.run(name).glob("slurm-*.out")))

    def chain(self, name: str) -> list[Attempt]:
        return attempts(self.run(name))


@pytest.fixture(scope="module")
def campaign(cluster: dict[str, str], lab: Path, root: Path, write_spec: Callable[..., Path]) -> Campaign:
    """Submits everything, does to each what is planned for it, and waits until the queue is empty."""
    drills = {
        "signalled": Drill("signalled", "USR2 to the job, as --signal sends it"),
        "killed": Drill("killed", "kill -9 of rank 1"),
        "cancelled": Drill("cancelled", "scancel"),
    }
    done = Campaign(submitted(cluster, root, write_spec), {}, drills, root)
    befall(done, cluster, lab)
    for name, job_ids in done.ids.items():
        done.states[name] = facts(cluster, job_ids.split()[-1])
    return done


def submitted(cluster: dict[str, str], root: Path, write_spec: Callable[..., Path]) -> dict[str, str]:
    """Job ids by name; those of a chain with blanks between them."""
    fsdp = write_spec("fsdp", "fsdp")
    fleetune(cluster, root, "plan", fsdp.name, "--via", "slurm", "--emit", "runs/fsdp")
    ids = {"ddp": launch(cluster, root, write_spec("ddp", "ddp"))}
    ids["fsdp"] = sbatch(cluster, root / "runs" / "fsdp" / "job.sbatch")
    for name, options in {
        "signalled": SLOW,
        "killed": SLOW,
        "cancelled": {**SLOW, "training__max_steps": 1000},
        "unprepared": {"data__prepared": "nowhere"},
        "no-venv": {"site": "no-venv"},
        "limited": {**SLOW, "site": "limited", "nodes": 1},
    }.items():
        ids[name] = launch(cluster, root, write_spec(name, "ddp", **options))
    ids["seeds"] = launch(cluster, root, write_spec("seeds", "ddp", nodes=1, site="anywhere"), "--array", "seed=11,12")
    chained = write_spec("chained", "ddp", nodes=1, site="anywhere", training__max_steps=4)
    ids["chained"] = launch(cluster, root, chained, "--chain", str(root / "model"))
    return ids


def befall(done: Campaign, cluster: dict[str, str], lab: Path) -> None:
    waiting, paused, stopped_controller = dict(done.drills), None, False
    end = time.monotonic() + 900  # Slurm waits by its own timers, and a busy machine trains slowly
    while squeue(cluster):
        assert time.monotonic() < end, squeue(cluster)
        if paused is None and step_of(done.run("limited")) >= 5:
            paused = rank_process("limited", 0)
            paused.suspend()  # until Slurm has signalled, which it does 200 s before the limit, give or take 30
        elif paused is not None and time.time() > done.chain("limited")[0].began + 75 and paused.is_running():
            with suppress(psutil.NoSuchProcess):
                paused.resume()
        for name in [name for name in waiting if step_of(done.run(name)) >= 5]:
            strike(done, waiting.pop(name), cluster)
        if not (stopped_controller or waiting):
            stopped_controller = True
            assert script(lab, "stop-ctld").returncode == 0
            time.sleep(2)
            assert script(lab, "start-ctld").returncode == 0
        time.sleep(0.3)
    assert not waiting, f"never came to step 5: {[done.log(name)[-1500:] for name in waiting]}"


def strike(done: Campaign, drill: Drill, cluster: dict[str, str]) -> None:
    drill.at, drill.step = time.time(), step_of(done.run(drill.name))
    if drill.name == "killed":
        rank_process("killed", 1).kill()
        return
    option = ["--signal=USR2"] if drill.name == "signalled" else []
    subprocess.run(["scancel", *option, done.ids[drill.name]], env=cluster, check=True)


def squeue(cluster: dict[str, str]) -> str:
    shown = subprocess.run(["squeue", "-h"], env=cluster, capture_output=True, text=True, check=False)
    return shown.stdout.strip() or ("?" if shown.returncode else "")


def test_two_jobs_at_once_on_two_nodes_train_as_local_ranks_do(
    campaign: Campaign, root: Path, write_spec: Callable[..., Path]
) -> None:
    """One launched by fleetune, one by plain sbatch from another directory: same nodes, same minute, same losses."""
    jobs = {name: campaign.states[name] for name in ("ddp", "fsdp")}
    for name, found in jobs.items():
        assert (found["JobState"], found["NodeList"]) == ("COMPLETED", "n[1-2]"), campaign.log(name)
        assert "set up on n1" in campaign.log(name)
        newest = campaign.run(name) / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json"
        assert json.loads(newest.read_text())["num_ranks"] == 2
    first, second = sorted(jobs.values(), key=lambda found: found["StartTime"])
    assert second["StartTime"] < first["EndTime"], "they ran one after the other"

    out = root / "log"
    in_root = ["bash", "-c", 'cd "$0" && exec "$@"', str(root)]
    local = write_spec("local", "ddp")
    assert run_ranks([*in_root, *torchrun(2, RUN, "--spec", local.name)], out) == 0, out.read_text()[-3000:]
    expected = losses(root / "runs" / "local")
    assert len(expected) == STEPS
    assert losses(campaign.run("ddp")) == pytest.approx(expected, rel=0, abs=1e-6)
    assert losses(campaign.run("fsdp")) == pytest.approx(expected, rel=0, abs=1e-6)
    assert not list(root.rglob("x"))


def test_told_to_stop_saves_requeues_itself_and_ends_with_the_same_curve(campaign: Campaign) -> None:
    """USR2, as `#SBATCH --signal` sends it: all ranks save, the script queues itself again, nothing is trained twice."""
    first, second = campaign.chain("signalled")
    assert (first.exit_code, first.action, second.exit_code) == (75, "restart", 0), campaign.log("signalled")
    assert first.steps is not None
    assert second.steps == (first.steps[1], STEPS)
    assert first.job == second.job == campaign.ids["signalled"]
    assert curve(campaign.run("signalled")) == curve(campaign.run("ddp"))


def test_the_time_limit_itself_signals_and_the_job_goes_on(campaign: Campaign) -> None:
    """Slurm's own --signal before the limit, as often as it comes; the curve of a run that never stopped."""
    chain = campaign.chain("limited")
    assert len(chain) >= 2, campaign.log("limited")
    assert {attempt.exit_code for attempt in chain[:-1]} == {75}
    assert chain[-1].exit_code == 0
    assert curve(campaign.run("limited")) == curve(campaign.run("seeds") / "trial-000")


def test_a_killed_rank_takes_the_job_down_within_15_s_and_its_error_is_on_top(campaign: Campaign) -> None:
    """SIGKILL of rank 1: its node says so, the others follow; queued again, it ends with the same curve."""
    first, second = campaign.chain("killed")
    assert first.ended is not None
    assert first.ended - campaign.drills["killed"].at < 15
    assert first.message.startswith("rank 1 on n2 "), campaign.log("killed")
    assert "killed" in first.message
    assert (first.exit_code, second.exit_code, first.failed_node) == (1, 0, "n2")
    assert "fleetune: exit code 1: rank 1 on n2 " in campaign.log("killed")
    assert curve(campaign.run("killed")) == curve(campaign.run("ddp"))


def test_scancel_saves_and_is_not_queued_again(campaign: Campaign) -> None:
    assert campaign.states["cancelled"]["JobState"] == "CANCELLED", campaign.log("cancelled")
    step = step_of(campaign.run("cancelled"))
    assert (campaign.run("cancelled") / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()
    assert json.loads((campaign.run("cancelled") / "outcome.json").read_text())["exit_code"] == 75
    assert len(campaign.chain("cancelled")) == 1


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [("unprepared", "2:0", "nowhere"), ("no-venv", "1:0", "/opt/nowhere holds no Python environment; make it")],
)
def test_a_mistake_is_one_clear_line(name: str, code: str, words: str, campaign: Campaign) -> None:
    """FAILED with the run's own code, where srun and torchrun would both say 1."""
    found = campaign.states[name]
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", code), campaign.log(name)
    (error,) = [line for line in campaign.log(name).splitlines() if line.startswith("error:")]
    assert words in error


@pytest.mark.parametrize(
    ("site", "nodes", "words"),
    [
        ("no-partition", 2, "slurm.partition: gpu is no partition here; known: main"),
        ("anywhere", 64, "cluster.nodes: 64 is more than the 3 nodes of partition main; ask for fewer"),
    ],
)
def test_what_this_slurm_cannot_give_is_refused_before_it_is_submitted(
    site: str, nodes: int, words: str, cluster: dict[str, str], root: Path, write_spec: Callable[..., Path]
) -> None:
    spec = write_spec(f"refused-{nodes}", "ddp", nodes=nodes, site=site, training__global_batch_size=64 * 8)
    argv = [sys.executable, "-m", "launcher", "launch", spec.name, "--via", "slurm"]
    done = subprocess.run(argv, cwd=root, env=cluster, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert words in done.stderr


def test_an_array_trains_each_seed_in_a_folder_of_its_own(campaign: Campaign) -> None:
    first, second = (curve(campaign.run("seeds") / f"trial-{number:03d}") for number in range(2))
    assert len(first) == len(second) == STEPS
    assert first != second


def test_train_convert_evaluate_are_three_jobs(campaign: Campaign, root: Path) -> None:
    """Each starts when the one before it is done; the last one's scores are in its log."""
    assert len(campaign.ids["chained"].split()) == 3
    assert campaign.states["chained"]["JobState"] == "COMPLETED", campaign.log("chained")
    assert (root / "model" / "config.json").is_file()
    (log,) = campaign.run("chained").glob("evaluate-*.out")
    assert "perplexity" in log.read_text()


def test_status_shows_the_chain_as_one_run(campaign: Campaign, cluster: dict[str, str], root: Path) -> None:
    shown = fleetune(cluster, root, "status", "runs/signalled")
    assert shown.splitlines()[0] == "runs/signalled: done"
    assert "2 attempts" in shown
    told = json.loads(fleetune(cluster, root, "status", "runs/killed", "--json"))
    assert (told["state"], told["step"], len(told["attempts"])) == ("done", STEPS, 2)


SSHD = """\
Port 22
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
AcceptEnv *
"""
SSH = """\
Host *
  IdentityFile {folder}/user
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


@pytest.fixture(scope="module")
def ssh_config(cluster: dict[str, str], lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """sshd on n1 and n2, and the settings of a client that reaches them without a password."""
    folder = tmp_path_factory.mktemp("ssh")
    folder.chmod(0o700)
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-N", "", "-t", "ed25519", "-f", str(folder / key)], check=True)
    (folder / "sshd").write_text(SSHD.format(folder=folder))
    (folder / "ssh").write_text(SSH.format(folder=folder))
    servers = [
        subprocess.Popen(on_node(lab, node, ["/usr/sbin/sshd", "-D", "-f", str(folder / "sshd")]))
        for node in ("n1", "n2")
    ]
    yield folder / "ssh"
    for server in servers:
        server.terminate()
        server.wait()


def on_node(lab: Path, node: str, argv: list[str]) -> list[str]:
    return ["env", f"LAB={lab}", str(LAB), "on", node, *argv]


def test_torchrun_and_deepspeed_over_ssh_train_the_same(
    cluster: dict[str, str], lab: Path, ssh_config: Path, root: Path, corpus: Path, write_spec: Callable[..., Path]
) -> None:
    """Started on n1 for n1 and n2: torchrun, DeepSpeed's node launcher, and DeepSpeed's own runner over pdsh."""
    found = {}
    plain = Path(tempfile.mkdtemp(dir="/tmp", prefix="plain-"))  # pdsh's runner quotes nothing
    for name, via, remote in (("t", "torchrun", "ssh"), ("d", "deepspeed", "ssh"), ("p", "deepspeed", "pdsh")):
        spec = write_spec(f"by-{name}", "zero1", training__max_steps=4)
        where = root
        if remote == "pdsh":
            raw = yaml.safe_load(spec.read_text())
            raw["data"]["prepared"] = str(shutil.copytree(root / "data", plain / "data"))
            shutil.copytree(root / "sites", plain / "sites")
            spec, where = plain / spec.name, plain
            spec.write_text(yaml.safe_dump(raw))
        words = ["launch", spec.name, "--via", via, "--hosts", "n1,n2", "--set", f"launch.remote={remote}"]
        words += ["--set", f"launch.ssh_options=[-F, {ssh_config}]"]
        argv = ["env", "-C", str(where), sys.executable, "-m", "launcher", *words]
        secret = {**cluster, "HF_TOKEN": "never-written"}
        done = subprocess.run(on_node(lab, "n1", argv), env=secret, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "never-written" not in done.stdout + done.stderr
        found[name] = curve(where / "runs" / f"by-{name}")
        hosts = {
            json.loads(path.read_text())["host"] for path in (where / "runs" / f"by-{name}" / "ranks").glob("*.json")
        }
        assert hosts == {"n1", "n2"}
        written = [path for path in (where / "runs" / f"by-{name}").rglob("*") if path.is_file()]
        assert not [path for path in written if b"never-written" in path.read_bytes()]
    shutil.rmtree(plain)
    assert len(found["t"]) == 4
    assert found["t"] == found["d"] == found["p"]


@pytest.fixture(scope="module")
def power_cut(campaign: Campaign, cluster: dict[str, str], lab: Path, write_spec: Callable[..., Path]) -> Drill:
    """A node without power in mid-step; Slurm finds out by its own timers and queues the job again, on the others."""
    drill = Drill("power", "power of n2 cut")
    campaign.ids["power"] = launch(cluster, campaign.root, write_spec("power", "ddp", site="anywhere", **SLOW))
    end = time.monotonic() + 120
    while step_of(campaign.run("power")) < 5:
        assert time.monotonic() < end, campaign.log("power")
        time.sleep(0.1)
    drill.at, drill.step = time.time(), step_of(campaign.run("power"))
    assert script(lab, "crash", "n2").returncode == 0
    while squeue(cluster):
        assert time.monotonic() < end + 120, squeue(cluster) + campaign.log("power")
        time.sleep(0.3)
    campaign.states["power"] = facts(cluster, campaign.ids["power"])
    campaign.drills["power"] = drill
    return drill


def test_a_power_cut_costs_only_the_steps_after_the_last_checkpoint(power_cut: Drill, campaign: Campaign) -> None:
    assert campaign.states["power"]["NodeList"] == "n[1,3]", campaign.log("power")
    chain = campaign.chain("power")
    assert chain[-1].exit_code == 0, campaign.log("power")
    assert chain[-1].steps is not None
    assert curve(campaign.run("power")) == curve(campaign.run("ddp"))


def test_the_table_of_drills(power_cut: Drill, campaign: Campaign, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed with -s: what was killed, how long until a step was trained again, how many were trained twice."""
    lines = ["drill      | what befell it                        | s to recover | steps lost | curve identical"]
    for name, drill in campaign.drills.items():
        if name == "cancelled":
            continue
        again = next(attempt for attempt in campaign.chain(name) if attempt.began > drill.at)
        assert again.steps is not None
        lost = max(0, drill.step - _resumed_from(campaign.run(name), again))
        same = curve(campaign.run(name)) == curve(campaign.run("ddp"))
        seconds = again.began - drill.at
        lines.append(f"{name:10} | {drill.what:37} | {seconds:12.1f} | {lost:10d} | {'yes' if same else 'NO'}")
        assert lost <= 2, "a checkpoint is made after every step"
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def _resumed_from(run: Path, attempt: Attempt) -> int:
    """The newest checkpoint when it began, as its log says it."""
    found = [
        int(step)
        for step in re.findall(
            r"resuming from \S*.*?step-(\d+):", "".join(path.read_text() for path in run.glob("slurm-*.out"))
        )
    ]
    return found[-1] if found else 0
