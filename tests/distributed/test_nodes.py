"""`node.py`, what every node of several starts: here two of them on one machine, met over loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.attempt.records import first_failure, read_records
from launcher.data.prepare import prepare
from launcher.job import parse_spec
from launcher.spawn import free_port, ranks_below
from tests.support import REPO, job, kill_tree, rank_environment, records, started

SLOW = {"checkpoint__every_steps": 1}


@pytest.fixture(scope="module")
def write_spec(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("nodes")

    def write(name: str, **overrides: Any) -> Path:
        parallel = {"strategy": "fsdp", "recompute": "none", "precision": "fp32"}
        values = {"data__prepared": str(folder / "data"), "parallel": parallel, "training__max_steps": 30, **overrides}
        raw = job(folder / name, corpus, "gpt", **values)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        prepare(parse_spec(raw))
        return path

    return write


@contextmanager
def nodes(specs: list[Path], count: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One node for each spec, with one rank; their logs lie beside the specs."""
    port = free_port()
    with ExitStack() as stack:
        words = ["--nodes", count, "--ranks-per-node", "1", "--head", "127.0.0.1", "--port", str(port), "--id", "t"]
        yield [
            stack.enter_context(
                started(
                    [
                        sys.executable,
                        str(REPO / "launcher/node.py"),
                        *words,
                        "--node",
                        str(number),
                        "--spec",
                        str(spec),
                    ],
                    log_of(spec, number),
                )
            )
            for number, spec in enumerate(specs)
        ]


def log_of(spec: Path, node: int) -> Path:
    return spec.with_suffix(f".{node}.log")


def logs(spec: Path) -> str:
    return "".join(path.read_text() for path in sorted(spec.parent.glob(f"{spec.stem}.*.log")))


def wait_for_step(run: Path, step: int, spec: Path) -> None:
    end = time.monotonic() + 240
    while not (run / "metrics.jsonl").is_file() or len(records(run)) < step:
        assert time.monotonic() < end, logs(spec)[-3000:]
        time.sleep(0.05)


def test_nodes_with_different_specs_say_so_and_start_no_rank(write_spec: Callable[..., Path]) -> None:
    """One line, from the first node, and exit code 2 on both, before anything of torch is loaded."""
    one, other = write_spec("one"), write_spec("other", training__lr=1.0)
    with nodes([one, other], "2") as children:
        assert [child.wait(timeout=120) for child in children] == [2, 2]
    (line,) = (log_of(one, 0).read_text() + log_of(other, 1).read_text()).splitlines()
    assert "sees another job spec" in line
    assert line.startswith("error: ")
    assert json.loads((one.with_suffix("") / "outcome.json").read_text())["exit_code"] == 2
    assert not (one.with_suffix("") / "ranks").exists()


def test_an_elastic_job_goes_on_with_one_node_less_and_the_same_global_batch(write_spec: Callable[..., Path]) -> None:
    """SIGKILL of a whole node: the other plans again for one rank, and the samples of each step stay the same."""
    spec = write_spec("elastic", **SLOW)
    run = spec.with_suffix("")
    with nodes([spec, spec], "1:2") as (first, second):
        wait_for_step(run, 5, spec)
        kill_tree(second)
        assert first.wait(timeout=240) == 0, logs(spec)[-4000:]
    steps = records(run)
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert [record["samples"] for record in steps] == list(range(8, 31 * 8, 8))
    told = logs(spec)
    assert "fsdp on 2 ranks" in told
    assert "fsdp on 1 ranks" in told


def test_a_rank_killed_on_one_node_takes_the_other_down_and_is_named(write_spec: Callable[..., Path]) -> None:
    """Within 15 s, though the other rank may hang in a collective; the record says who was first."""
    spec = write_spec("killed", **SLOW)
    run = spec.with_suffix("")
    with nodes([spec, spec], "2") as children:
        wait_for_step(run, 3, spec)
        ((pid, rank),) = ranks_below(children[1].pid).items()  # on one machine torchrun numbers nodes by process ids
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        codes = [child.wait(timeout=60) for child in children]
    assert time.monotonic() - began < 15, logs(spec)[-3000:]
    assert codes == [1, 1]
    failure = first_failure(read_records(run))
    assert failure is not None
    assert (failure.rank, failure.state) == (rank, "killed"), logs(spec)[-3000:]


def test_told_to_stop_while_scoring_saves_and_scores_later(write_spec: Callable[..., Path], tmp_path: Path) -> None:
    """The evaluation of 200 samples is cut short, the step before it is saved; started again, it is scored first."""
    spec = write_spec(
        "scoring",
        cluster__gpus_per_node=1,
        training__max_steps=3,
        evaluation__every_steps=1,
        data__validation_fraction=0.6,
        data__prepared=str(tmp_path / "data"),
        parallel__micro_batch_size=1,
    )
    run, log = spec.with_suffix(""), tmp_path / "log"
    command = [sys.executable, str(REPO / "launcher" / "run.py"), "--spec", str(spec)]
    with started(command, log) as child:
        wait_for_step(run, 1, spec)
        child.send_signal(signal.SIGUSR2)
        assert child.wait(timeout=60) == 75, log.read_text()[-3000:]
    assert records(run, "evaluation") == []
    assert [record["step"] for record in records(run)] == [1]
    with started(command, log) as child:
        assert child.wait(timeout=120) == 0, log.read_text()[-3000:]
    assert [record["step"] for record in records(run, "evaluation")] == [1, 2, 3]


BODY = """
import os, sys, time
from launcher.train.preempt import StopFlag
stop = StopFlag()
stop.install(lambda: os._exit(75), patience_seconds=0.5)
stop.has_begun = sys.argv[1] == "begun"
print("ready", flush=True)
time.sleep(3)
os._exit(7)
"""


@pytest.mark.parametrize(("begun", "code"), [("not-begun", 75), ("begun", 7)])
def test_before_the_first_step_a_rank_leaves_by_itself(begun: str, code: int) -> None:
    """Whatever its main thread is at, a compiler say; once a step was done, the loop decides."""
    argv = [sys.executable, "-c", BODY, begun]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=rank_environment()) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGUSR2)
        assert child.wait(timeout=30) == code
