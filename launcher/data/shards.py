"""Writing one split as `datasets` has it on disk: Arrow IPC streams, `state.json`, `dataset_info.json`.

Memory holds one record batch of rows. The same rows give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launcher.checksum import file_digest
from launcher.task import Row

BATCH_ROWS = 1000
"""Rows per record batch, as in `datasets`: a batch of 1,000 rows of 1,024 uint16 tokens is 2 MiB."""

SHARD_BYTES = 64 << 20
"""Bytes of tokens per shard, or a batch more."""

_UINT16_IDS = 1 << 16


def token_dtype(vocab_size: int) -> str:
    """Two bytes per token where all ids fit."""
    return "uint16" if vocab_size <= _UINT16_IDS else "int32"


def write_split(
    folder: Path, rows: Iterable[Row], vocab_size: int, labels: Sequence[str] | None, fingerprint: str
) -> dict[str, Any]:
    """Write every row; returns the split's entry of the index: samples, tokens, shards with sizes and checksums."""
    features = _features(token_dtype(vocab_size), labels)
    writer = _ShardWriter(folder, features, token_dtype(vocab_size))
    for row in rows:
        writer.add(row)
    shards = writer.close()
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard["file"]} for shard in shards],
        "_fingerprint": fingerprint[:16],
        **dict.fromkeys(("_format_columns", "_format_type", "_split")),
        "_format_kwargs": {},
        "_output_all_columns": False,
    }
    write_json(folder / "state.json", state)
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    write_json(folder / "dataset_info.json", info)
    totals = {key: sum(shard[key] for shard in shards) for key in ("num_samples", "num_tokens")}
    return {**totals, "shards": shards}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _features(dtype: str, labels: Sequence[str] | None) -> dict[str, Any]:
    """`datasets.Features` as they stand in JSON."""
    features: dict[str, Any] = {"input_ids": {"feature": {"dtype": dtype, "_type": "Value"}, "_type": "List"}}
    if labels is not None:
        features["label"] = {"names": list(labels), "_type": "ClassLabel"}
    return features


def _schema(features: dict[str, Any], dtype: str) -> Any:
    import pyarrow

    fields = [("input_ids", pyarrow.list_(pyarrow.field("item", getattr(pyarrow, dtype)())))]
    if "label" in features:
        fields.append(("label", pyarrow.int64()))
    return pyarrow.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


class _ShardWriter:
    """Rows -> record batches -> shards. The number of shards is in their names, so they are named at the end."""

    def __init__(self, folder: Path, features: dict[str, Any], dtype: str) -> None:
        folder.mkdir(parents=True)
        self._folder, self._dtype, self._schema = folder, dtype, _schema(features, dtype)
        self._rows: list[Row] = []
        self._shards: list[dict[str, Any]] = []
        self._stream: Any = None

    def add(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) == BATCH_ROWS:
            self._flush()

    def close(self) -> list[dict[str, Any]]:
        """Finish, name and check-sum the shards."""
        if self._rows:
            self._flush()
        self._end_shard()
        return [self._named(number, shard) for number, shard in enumerate(self._shards)]

    def _flush(self) -> None:
        import pyarrow

        if self._stream is None:
            self._shards.append({"num_samples": 0, "num_tokens": 0})
            self._stream = pyarrow.ipc.new_stream(str(self._unnamed(len(self._shards) - 1)), self._schema)
        batch, num_tokens = _record_batch(self._rows, self._schema, self._dtype)
        self._stream.write_batch(batch)
        shard = self._shards[-1]
        shard["num_samples"] += len(self._rows)
        shard["num_tokens"] += num_tokens
        self._rows = []
        if shard["num_tokens"] * np.dtype(self._dtype).itemsize >= SHARD_BYTES:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _unnamed(self, number: int) -> Path:
        return self._folder / f"data-{number:05d}.arrow"

    def _named(self, number: int, shard: dict[str, Any]) -> dict[str, Any]:
        name = f"data-{number:05d}-of-{len(self._shards):05d}.arrow"
        path = self._unnamed(number).rename(self._folder / name)
        return {"file": name, **shard, "size": path.stat().st_size, "blake2b": file_digest(path)}


def _record_batch(rows: Sequence[Row], schema: Any, dtype: str) -> tuple[Any, int]:
    """The rows as one Arrow record batch, and the number of their tokens."""
    import pyarrow

    lengths = np.fromiter((len(row["input_ids"]) for row in rows), dtype=np.int32, count=len(rows))
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    tokens = np.concatenate([np.asarray(row["input_ids"]) for row in rows]).astype(dtype)
    lists = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(tokens), type=schema.field(0).type)
    columns = [lists]
    if "label" in schema.names:
        columns.append(pyarrow.array([row["label"] for row in rows], pyarrow.int64()))
    return pyarrow.RecordBatch.from_arrays(columns, schema=schema), int(offsets[-1])
