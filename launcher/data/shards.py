"""Writing one split as `datasets` has it on disk: Arrow IPC streams, `state.json`, `dataset_info.json`.

Memory holds one record batch of rows. The same rows give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.checksum import file_digest
from launcher.task import Kind, Row

BATCH_ROWS = 1000
"""Rows per record batch, as in `datasets`: a batch of 1,000 rows of 1,024 uint16 tokens is 2 MiB."""

SHARD_BYTES = 64 << 20
"""Bytes of tokens per shard, or a batch more."""

_UINT16_IDS = 1 << 16
_ANY_LENGTH = 1 << 62

_LISTS = ("tokens", "bytes", "ints", "classes")
_DTYPES: dict[Kind, str] = {
    "bytes": "uint8",
    "ints": "int32",
    "classes": "int64",
    "class": "int64",
    "int": "int64",
    "float": "float64",
}
"""Arrow's types; `datasets` keeps class ids as int64, and tokens have their own rule."""


def token_dtype(vocab_size: int) -> str:
    """Two bytes per token where all ids fit."""
    return "uint16" if vocab_size <= _UINT16_IDS else "int32"


@dataclass(frozen=True)
class Schema:
    """What the columns of a split hold."""

    columns: dict[str, Kind]
    vocab_size: int
    labels: Sequence[str] | None = None

    def dtype(self, column: str) -> str:
        """Of a cell, or of what its list holds."""
        kind = self.columns[column]
        return token_dtype(self.vocab_size) if kind == "tokens" else _DTYPES[kind]

    def is_list(self, column: str) -> bool:
        return self.columns[column] in _LISTS

    def features(self) -> dict[str, Any]:
        """`datasets.Features` as they stand in JSON."""
        return {name: self._feature(name) for name in self.columns}

    def _feature(self, name: str) -> dict[str, Any]:
        is_class = self.columns[name] in ("class", "classes")
        names = {"names": list(self.labels or ()), "_type": "ClassLabel"}
        cell = names if is_class else {"dtype": self.dtype(name), "_type": "Value"}
        return {"feature": cell, "_type": "List"} if self.is_list(name) else cell

    def arrow(self) -> Any:
        import pyarrow

        types = {name: getattr(pyarrow, self.dtype(name))() for name in self.columns}
        fields = [
            (name, pyarrow.list_(pyarrow.field("item", cell)) if self.is_list(name) else cell)
            for name, cell in types.items()
        ]
        about = json.dumps({"info": {"features": self.features()}})
        return pyarrow.schema(fields, metadata={"huggingface": about})


def write_split(folder: Path, rows: Iterable[Row], schema: Schema, fingerprint: str) -> dict[str, Any]:
    """Write every row; returns the split's entry of the index: samples, tokens, shards with sizes and checksums."""
    return write_batches(folder, record_batches(rows, schema), schema, fingerprint)


def write_batches(folder: Path, batches: Iterable[Any], schema: Schema, fingerprint: str) -> dict[str, Any]:
    """`write_split` of rows that are Arrow record batches already."""
    writer = _ShardWriter(folder, schema)
    for batch in batches:
        writer.add(batch)
    shards = writer.close()
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard["file"]} for shard in shards],
        "_fingerprint": fingerprint[:16],
        **dict.fromkeys(("_format_columns", "_format_type", "_split")),
        "_format_kwargs": {},
        "_output_all_columns": False,
    }
    write_json(folder / "state.json", state)
    info = {"citation": "", "description": "", "features": schema.features(), "homepage": "", "license": ""}
    write_json(folder / "dataset_info.json", info)
    totals = {key: sum(shard[key] for shard in shards) for key in ("num_samples", "num_tokens")}
    lengths = {key: choose((shard[key] for shard in shards), default=0) for key, choose in _EXTREMES.items()}
    return {**totals, **lengths, "shards": shards}


_EXTREMES = {"shortest": min, "longest": max}
"""Tokens of a sample, in a shard and in a split."""


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def record_batches(rows: Iterable[Row], schema: Schema) -> Iterator[Any]:
    """The rows as Arrow record batches of `BATCH_ROWS`, the last with what is left."""
    rows, arrow = iter(rows), schema.arrow()
    while some := list(islice(rows, BATCH_ROWS)):
        yield _record_batch(some, schema, arrow)


def lengths_of(batch: Any) -> NDArray[np.int32]:
    """Tokens of each row."""
    return np.asarray(np.diff(batch.column("input_ids").offsets.to_numpy()))


def num_tokens(batch: Any) -> int:
    return int(lengths_of(batch).sum())


class _ShardWriter:
    """Record batches -> shards. The number of shards is in their names, so they are named at the end."""

    def __init__(self, folder: Path, schema: Schema) -> None:
        folder.mkdir(parents=True)
        self._folder, self._schema = folder, schema.arrow()
        self._token_bytes = np.dtype(schema.dtype("input_ids")).itemsize
        self._shards: list[dict[str, Any]] = []
        self._stream: Any = None

    def add(self, batch: Any) -> None:
        import pyarrow

        if self._stream is None:
            self._shards.append({"num_samples": 0, "num_tokens": 0, "shortest": _ANY_LENGTH, "longest": 0})
            self._stream = pyarrow.ipc.new_stream(str(self._unnamed(len(self._shards) - 1)), self._schema)
        self._stream.write_batch(batch)
        shard = self._shards[-1]
        shard["num_samples"] += batch.num_rows
        lengths = lengths_of(batch)
        shard["num_tokens"] += int(lengths.sum())
        shard["shortest"] = min(shard["shortest"], int(lengths.min()))
        shard["longest"] = max(shard["longest"], int(lengths.max()))
        if shard["num_tokens"] * self._token_bytes >= SHARD_BYTES:
            self._end_shard()

    def close(self) -> list[dict[str, Any]]:
        """Finish, name and check-sum the shards."""
        self._end_shard()
        return [self._named(number, shard) for number, shard in enumerate(self._shards)]

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


def _record_batch(rows: Sequence[Row], columns: Schema, schema: Any) -> Any:
    """The rows as one Arrow record batch."""
    import pyarrow

    arrays = []
    for field in schema:
        cells = [row[field.name] for row in rows]
        if columns.is_list(field.name):
            arrays.append(_list_array(cells, columns.dtype(field.name), field.type))
        else:
            arrays.append(pyarrow.array(cells, field.type))
    return pyarrow.RecordBatch.from_arrays(arrays, schema=schema)


def _list_array(cells: Sequence[Any], dtype: str, arrow_type: Any) -> Any:
    import pyarrow

    lengths = np.fromiter((len(cell) for cell in cells), dtype=np.int32, count=len(cells))
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    values = np.concatenate([np.asarray(cell, dtype=dtype) for cell in cells])
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values), type=arrow_type)
