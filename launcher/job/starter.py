"""The commented spec that `fleetune init` writes: every key there is, with its meaning from `spec.py`.

Keys are set to the starter's value or to their default; those that are null unless given, or only for adapters, stand behind `#`.
"""

from __future__ import annotations

import textwrap
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from launcher.errors import SpecError
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


def starter(task: str) -> str:
    """A spec for the task that `fleetune plan` accepts as it stands. Raises `SpecError` for an unknown task."""
    if task not in _VALUES:
        raise SpecError("--task", task, "is not a task", f"choose one of {', '.join(_VALUES)}")
    values = {"task.name": task, **_VALUES[task], **_COMMON, **_COMMON_LAST}
    lines = [
        "# A fine-tuning job. Next: put your data in place, then `fleetune plan`, `fleetune prepare`, `fleetune launch`.",
        "# Start from weights instead of a random model: replace model.from_config by model.path, a folder or hub id,",
        "# and remove data.train_tokenizer.",
    ]
    for name, field in JobSpec.model_fields.items():
        lines += ["", *_entry(name, field, values)]
    return "\n".join(lines) + "\n"


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
