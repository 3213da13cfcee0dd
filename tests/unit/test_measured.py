"""`python -m tools.calibrate measure`: the grid, what is read of a run, what is kept, and what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import EXIT_DONE, EXIT_USER, UserError
from launcher.job.load import parse_spec
from tools import measured, measured_runs
from tools.calibrate import main
from tools.measured_cases import GRIDS, STRATEGIES, GridCase, cases_of
from tools.measured_runs import DONE, FAILED, OUT_OF_MEMORY, Measured, Place, read_measured, run_cases

CASES = cases_of("cpu")


def test_the_gpu_grid_covers_what_changes_memory() -> None:
    """At least 40 cases, each strategy with and without recompute, three sizes of two families, 512 to 8192 tokens."""
    cases = cases_of("cuda")
    assert len({case.name for case in cases}) == len(cases) >= 40
    assert {(case.strategy, case.recompute) for case in cases} == {
        (name, recompute) for name in STRATEGIES for recompute in ("none", "full")
    }
    assert len({(case.family, case.size.name) for case in cases}) == 6
    assert {case.seq_len for case in cases} == {512, 2048, 8192}
    adapters = {(case.strategy, case.recompute) for case in cases if case.method == "lora"}
    assert {strategy for strategy, _ in adapters} == {"fsdp", "ddp"}
    assert {recompute for _, recompute in adapters} == {"none", "full"}


@pytest.mark.parametrize("case", [*CASES, *cases_of("cuda")], ids=lambda case: case.name)
def test_every_case_is_a_spec(case: GridCase, tmp_path: Path) -> None:
    """One that leaves no choice to the planner."""
    spec = parse_spec(case.spec(tmp_path / "run", tmp_path / "data", "cpu", 2))
    assert "auto" not in (spec.parallel.strategy, spec.parallel.micro_batch_size, spec.parallel.recompute)
    assert spec.training.global_batch_size == case.micro_batch_size * case.accumulation_steps * 2
    assert spec.parallel.precision == GRIDS["cuda" if case in cases_of("cuda") else "cpu"].precision


def write_run(folder: Path, code: int, message: str = "done", peaks: bool = False) -> None:
    """What a run leaves: its plan, its records, its outcome."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"memory": {"total_bytes": 950, "usable_bytes": 4000}, "step_time": {"seconds": 0.5}}
    (folder / "plan.json").write_text(json.dumps(plan))
    seconds = [9.0, 9.0, 9.0, 0.3, 0.4, 0.5, 0.4, 0.4]
    extra = {"peak_allocated_bytes": 800, "peak_reserved_bytes": 1000, "context_bytes": 300} if peaks else {}
    lines = [{"kind": "train", "step": n, "step_seconds": s, **extra} for n, s in enumerate(seconds, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "outcome.json").write_text(json.dumps({"exit_code": code, "message": message}))


class Runs:
    """Stands for torchrun: leaves what a run leaves, and remembers which specs it was given."""

    def __init__(self, code: int = 0, message: str = "done", peaks: bool = False) -> None:
        self.code, self.message, self.peaks = code, message, peaks
        self.started: list[str] = []

    def __call__(self, module: str, num_ranks: int, arguments: list[str], *_: object) -> int:
        assert (module, num_ranks) == ("launcher.run", 1)
        spec = Path(arguments[1])
        self.started.append(spec.stem)
        write_run(spec.with_suffix(""), self.code, self.message, self.peaks)
        return self.code


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, runs: Runs, cases: list[GridCase]) -> list[Measured]:
    monkeypatch.setattr(measured_runs, "run_ranks", runs)
    monkeypatch.setattr(measured_runs, "prepare", lambda _: None)
    return run_cases(cases, folder / "out.csv", Place(folder / "work", "cpu", 1, 1), lambda _: None)


