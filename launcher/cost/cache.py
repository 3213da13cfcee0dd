"""The cost of a spec's model, from the cache when it is there, else measured in a process that has torch.

A cost depends on the model's config, the task and the versions of torch and transformers, and on nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher.cost.values import ModelCost
from launcher.errors import ABSENT, FleetuneError, ModelError
from launcher.job.resources import cache_dir
from launcher.job.spec import JobSpec
from launcher.spawn import run_python

_FORMAT = 8  # raised when ModelCost or the way it is measured changes


def cached_cost(spec: JobSpec) -> ModelCost:
    """Cost of the model; the first call for a model takes some seconds, the next a millisecond."""
    path = cache_path(spec)
    try:
        return ModelCost.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or cut short by a full disk
        cost = _measure_elsewhere(spec)
    with contextlib.suppress(OSError):  # a home that is read-only costs some seconds each time, not the run
        _write_whole(path, json.dumps(cost.to_json(), indent=1))
    return cost


def cache_path(spec: JobSpec) -> Path:
    return cache_dir() / "cost" / f"{_key(spec)}.json"


def _key(spec: JobSpec) -> str:
    labels = len(spec.task.labels) if spec.task.labels else None
    parts = [
        _FORMAT,
        version("torch"),
        version("transformers"),
        spec.task.name,
        labels,
        _identity(spec),
        spec.model.dropout,
        spec.data.packing,
        spec.method.model_dump(),
        _tokenizer(spec),
    ]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _identity(spec: JobSpec) -> Any:
    """The content of the config where it is on this machine, the hub id otherwise."""
    source = spec.model.path if spec.model.path is not None else spec.model.from_config
    if isinstance(source, dict):
        return source
    path = Path(str(source))
    config = path / "config.json" if path.is_dir() else path
    return config.read_text(encoding="utf-8", errors="replace") if config.is_file() else source


def _tokenizer(spec: JobSpec) -> Any:
    """What fixes the vocabulary of a model with random weights."""
    if spec.data.train_tokenizer:
        return spec.data.train_tokenizer.vocab_size
    return spec.data.tokenizer if spec.model.path is None else None


def _measure_elsewhere(spec: JobSpec) -> ModelCost:
    vocab_size = spec.data.train_tokenizer.vocab_size if spec.data.train_tokenizer else None
    request = json.dumps({"spec": spec.model_dump(mode="json"), "vocab_size": vocab_size})
    done = run_python("launcher.cost.measure", stdin=request)
    answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
    if "problem" in answer:
        raise ModelError(**{"value": ABSENT, **answer["problem"]})
    if done.returncode != 0 or not answer:
        raise FleetuneError(f"measuring the model failed:\n{done.stderr[-4000:]}")
    return ModelCost.from_json(answer)


def _write_whole(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(name, path)
