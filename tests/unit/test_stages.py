"""Staged runs: the spec of each stage, and every mistake in `stages`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.errors import SpecError
from launcher.job import load_spec

SPEC: dict[str, Any] = {
    "output_dir": "run",
    "model": {"from_config": {"model_type": "gpt2"}},
    "task": "causal_lm",
    "data": {"train": "a.txt", "train_tokenizer": {"vocab_size": 400}},
    "training": {"seq_len": 8, "global_batch_size": 2, "max_steps": 5, "lr": 1e-3},
    "stages": [
        {"name": "first"},
        {"name": "second", "data": {"train": "b.txt"}, "training": {"num_epochs": 2}},
        {"name": "third", "task": "chat", "method": "lora", "data": {"train": "c.jsonl", "tokenizer": "own"}},
    ],
}


def spec_of(tmp_path: Path, stage: str | None, **changes: Any) -> Any:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**SPEC, **changes}))
    return load_spec(path, [f"stage={stage}"] if stage else [])


def test_a_stage_is_the_spec_with_its_own_keys_and_the_last_model(tmp_path: Path) -> None:
    first, second, third = (spec_of(tmp_path, name) for name in ("first", "second", "third"))
    assert (first.output_dir, second.output_dir, third.output_dir) == ("run/first", "run/second", "run/third")
    assert first.model.path is None
    assert (second.model.path, third.model.path) == ("run/first/model", "run/second/model")
    assert (first.data.train, second.data.train, third.data.train) == ("a.txt", "b.txt", "c.jsonl")
    assert first.data.train_tokenizer is not None
    assert second.data.train_tokenizer is None
    assert (second.data.tokenizer, third.data.tokenizer) == (None, "own")
    assert (second.training.max_steps, second.training.num_epochs, second.training.lr) == (None, 2, 1e-3)
    assert (third.task.name, third.method.name, third.training.max_steps) == ("chat", "lora", 5)


def test_a_stage_has_to_be_chosen_where_one_is_meant(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"stage: must be chosen here; --set stage=first; `fleetune launch`"):
        spec_of(tmp_path, None)
    with pytest.raises(SpecError, match="stage: fourth is none of the stages first, second, third"):
        spec_of(tmp_path, "fourth")
    with pytest.raises(SpecError, match="stage: is not a known key"):
        spec_of(tmp_path, "first", stages=[])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{}], r"stages.0.name: must be a name"),
        (["first"], r"stages.0.name: must be a name"),
        ([{"name": "../up"}], r"stages.0.name: ../up must be a name that can be a folder"),
        ([{"name": "a"}, {"name": "a"}], r"stages.1.name: a is the name of two stages"),
        ({"first": {}}, "must be a list of sections"),
    ],
)
def test_stages_that_cannot_be_told_apart_are_refused(tmp_path: Path, stages: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(tmp_path, None, stages=stages)
