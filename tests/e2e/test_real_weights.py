"""Real pretrained weights on a real set, from `model.path` to a scored folder. Wants FLEETUNE_TEST_DATA."""

from __future__ import annotations

import json
import os
import sys
from itertools import islice
from pathlib import Path

import pytest
import yaml

from launcher.data.prepare import prepare
from launcher.job import parse_spec
from tests.support import records, run_ranks
from tools.convert import convert
from tools.evaluate import main as evaluate_main

DATA = Path(os.environ.get("FLEETUNE_TEST_DATA", "/nowhere"))
pytestmark = pytest.mark.skipif(
    not (DATA / "weights" / "minilm-l6-h384").is_dir(), reason="FLEETUNE_TEST_DATA names no folder with weights"
)


def as_jsonl(source: Path, target: Path, num_lines: int) -> str:
    """SST-2 comes as `sentence <tab> 0/1` without a header."""
    with source.open() as lines, target.open("w") as out:
        for line in islice(lines, num_lines):
            text, _, label = line.rstrip("\n").rpartition("\t")
            out.write(json.dumps({"text": text, "label": ["negative", "positive"][int(label)]}) + "\n")
    return str(target)


def test_minilm_learns_sst2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fp16 weights of a folder, its own tokenizer, FSDP on 2 ranks: far better than chance after 60 steps, and the
    converted folder scores exactly what the run said."""
    raw = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(DATA / "weights" / "minilm-l6-h384")},
        "task": {"name": "sequence_classification", "labels": ["negative", "positive"]},
        "data": {
            "train": as_jsonl(DATA / "cls" / "sst2" / "train.tsv", tmp_path / "train.jsonl", 3000),
            "validation": as_jsonl(DATA / "cls" / "sst2" / "dev.tsv", tmp_path / "dev.jsonl", 200),
        },
        "training": {"seq_len": 48, "global_batch_size": 16, "max_steps": 60, "lr": 2e-4, "warmup_steps": 4},
        "parallel": "fsdp",
        "cluster": {"name": "cpu", "gpus_per_node": 2},
        "seed": 3,
    }
    path, log = tmp_path / "job.yaml", tmp_path / "log"
    path.write_text(yaml.safe_dump(raw))
    prepare(parse_spec(raw))
    assert run_ranks([sys.executable, "-m", "launcher", "launch", str(path)], log) == 0, log.read_text()[-3000:]
    (scores,) = records(tmp_path / "run", "evaluation")
    assert scores["accuracy"] > 0.7, log.read_text()[-2000:]

    convert(f"dcp:{tmp_path / 'run'}", f"hf:{tmp_path / 'model'}")
    capsys.readouterr()
    assert evaluate_main([str(tmp_path / "model"), "--prepared", str(tmp_path / "run" / "data"), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["accuracy"] == scores["accuracy"]
    assert metrics["loss"] == pytest.approx(scores["loss"], rel=1e-5)