def test_a_run_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prediction from the plan that the run obeyed; the median step after the warm-up; the peaks of its last record."""
    (row,) = run(monkeypatch, tmp_path, Runs(peaks=True), CASES[:1])
    assert (row.status, row.predicted_memory_bytes, row.usable_bytes) == (DONE, 950, 4000)
    assert (row.predicted_step_seconds, row.step_seconds) == (0.5, 0.4)
    assert (row.peak_allocated_bytes, row.peak_reserved_bytes, row.context_bytes) == (800, 1000, 300)
    assert read_measured(tmp_path / "out.csv") == [row]


def test_what_ran_out_of_memory_does_not_end_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(1, "OutOfMemoryError: CUDA out of memory")
    rows = run(monkeypatch, tmp_path, runs, CASES[:3])
    assert [row.status for row in rows] == [OUT_OF_MEMORY] * 3
    assert rows[0].predicted_memory_bytes == 950
    assert len(runs.started) == 3


def test_finished_cases_are_kept_and_failed_ones_are_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill, and after the cause of a failure was mended; cases that were not asked for stay in the file."""
    run(monkeypatch, tmp_path, Runs(), CASES[:2])
    failing = Runs(2, "method: lora is planned, but no engine runs it yet")
    assert [row.status for row in run(monkeypatch, tmp_path, failing, CASES[:3])] == [DONE, DONE, FAILED]
    assert failing.started == [CASES[2].name]
    again = Runs()
    assert [row.status for row in run(monkeypatch, tmp_path, again, CASES[1:3])] == [DONE, DONE]
    assert again.started == [CASES[2].name]
    assert [row.case for row in read_measured(tmp_path / "out.csv")] == [case.name for case in CASES[:3]]


def said(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> str:
    where = ["--out", str(folder / "out.csv"), "--work", str(folder / "work")]
    assert main(["measure", "--device", "cpu", "--cases", CASES[0].name, CASES[1].name, *where, *more]) == EXIT_DONE
    return capsys.readouterr().out


def test_where_memory_is_accounted_for_it_is_compared_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, tmp_path, Runs(peaks=True), CASES[:2])
    raw = json.loads(said(capsys, tmp_path, "--json"))
    assert {"cases", "median_abs_error", "p90_abs_error", "worst_abs_error", "impossible", "rows"} <= set(raw)
    assert (raw["cases"], raw["impossible"], raw["median_abs_error"]) == (2, 0, pytest.approx(0.05))
    assert raw["memory"]["rows"] == raw["rows"]
    assert raw["step_time"]["median_abs_error"] == pytest.approx(0.25)
    assert raw["step_time"]["rows"][0]["measured"] == 0.4
    lines = said(capsys, tmp_path).splitlines()
    assert lines[1].split()[:4] == ["line", "run", "measured", "predicted"]
    assert [line for line in lines if line.startswith("2 cases: ")] == [
        "2 cases: median 5.0%, p90 5.0%, worst 5.0%; called impossible: 0",
        "2 cases: median 25.0%, p90 25.0%, worst 25.0%; called impossible: 0",
    ]


def test_on_a_cpu_only_the_step_time_is_compared_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, tmp_path, Runs(), CASES[:1])
    run(monkeypatch, tmp_path, Runs(1, "RuntimeError: lost"), CASES[1:2])
    lines = said(capsys, tmp_path).splitlines()
    assert lines[0] == "peak memory is not compared: a CPU keeps no account of it"
    assert lines[1].split()[:4] == ["line", "run", "measured", "predicted"]
    assert lines[-1] == f"{CASES[1].name}: failed: RuntimeError: lost"
    raw = json.loads(said(capsys, tmp_path, "--json"))
    assert (raw["cases"], "memory" in raw, raw["lost"][0]["status"]) == (1, False, FAILED)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--device: cuda is not there: torch sees no GPU; give --device cpu for a small grid"),
        (["--device", "cpu", "--cases", "llama-*"], "--cases: llama-* names none of the cases; see --list"),
        (["--device", "cpu", "--cluster", "h200"], "--cluster: h200 is of cuda, not of cpu; "),
        (["--device", "cpu", "--cluster", "h2000"], "cluster.name: h2000 names no cluster file; known: a100-40"),
        (["--cluster", "h200", "--ranks", "8"], "--ranks: 8 is more than the 0 GPUs that torch sees; "),
    ],
)
def test_what_cannot_be_run_is_refused(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line, before any run is started."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["measure", *argv]) == EXIT_USER
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_gpu_of_no_file_must_be_measured_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H200 MIG 7g.141gb")
    with pytest.raises(UserError, match="fleetune doctor --write-cluster"):
        measured._cluster_of("cuda")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H200")
    assert measured._cluster_of("cuda") == "h200"


def test_the_list_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "--list", "--cases", "bert-124m-512-*"]) == EXIT_DONE
    assert capsys.readouterr().out.splitlines()[:2] == ["bert-124m-512-ddp", "bert-124m-512-ddp-recompute"]


def test_another_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("name,value\nx,1\n")
    assert main(["measure", "--device", "cpu", "--out", str(path)]) == EXIT_USER
    assert "is no table of measured cases" in capsys.readouterr().err
    assert path.read_text() == "name,value\nx,1\n"
