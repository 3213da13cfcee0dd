"""Token ids that others have made, read as they are: Megatron, datatrove, MDS, plain arrays. Documents come as `Record`s
whose `parts["ids"]` holds the ids.

Layouts: Megatron-LM `megatron/core/datasets/indexed_dataset.py` (`.bin` beside `.idx`); datatrove
`pipeline/tokens/tokenizer.py` (`.ds` beside `.ds.index`); mosaicml-streaming `format/mds` (`index.json` and shards); a
plain `.bin` or `.npy` is one run of ids without documents.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.errors import ABSENT, DataError
from launcher.task import Record

SUFFIXES = {".ds": "datatrove", ".npy": "array", ".bin": "array", ".mds": "mds"}
"""Form by suffix; a `.bin` with an `.idx` beside it is Megatron's."""

FORMS = ("megatron", "datatrove", "array", "mds")

_PIECE_TOKENS = 1 << 18
"""A run without documents is read in pieces of this many tokens; joined again, they are the run."""

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def read_documents(path: Path, form: str, dtype: str, column: str) -> Iterator[Record]:
    """The documents of a file, numbered from 1. DataError for a file that is not of its form.

    dtype: of ids in files that do not say it; column: of an MDS sample, holding the ids.
    """
    readers = {"megatron": _megatron, "datatrove": _datatrove, "array": _array}
    documents = _mds(path, dtype, column) if form == "mds" else readers[form](path, dtype)
    for number, ids in enumerate(documents, start=1):
        if ids.size:
            digest = blake2b(np.ascontiguousarray(ids, dtype="<i8").tobytes(), digest_size=16).hexdigest()
            yield Record(digest, None, str(path), number, {"ids": np.array(ids), "is_document": form != "array"})


def _megatron(path: Path, dtype: str) -> Iterator[NDArray[Any]]:
    index = path.with_suffix(".idx").read_bytes()
    if index[:9] != _MAGIC or len(index) < 34:
        raise DataError(str(path.with_suffix(".idx")), ABSENT, "is not an index of Megatron's", "give its .idx file")
    _, code, num_sequences, num_documents = struct.unpack_from("<QBQQ", index, 9)
    if code not in _DTYPES:
        raise DataError(str(path), code, "is not a code of whole numbers in Megatron's index", "give token ids")
    lengths = _checked(path, index, "<i4", num_sequences, 34)
    pointers = _checked(path, index, "<i8", num_sequences, 34 + lengths.nbytes)
    bounds = _checked(path, index, "<i8", num_documents, 34 + lengths.nbytes + pointers.nbytes)
    tokens = np.memmap(path, dtype=_DTYPES[code], mode="r")
    starts = pointers // tokens.itemsize
    if num_sequences and int((starts + lengths).max()) > tokens.size:
        raise _cut(path, "than its index says")
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        parts = [tokens[starts[i] : starts[i] + lengths[i]] for i in range(first, last)]
        yield np.concatenate([np.empty(0, tokens.dtype), *parts])


def _checked(path: Path, index: bytes, dtype: str, count: int, offset: int) -> NDArray[Any]:
    if len(index) < offset + count * np.dtype(dtype).itemsize:
        raise _cut(path.with_suffix(".idx"), "than its header says")
    return np.frombuffer(index, dtype=dtype, count=count, offset=offset)


def _datatrove(path: Path, dtype: str) -> Iterator[NDArray[Any]]:
    ends_path = path.with_name(f"{path.name}.index")
    if not ends_path.is_file():
        raise DataError(str(path), ABSENT, "has no .ds.index beside it", "copy it too, or name it .bin")
    ends = np.fromfile(ends_path, dtype="<u8").astype(np.int64)
    tokens = _mapped(path, dtype)
    if ends.size and int(ends[-1]) > tokens.size:
        raise _cut(path, f"of {dtype} than its index says")
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        yield tokens[start:end]


def _array(path: Path, dtype: str) -> Iterator[NDArray[Any]]:
    tokens = np.load(path, mmap_mode="r") if path.suffix == ".npy" else _mapped(path, dtype)
    if tokens.dtype.kind not in "ui" or tokens.ndim != 1:
        found = f"{tokens.dtype} of {tokens.ndim} dimensions"
        raise DataError(str(path), found, "is not a row of whole numbers", "give one array of token ids")
    for start in range(0, tokens.size, _PIECE_TOKENS):
        yield tokens[start : start + _PIECE_TOKENS]


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    if path.stat().st_size % np.dtype(dtype).itemsize:
        raise DataError(str(path), ABSENT, f"is no whole number of {dtype}", "set data.token_dtype, or copy it again")
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")


def _cut(path: Path, than: str) -> DataError:
    return DataError(str(path), ABSENT, f"holds fewer tokens {than}", "copy it again")


def _mds(path: Path, dtype: str, column: str) -> Iterator[NDArray[Any]]:
    """A shard, as the `index.json` beside it describes it: offsets of the samples; in each, the sizes of the columns of
    no fixed size, then all columns one after the other."""
    about = json.loads((path.parent / "index.json").read_text(encoding="utf-8"))
    shard = next((one for one in about["shards"] if one["raw_data"]["basename"] == path.name), None)
    if shard is None or column not in shard["column_names"]:
        names = ", ".join(shard["column_names"]) if shard else "none"
        raise DataError(str(path), column, f"is no column of it ({names})", "set data.columns.text to the ids' column")
    data = path.read_bytes()
    if len(data) != shard["raw_data"]["bytes"]:
        raise DataError(str(path), ABSENT, f"has {len(data)} bytes, not {shard['raw_data']['bytes']}", "copy it again")
    offsets = np.frombuffer(data, "<u4", count=shard["samples"] + 1, offset=4).tolist()
    at = shard["column_names"].index(column)
    kind, _, inner = shard["column_encodings"][at].partition(":")
    if kind not in ("bytes", "ndarray") or (kind == "ndarray" and not inner):
        raise DataError(str(path), kind, "is an encoding that holds no token ids here", "write bytes or ndarray:dtype")
    for start in offsets[:-1]:
        cell = _mds_cell(data, start, shard["column_sizes"], at)
        yield _mds_ids(cell, kind, inner, dtype)


def _mds_cell(data: bytes, start: int, fixed: list[int | None], at: int) -> bytes:
    num_variable = sum(size is None for size in fixed)
    variable = iter(np.frombuffer(data, "<u4", count=num_variable, offset=start).tolist())
    sizes = [next(variable) if size is None else size for size in fixed]
    begin = start + 4 * num_variable + sum(sizes[:at])
    return data[begin : begin + sizes[at]]


def _mds_ids(cell: bytes, kind: str, inner: str, dtype: str) -> NDArray[Any]:
    """`ndarray:uint16` has its shape before it (a byte of rank and width, then the sides); with a shape given, none."""
    if kind == "bytes":
        return np.frombuffer(cell, dtype)
    name, _, shape = inner.partition(":")
    if shape:
        return np.frombuffer(cell, name)
    raise DataError("data.train", f"ndarray:{name}", "is an encoding of arrays of any shape", "write bytes or a shape")
