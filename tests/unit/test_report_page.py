"""`fleetune report`: what a run wrote down, on one page that fetches nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UserError
from launcher.plan import make_plan
from launcher.train.manifest import VERSION, Manifest
from tests.browser import drawn, fetched_by, mean_shade
from tests.unit.costs import cluster_of, small_cost, spec_of
from tools.report.__main__ import main
from tools.report.figures import MOST_POINTS, median_wait_seconds, smoothed, thinned
from tools.report.record import read_run
from tools.report.write import differences, report_html

NOW = datetime(2026, 11, 28, 10, 0)
HOSTILE = "run <script>alert(1)</script> & co"


def write_run(folder: Path, lr: float = 1e-3, num_records: int = 30, **more: Any) -> Path:
    """A folder as a run leaves it: plan, metrics, one checkpoint's manifest, data, outcome."""
    spec = spec_of(training={"seq_len": 10, "global_batch_size": 8, "max_steps": 300, "lr": lr})
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(make_plan(spec, small_cost(), cluster_of(10**7)).to_json()))
    lines = [
        {"kind": "train", "step": 10 * n, "loss": 4 / n, "lr": lr / n, "grad_norm": 1.0, "tokens_per_second": 900.0 + n}
        | {"seconds": 5.0, "step_seconds": 0.5, "data_wait_seconds": 0.2, **more}
        for n in range(1, num_records + 1)
    ]
    lines += [{"kind": "evaluation", "step": step, "loss": 300 / step, "accuracy": step / 600} for step in (100, 300)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = Manifest(
        version=VERSION,
        step=300,
        strategy="ddp",
        engine="torch",
        num_ranks=2,
        cursor={},
        plan_digest="0" * 12,
        spec=spec.model_dump(mode="json"),
        versions={"torch": "2.13.0"},
        files={},
    )
    step = folder / "checkpoints" / "step-00000300"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text(json.dumps(asdict(manifest)))
    split = {"num_samples": 1234, "num_tokens": 12340, "num_records": 1200}
    (folder / "data").mkdir()
    (folder / "data" / "index.json").write_text(json.dumps({"fingerprint": "f00d", "splits": {"train": split}}))
    (folder / "outcome.json").write_text(json.dumps({"exit_code": 0, "message": "done", "time": 0}))
    return folder


def test_what_the_run_wrote_is_on_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the optional extra `plot` is not installed")
    run = read_run(write_run(tmp_path / "first"))
    text = report_html([run], NOW)
    assert fetched_by(text) == []
    for said in (
        "300 of 300",
        "0.1333",
        "first",
        "1,234",
        "f00d",
        "torch 2.13.0",
        "lr: 0.001",
        "fleetune launch job.yaml",
    ):
        assert said in text, said
    assert "measured 500 ms in the median" in text
    assert "Nothing was measured" in text, "a CPU has no allocator to ask"
    assert text == report_html([run], NOW)


def test_measured_memory_stands_beside_the_plan(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the optional extra `plot` is not installed")
    run = read_run(write_run(tmp_path / "first", peak_reserved_bytes=2**20))
    total = run.plan["memory"]["total_bytes"]
    assert f"measured 1.00 MiB ({2**20 / total - 1:+.0%})" in report_html([run], NOW)


def test_scores_with_intervals_come_from_the_evaluation(tmp_path: Path) -> None:
    """Of `fleetune eval`, where its results lie in the folder; else the run's own last ones."""
    pytest.importorskip("matplotlib", reason="the optional extra `plot` is not installed")
    folder = write_run(tmp_path / "first")
    assert "the run itself, step 300" in report_html([read_run(folder)], NOW)
    row = {"metric": "f1", "value": 0.81234, "low": 0.78, "high": 0.84, "n": 872}
    (folder / "model").mkdir()
    (folder / "model" / "results.json").write_text(json.dumps({"results": [row, {"metric": "auroc", "value": None}]}))
    text = report_html([read_run(folder)], NOW)
    assert "the run itself" not in text
    for said in ("0.8123", "0.78 to 0.84", "872", "model/results.json"):
        assert said in text


def test_runs_are_compared(tmp_path: Path) -> None:
    """Keys that differ, and only these; one line of each run in every picture."""
    pytest.importorskip("matplotlib", reason="the optional extra `plot` is not installed")
    runs = [read_run(write_run(tmp_path / name, lr)) for name, lr in (("first", 1e-3), ("second", 2e-3))]
    assert differences(runs) == [("training.lr", ["0.001", "0.002"])]
    assert report_html(runs, NOW).count("<svg") == 7


def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the optional extra `plot` is not installed")
    folder = write_run(tmp_path / "first")
    path = folder / "outcome.json"
    path.write_text(json.dumps({"exit_code": 1, "message": HOSTILE, "time": 0}))
    text = report_html([read_run(folder)], NOW)
    assert fetched_by(text) == []
    assert "failed: run &lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in text


def test_a_killed_run_has_a_report(tmp_path: Path) -> None:
    """No outcome, no checkpoint, no data any more, the last line cut short."""
    pytest.importorskip("matplotlib", reason="the optional extra `plot` is not installed")
    folder = write_run(tmp_path / "first")
    (folder / "outcome.json").unlink()
    (folder / "data" / "index.json").unlink()
    (folder / "checkpoints" / "step-00000300" / "manifest.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    text = report_html([read_run(folder)], NOW)
    assert "still running, or killed after step 300" in text
    assert "1 of metrics.jsonl" in text
    assert "not known before the first checkpoint" in text


@pytest.mark.parametrize("missing", ["plan.json", "metrics.jsonl"])
def test_another_folder_is_refused(tmp_path: Path, missing: str) -> None:
    folder = write_run(tmp_path / "first")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=rf"is not the folder of a run: it has no {missing}; name the `output_dir`"):
        read_run(folder)


def test_the_command_writes_page_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the optional extra `plot` is not installed")
    folder = write_run(tmp_path / "first")
    assert main([str(folder), "--png", str(tmp_path / "png")]) == 0
    names = {path.name for path in (tmp_path / "png").iterdir()}
    assert {"loss.png", "scores.png", "memory.png", "step-time.png", "throughput.png"} <= names
    assert f"wrote {folder / 'report.html'}\n" in capsys.readouterr().out
    assert main([str(folder), "--out", str(tmp_path / "nowhere" / "a.html")]) == 2
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("cannot be written; name a file in a folder that exists")
    assert not list(tmp_path.rglob("*.tmp"))


def test_no_spike_is_lost_where_lines_are_thinned() -> None:
    values = [1.0] * 50_000
    values[31_415], values[27_182] = 9.0, -9.0
    steps, kept = thinned(range(50_000), values)
    assert len(kept) <= MOST_POINTS + 2
    assert (max(kept), min(kept)) == (9.0, -9.0)
    assert steps == sorted(steps)
    assert thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


def test_a_smoothed_value_is_the_weighted_mean_of_what_came_before() -> None:
    values = [float(n * n % 17) for n in range(200)]
    keep = 0.5 ** (1 / (0.02 * 200))
    for place in (0, 1, 57, 199):
        weights = [keep ** (place - n) for n in range(place + 1)]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert smoothed(values)[place] == pytest.approx(expected, rel=1e-12)
    assert smoothed([]) == []


def test_waiting_is_told_per_step(tmp_path: Path) -> None:
    """0.2 s of waiting in a window of 5 s, which is ten steps of 0.5 s."""
    assert median_wait_seconds(read_run(write_run(tmp_path / "first"))) == pytest.approx(0.02)


def test_a_browser_draws_it_on_a_phone_and_in_the_dark(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the optional extra `plot` is not installed")
    page = tmp_path / "report.html"
    page.write_text(report_html([read_run(write_run(tmp_path / "first"))], NOW), encoding="utf-8")
    light, dark = tmp_path / "light.png", tmp_path / "dark.png"
    assert drawn(page, light) > 0.02
    assert drawn(page, dark, dark=True) > 0.02
    assert mean_shade(light) > 0.8
    assert mean_shade(dark) < 0.3
