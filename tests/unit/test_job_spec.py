"""The spec as a value: frozen, complete, with a word on every key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from launcher.job.cluster import Cluster
from launcher.job.spec import JobSpec, Section
from tests.unit.costs import spec_of


def sections(root: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The section and all below it, also those that may be left out."""
    yield root
    for field in root.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind)


SECTIONS = [*sections(JobSpec), *sections(Cluster)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_says_what_it_means(section: type[BaseModel]) -> None:
    """The docstring under a field is what the schema, the starter and the errors show."""
    assert [name for name, field in section.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_sections_are_frozen_and_strict(section: type[BaseModel]) -> None:
    assert issubclass(section, Section)
    assert (section.model_config["frozen"], section.model_config["extra"]) == (True, "forbid")


def test_a_spec_cannot_be_altered() -> None:
    spec = spec_of()
    with pytest.raises(ValidationError, match="frozen"):
        spec.training.lr = 1.0  # type: ignore[misc]


def test_what_is_left_out_has_these_values() -> None:
    """Changing a default changes users' runs: this list is changed with it, and so is the changelog."""
    spec = spec_of()
    assert spec_of(method="lora").method.model_dump() == {
        "name": "lora",
        "r": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "use_rslora": False,
        "use_dora": False,
    }
    defaults = spec.model_dump(exclude={"output_dir", "model", "task", "data", "cluster"})
    assert defaults == {
        "method": {
            "name": "full",
            "freeze_embeddings": False,
            "freeze_blocks": 0,
            "freeze": (),
            "freeze_all_but_head": False,
            "unfreeze_every_steps": None,
        },
        "training": {
            "seq_len": 10,
            "global_batch_size": 8,
            "max_steps": 5,
            "num_epochs": None,
            "optimizer": "adamw",
            "lr": 5e-5,
            "schedule": "cosine",
            "warmup_steps": 0,
            "warmup_ratio": 0.0,
            "warmup_tokens": 0,
            "min_lr_ratio": 0.0,
            "lr_cycles": 1,
            "lr_power": 1.0,
            "decay_share": 0.2,
            "decay_shape": "cosine",
            "weight_decay": 0.0,
            "no_decay": (),
            "l1": 0.0,
            "layer_lr_decay": 1.0,
            "beta1": None,
            "beta2": None,
            "eps": None,
            "momentum": None,
            "neftune_noise_alpha": None,
            "ema_decay": None,
            "on_nonfinite": "stop",
            "max_grad_norm": 1.0,
        },
        "parallel": {
            "strategy": "auto",
            "micro_batch_size": "auto",
            "recompute": "auto",
            "precision": "auto",
            "shard_group_size": "auto",
            "reshard_after_forward": "auto",
            "offload_optimizer": "auto",
            "offload_params": "auto",
            "nvme_path": None,
            "deepspeed_preset": None,
        },
        "launch": {
            "via": "auto",
            "hosts": None,
            "hostfile": None,
            "include": None,
            "exclude": None,
            "remote": "ssh",
            "ssh_options": (),
            "environment": (),
            "max_restarts": 3,
            "max_requeues": 100,
            "min_nodes": None,
        },
        "checkpoint": {
            "every_steps": None,
            "every_minutes": None,
            "stop_after_minutes": None,
            "asynchronous": True,
            "keep_last": 2,
            "keep_every": None,
            "keep_best": 0,
            "copy_to": None,
            "resume": "auto",
            "fresh_data": False,
        },
        "evaluation": {"every_steps": None, "max_samples": None, "metric": None, "patience": None, "min_delta": 0.0},
        "tracking": {
            "log_every_steps": 10,
            "to": (),
            "project": "fleetune",
            "run_name": None,
            "hang_seconds": 600,
        },
        "seed": 0,
        "sweep": None,
        "stages": (),
    }
    assert (spec.cluster.name, spec.cluster.nodes) == ("cpu", 1)
    assert (spec.data.packing, spec.data.validation_fraction, spec.data.sample_by) == ("concat", 0.05, "document")
    assert spec.prepared_dir == "runs/x/data"


@pytest.mark.parametrize(
    ("section", "word", "key"),
    [
        ("task", "sequence_classification", "name"),
        ("method", "full", "name"),
        ("parallel", "zero3", "strategy"),
        ("cluster", "h100-80", "name"),
    ],
)
def test_a_word_stands_for_a_section(section: str, word: str, key: str) -> None:
    """`parallel: zero3` is `parallel: {strategy: zero3}`."""
    short = spec_of(**{section: word})
    assert short == spec_of(**{section: {key: word}})
    assert getattr(getattr(short, section), key) == word


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", " 1e-4"])
def test_a_number_that_yaml_takes_for_a_text_is_a_number(text: str) -> None:
    """YAML 1.1 wants a dot in `1.0e-4`; nobody else does."""
    assert spec_of(training__lr=text).training.lr == 1e-4


def test_ranks_and_prepared_folder() -> None:
    assert spec_of(cluster={"nodes": 3, "gpus_per_node": 8}).num_ranks == 24
    assert spec_of(data__prepared="shared/tokens").prepared_dir == "shared/tokens"


def test_the_spec_survives_json() -> None:
    """It is sent to the measuring process and kept in manifests."""
    spec = spec_of(data__train=["a.txt", "b.txt"], task={"name": "sequence_classification", "labels": ["x", "y"]})
    assert JobSpec.model_validate(json.loads(spec.model_dump_json())) == spec


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    for child in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from nodes(child)


@pytest.mark.parametrize("model", [JobSpec, Cluster])
def test_the_schema_is_whole(model: type[BaseModel]) -> None:
    """Every reference leads somewhere, every object refuses unknown keys, every key has its meaning and its bounds."""
    schema = json.loads(json.dumps(model.model_json_schema()))
    for node in nodes(schema):
        if "$ref" in node:
            assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]
        if "properties" in node and node.get("type") == "object":
            assert node["additionalProperties"] is False
            assert [key for key, value in node["properties"].items() if not value.get("description")] == []


@pytest.mark.parametrize(
    ("section", "key", "bounds"),
    [
        ("TrainingSection", "lr", {"exclusiveMinimum": 0}),
        ("TrainingSection", "min_lr_ratio", {"minimum": 0, "maximum": 1}),
        ("TrainingSection", "warmup_ratio", {"minimum": 0, "exclusiveMaximum": 1}),
        ("TrainingSection", "seq_len", {"minimum": 1}),
        ("DataSection", "validation_fraction", {"minimum": 0, "exclusiveMaximum": 1}),
    ],
)
def test_the_schema_has_the_bounds(section: str, key: str, bounds: dict[str, float]) -> None:
    """An editor that reads the schema marks a wrong number as it is typed."""
    node = JobSpec.model_json_schema()["$defs"][section]["properties"][key]
    assert {bound: node[bound] for bound in bounds} == bounds
