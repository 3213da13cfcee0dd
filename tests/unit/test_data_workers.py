"""Preparing with many processes: the same bytes, nothing lost to a kill, and nobody harms a neighbour."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.data.building import Building, locked
from launcher.data.prepare import prepare
from launcher.data.prepared import open_prepared
from launcher.data.workers import run_over
from launcher.errors import ABSENT, DataError, FleetuneError, Interrupted
from launcher.job.spec import JobSpec
from tests.support import REPO
from tests.unit.test_data_prepare import files_of, sentence, spec_of, write_rows

PREPARE = """
import json, sys
from launcher.data.prepare import prepare
from launcher.job.load import parse_spec
prepare(parse_spec(json.load(sys.stdin)), num_workers=int(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), range(5500))
    return Path("rows.jsonl")


def started(spec: JobSpec, num_workers: int = 2, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, str(num_workers)]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    child = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment, **options)
    assert child.stdin is not None
    child.stdin.write(spec.model_dump_json())
    child.stdin.close()
    return child


class Doubled:
    def __init__(self, setting: int) -> None:
        self.setting = setting

    def __call__(self, item: int) -> tuple[int, int]:
        if item == self.setting:
            raise DataError(f"item {item}", ABSENT, "will not do", "give another")
        if item == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * 2, os.getpid()


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_every_item_is_worked_on_once(num_workers: int) -> None:
    answers = list(run_over(Doubled, -5, range(50), num_workers))
    assert sorted(answer for answer, _ in answers) == list(range(0, 100, 2))
    pids = {pid for _, pid in answers}
    assert (pids == {os.getpid()}) if num_workers == 1 else os.getpid() not in pids
    assert not any(psutil.pid_exists(pid) for pid in pids - {os.getpid()})


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_of_the_work_is_raised_as_it_was(num_workers: int) -> None:
    with pytest.raises(DataError) as caught:
        list(run_over(Doubled, 7, range(50), num_workers))
    assert str(caught.value) == "item 7: will not do; give another"
    assert caught.value.problems[0].value is ABSENT


def test_an_error_of_the_items_is_raised() -> None:
    def items() -> Any:
        yield 1
        raise DataError("a.txt:3", "x", "is bad", "mend it")

    with pytest.raises(DataError, match=r"a\.txt:3"):
        list(run_over(Doubled, -5, items(), 2))


def test_a_worker_that_is_killed_is_told() -> None:
    with pytest.raises(FleetuneError, match="ended with code -9, perhaps for want of memory"):
        list(run_over(Doubled, -5, [1, -1, 2], 2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data": {"packing": "none"}},
        {"task": "sequence_classification"},
        {"data": {"validation": "rows.jsonl"}},
        {"training": {"seq_len": 5000}},
    ],
    ids=str,
)
def test_the_same_bytes_from_any_number_of_workers(options: dict[str, Any]) -> None:
    spec = spec_of(**options)
    made = []
    for num_workers in (1, 2, 3):
        info = prepare(spec, force=True, num_workers=num_workers)
        made.append(files_of(info.folder))
        assert os.listdir("out") == ["data"]
    assert made[0] == made[1] == made[2]
    assert open_prepared(spec, verify=True).split("train").num_tokens > 30_000


def finished(folder: Path) -> list[str]:
    journal = folder / "finished.jsonl"
    return journal.read_text().splitlines() if journal.is_file() else []


