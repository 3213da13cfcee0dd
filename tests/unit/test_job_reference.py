"""`fleetune explain-key`: every key is told from the fields that check it."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from launcher.errors import SpecError
from launcher.job import parse_spec
from launcher.job.other_names import OTHER_NAMES
from launcher.job.reference import explain_key, keys, reference_page
from launcher.job.spec import JobSpec

MINIMAL = {
    "output_dir": "out",
    "model": {"from_config": {"model_type": "gpt2"}},
    "task": "causal_lm",
    "data": {"train": "a.txt", "tokenizer": "t"},
    "training": {"seq_len": 8, "global_batch_size": 2, "max_steps": 1},
}


def test_every_field_of_every_section_is_told_with_its_meaning() -> None:
    told = {key.path: key for key in keys()}
    for name, field in JobSpec.model_fields.items():
        section = field.annotation
        inside = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
        for path in (name, *(f"{name}.{key}" for key in inside)):
            assert told[path].meaning, f"{path} has no docstring"
            assert explain_key(path).startswith(f"{path}\n  ")
    assert {"data.clean.nfc", "data.mixture.weight"} <= set(told), "sections inside sections, and in lists"


def test_defaults_and_bounds_are_those_of_the_check() -> None:
    assert explain_key("training.lr").endswith("\n  takes      a number > 0\n  default    5.0e-05")
    assert "default    none: it must be given" in explain_key("training.seq_len")
    assert "goes with  method lora" in explain_key("method.r")
    assert "goes with  masked_lm" in explain_key("task.whole_words")


def test_a_section_names_its_keys() -> None:
    text = explain_key("data.clean")
    assert "  data.clean.near_duplicates   Drop records whose words" in text
    assert "data.train " not in text


def test_the_page_has_every_key_once() -> None:
    page = reference_page()
    for key in keys():
        name = key.path.rpartition(".")[2]
        assert f"# `{key.path}`" in page or f"\n| `{name}` | " in page
    assert page.count("\n| `near_duplicates` | ") == 1
    assert all(line.count(" | ") >= 4 for line in page.splitlines() if line.startswith("| `"))


def test_other_trainers_names_lead_to_keys_of_ours() -> None:
    assert set(OTHER_NAMES.values()) <= {key.path for key in keys()}
    own = {key.path.rpartition(".")[2] for key in keys()}
    assert all(name not in own or target.endswith(f".{name}") for name, target in OTHER_NAMES.items())
    raw = {**MINIMAL, "training": {**MINIMAL["training"], "learning_rate": 1e-3}}  # type: ignore[dict-item]
    with pytest.raises(SpecError, match=r"training\.learning_rate: is not a known key; did you mean `training\.lr`\?"):
        parse_spec(raw)
