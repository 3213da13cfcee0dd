"""The commented spec that `fleetune init` writes: every key there is, with its meaning from `spec.py`.

Keys are set to the starter's value or to their default; those that are null unless given, or only for adapters, stand behind `#`.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from launcher.errors import SpecError
from launcher.job.site import known_clusters
from launcher.job.spec import ADAPTER_KEYS, JobSpec, TaskSection
from launcher.job.tasks import belongs

_GPT = {
    "output_dir": "runs/my-gpt",
    "model.from_config": {"model_type": "gpt2", "n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 256},
    "data.train": "records.jsonl",
    "data.train_tokenizer": {"vocab_size": 4000},
    "training.seq_len": 256,
}
_BERT = {
    "output_dir": "runs/my-bert",
    "model.from_config": {
        "model_type": "bert",
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    },
    "data.train": "records.jsonl",
    "data.train_tokenizer": {"vocab_size": 4000},
    "training.seq_len": 128,
}
_VALUES: dict[str, dict[str, Any]] = {
    "causal_lm": {**_GPT, "data.train": "corpus.txt"},
    "chat": {**_GPT, "task.chat_template": "plain"},
    "masked_lm": {**_BERT, "data.train": "corpus.txt"},
    "sequence_classification": _BERT,
    "regression": _BERT,
    "token_classification": {**_BERT, "data.train": "sentences.conll"},
    "extractive_qa": {**_BERT, "data.train": "questions.json"},
    "preference": {**_GPT, "task.chat_template": "plain"},
}
_COMMON = {"training.global_batch_size": 32, "training.num_epochs": 3, "training.lr": 5e-4, "training.warmup_steps": 20}
_COMMON_LAST = {"parallel.strategy": "auto", "cluster.name": "cpu", "cluster.gpus_per_node": 2}


_FROM_WEIGHTS = {"training.lr": 2e-5, "model.from_config": None, "data.train_tokenizer": None}
"""A model that has learnt already needs small steps."""
_MOST_TOKENS = 1024
"""Of a sample, where the model's positions allow more: a start that is quick to try."""


class Wishes(NamedTuple):
    """What is known before there is a spec; None leaves the starter's own."""

    task: str | None = None
    model: str | None = None
    """Folder or hub id."""
    data: str | None = None
    gpus: int | None = None
    """On this machine; 0 for none."""
    cluster: str | None = None
    """Name of a cluster file."""


def starter(wishes: Wishes) -> str:
    """A spec that `fleetune plan` accepts as it stands. Raises `SpecError` for an unknown task, or GPUs without a kind."""
    task = wishes.task or "causal_lm"
    if task not in _VALUES:
        raise SpecError("--task", task, "is not a task", f"choose one of {', '.join(_VALUES)}")
    values = {"task.name": task, **_VALUES[task], **_COMMON, **_COMMON_LAST, **_wished(wishes, task)}
    lines = [
        "# A fine-tuning job. Next: put your data in place, then `fleetune plan`, `fleetune prepare`, `fleetune launch`."
    ]
    if wishes.model is None:
        lines += [
            "# Start from weights instead of a random model: replace model.from_config by model.path, a folder or hub id,",
            "# and remove data.train_tokenizer.",
        ]
    for name, field in JobSpec.model_fields.items():
        lines += ["", *_entry(name, field, values)]
    return "\n".join(lines) + "\n"


def _wished(wishes: Wishes, task: str) -> dict[str, Any]:
    values: dict[str, Any] = {"data.train": wishes.data} if wishes.data else {}
    if wishes.gpus:
        if wishes.cluster is None:
            known = ", ".join(known_clusters())
            raise SpecError("--gpus", wishes.gpus, "does not say what they are", f"name them by --cluster: {known}")
        values |= {"cluster.name": wishes.cluster, "cluster.gpus_per_node": wishes.gpus}
    elif wishes.cluster is not None:
        values |= {"cluster.name": wishes.cluster}
    if wishes.model:
        values |= {"model.path": wishes.model, **_FROM_WEIGHTS, "training.seq_len": _seq_len(wishes.model, task)}
        values |= {"output_dir": f"runs/{PurePath(wishes.model).name}-{task}"}
        if task in ("chat", "preference"):
            values |= {"task.chat_template": None}  # the tokenizer's own
    return values


def _seq_len(model: str, task: str) -> int:
    """What the config allows, where it lies here: GPT-2 calls it otherwise."""
    usual = (
        128
        if task.endswith("classification") or task == "regression"
        else 384
        if task == "extractive_qa"
        else _MOST_TOKENS
    )
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        longest = int(config.get("max_position_embeddings") or config.get("n_positions") or usual)
    except (OSError, ValueError, TypeError, AttributeError):
        return usual  # a hub id, or a config that `fleetune plan` will speak of
    return max(1, min(usual, longest))


def _entry(name: str, field: FieldInfo, values: dict[str, Any]) -> list[str]:
    section = field.annotation
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return _key(name, field, values.get(name), "")
    keys = [
        line
        for key, inner in section.model_fields.items()
        if belongs(name, key, values["task.name"])
        for line in _key(key, inner, values.get(f"{name}.{key}"), "  ")
    ]
    mark = "# " if all(line.lstrip().startswith("#") for line in keys) else ""  # an empty section would be null
    return [f"{mark}{name}:  # {_first(field.description)}", *keys]


def _key(key: str, field: FieldInfo, value: Any, indent: str) -> list[str]:
    """The key's meaning, and its value; one that is null unless given stands behind `#`."""
    shown = value if value is not None else field.get_default(call_default_factory=True)
    mark = "# " if shown is None or key in ADAPTER_KEYS else ""
    text = yaml.safe_dump(shown, default_flow_style=True, sort_keys=False, width=1000).removesuffix("...\n").strip()
    meaning = [f"{indent}# {line}" for line in textwrap.wrap(field.description or "", 110 - len(indent))]
    return [*meaning, f"{indent}{mark}{key}: {text}"]


def _first(description: str | None) -> str:
    return (description or "").split("\n")[0]


assert set(_VALUES) == set(TaskSection.model_fields["name"].annotation.__args__), "a starter for every task"  # type: ignore[union-attr]