def test_a_killed_prepare_goes_on_where_it_stopped(rows: Path) -> None:
    """SIGKILL with half of the chunks done: their files are used, the others made, the workers gone, and no litter left."""
    write_rows(rows, range(40_000))
    spec = spec_of()
    building = Path("out/data.building")
    child = started(spec)
    deadline = time.monotonic() + 120
    while sum("train-" in line for line in finished(building)) < 15:
        assert child.poll() is None, "it was done before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(child.pid).children(recursive=True)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() for worker in workers)
    assert not Path("out/data").exists()

    chunks = {path.name: path.stat().st_mtime_ns for path in building.glob("chunks/*.arrow")}
    done = [json.loads(line) for line in finished(building)[1:]]
    names = {Path(part["file"]).name for entry in done for part in entry.get("files", ()) if "split" in part}
    damaged = {name for name in names if name.startswith("train-000000")}
    path = building / "chunks" / sorted(damaged)[0]
    path.write_bytes(path.read_bytes()[:-1])
    seen: dict[str, int] = {}

    def look(stage: str, number: int) -> None:
        if stage == "writing train":
            seen.update({path.name: path.stat().st_mtime_ns for path in building.glob("chunks/*.arrow")})

    resumed = prepare(spec, progress=look)
    assert len(names) >= 25
    assert len(seen) == 80
    assert {name: seen[name] for name in names - damaged} == {name: chunks[name] for name in names - damaged}
    assert all(seen[name] != chunks[name] for name in damaged), "a chunk that is not as it was is made again"
    assert os.listdir("out") == ["data"]
    whole = files_of(resumed.folder)
    assert files_of(prepare(spec, force=True).folder) == whole


def test_what_was_begun_from_another_input_is_not_used(rows: Path) -> None:
    building = Building(Path("out/data"), "another fingerprint")
    (building.folder / "chunks").mkdir()
    building.note("train-000000", {"origin": "5500 records", "files": []})
    prepare(spec_of())
    assert os.listdir("out") == ["data"]
    assert open_prepared(spec_of(), verify=True).index["splits"]["train"]["num_records"] > 4000


def test_a_journal_that_a_kill_cut_is_read_up_to_there(tmp_path: Path) -> None:
    building = Building(tmp_path / "x", "f")
    for name in ("a", "b"):
        building.note(name, {"n": name})
    journal = building.folder / "finished.jsonl"
    journal.write_text(journal.read_text() + '{"name": "c", "n')
    again = Building(tmp_path / "x", "f")
    assert [again.found(name) for name in "abc"] == [{"name": "a", "n": "a"}, {"name": "b", "n": "b"}, None]
    again.note("c", {"n": "c"})
    assert Building(tmp_path / "x", "f").found("c") == {"name": "c", "n": "c"}


def test_two_at_once_make_one(rows: Path) -> None:
    """The second waits for the first, and finds what it made."""
    write_rows(rows, range(20_000))
    spec = spec_of()
    both = [started(spec, 1), started(spec, 1)]
    assert [child.wait(timeout=120) for child in both] == [0, 0]
    assert os.listdir("out") == ["data"]
    prepared = open_prepared(spec, verify=True)
    assert sum(prepared.index["splits"][split]["num_records"] for split in prepared.index["splits"]) == 20_000


def test_the_lock_is_free_again_when_its_holder_was_killed(tmp_path: Path) -> None:
    body = "import sys, time; from pathlib import Path; from launcher.data.building import locked\n"
    body += "with locked(Path(sys.argv[1]), print):\n    print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", body, str(tmp_path / "x")]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        child.kill()
    waited: list[bool] = []
    with locked(tmp_path / "x", lambda: waited.append(True)):
        assert waited == []
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_full_disk_stops_cleanly_and_is_gone_on_from(rows: Path, num_workers: int) -> None:
    """The limit on a file's size stands for the disk: the error of a write is of the same kind."""
    rows.write_text("".join(json.dumps({"text": (sentence(n) + " ") * 40}) + "\n" for n in range(5500)))
    spec = spec_of()

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    child = started(spec, num_workers, preexec_fn=small_files, stderr=subprocess.PIPE)
    assert child.stderr is not None
    told = child.stderr.read()
    assert child.wait() == 1
    assert "launcher.errors.Interrupted: out/data: cannot be written (" in told.splitlines()[-1]
    assert told.splitlines()[-1].endswith(
        "; make room or mend the file system, and start the same command again: it goes on where it stopped"
    )
    assert sorted(os.listdir("out")) == ["data.building"]
    assert prepare(spec).is_new
    assert os.listdir("out") == ["data"]


def test_an_interruption_is_the_users_error() -> None:
    error = Interrupted("a", ABSENT, "b", "c")
    assert (error.exit_code, str(error)) == (2, "a: b; c")
