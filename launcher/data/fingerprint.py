"""What prepared data depends on, as one short text: change any of it, and the data must be prepared again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

from launcher.job.spec import JobSpec
from launcher.job.tasks import DATA_OPTIONS, SHAPE_ROWS, belongs

FORMAT_VERSION = 1
"""Raised when the same options would give other shards, so that data of an older release is not taken for new."""


def options_fingerprint(spec: JobSpec) -> str:
    """Of the options alone, without opening an input: of everything under `training`, only `seq_len` matters."""
    return digest_of(["options", FORMAT_VERSION, relevant_options(spec)])


def relevant_options(spec: JobSpec) -> dict[str, Any]:
    """The options that can change a shard; those that cannot take effect are left out."""
    data = spec.data
    options: dict[str, Any] = {
        "task": spec.task.name,
        "seq_len": spec.training.seq_len,
        "train": _as_list(data.train),
        "format": data.format,
        "sample_by": data.sample_by,
        "columns": data.columns,
        "header": data.header,
        "tokenizer": data.tokenizer,
        "train_tokenizer": data.train_tokenizer and data.train_tokenizer.model_dump(),
    }
    if data.token_dtype != "uint16":
        options["token_dtype"] = data.token_dtype
    if data.clean is not None:
        options["clean"] = data.clean.model_dump()
    if data.augment is not None:
        options |= {"augment": data.augment.model_dump(), "seed": spec.seed}
    options["validation"] = _as_list(data.validation) if data.validation else data.validation_fraction
    if data.tokenizer is None and data.train_tokenizer is None:
        options["model"] = spec.model.path or spec.model.from_config
    options |= {
        key: getattr(data, key)
        for key in DATA_OPTIONS
        if key not in ("augment", "stride") and belongs("data", key, spec.task.name)
    }
    if data.stride is not None:
        options["stride"] = data.stride
    if options.get("packing") == "best_fit":
        options["packing"] = "none"  # the same rows: bins are planned over them
    return options | {key: getattr(spec.task, key) for key in SHAPE_ROWS if belongs("task", key, spec.task.name)}


def digest_of(parts: Iterable[Any]) -> str:
    """blake2b, 16 bytes in hex, of values that JSON can hold, whatever the order of their keys."""
    text = json.dumps(list(parts), sort_keys=True, ensure_ascii=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _as_list(sources: str | tuple[str, ...]) -> list[str]:
    return [sources] if isinstance(sources, str) else list(sources)
