"""A folder of safetensors (a model, or peft's adapters) as a `State`.

safetensors carry no checksum; what we write has `checksums.json` beside it, with the CRC-32 of every tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.records import USE_ANOTHER, StoredBytes
from launcher.stored.state import State
from launcher.stored.tensors import safe_relative
from launcher.stored.values import Run, Stored
from tools.formats.hf import CHECKSUMS, DTYPE_NAMES, HEADER

NAMED = {name: dtype for dtype, name in DTYPE_NAMES.items()}
DAMAGED = "was cut short or damaged, or is not a safetensors file"
MOST_HEADER_BYTES = 100 * 10**6  # the limit of the reference implementation


def read_hf(folder: Path) -> State:
    """`folder` holds `model.safetensors`, or several and their index. Raises `CheckpointError`."""
    return _read(folder, "hf", "model.safetensors")


def read_peft(folder: Path) -> State:
    """`folder` holds `adapter_model.safetensors`. Raises `CheckpointError`."""
    return _read(folder, "peft", "adapter_model.safetensors")


def _read(folder: Path, kind: str, single: str) -> State:
    index = folder / f"{single}.index.json"
    sums = _checksums(folder)
    if index.is_file():
        wanted = _weight_map(index)
        files = {safe_relative(folder, name) for name in wanted.values()}
        found = {name: values for file in sorted(files) for name, values in _tensors(file, sums)}
        if missing := [name for name in wanted if name not in found]:
            rule = f"names {missing[0]}, which {wanted[missing[0]]} does not hold"
            raise CheckpointError(str(index), ABSENT, rule, USE_ANOTHER)
        tensors = {name: found[name] for name in wanted}
    else:
        tensors = dict(_tensors(folder / single, sums))
    return State(kind, folder, tensors)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) and isinstance(file, str) for name, file in found.items()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(str(index), ABSENT, "is no index of safetensors", USE_ANOTHER) from None
    return dict(found)


def _checksums(folder: Path) -> dict[str, dict[str, int]]:
    file = folder / CHECKSUMS
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["crc32"]
        return {name: {key: int(crc) for key, crc in sums.items()} for name, sums in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(str(file), ABSENT, "is not a list of checksums", "remove it, or copy it again") from None


def _tensors(file: Path, sums: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[str, Stored]]:
    if not file.is_file():
        raise CheckpointError(str(file), ABSENT, "is missing", USE_ANOTHER)
    known = sums.get(file.name)
    size, start, header = file.stat().st_size, *_header(file, known)
    for name, entry in header.items():
        values = _entry(file, name, entry, start, size, known)
        if values is not None:
            yield name, values


def _header(file: Path, known: Mapping[str, int] | None) -> tuple[int, dict[str, Any]]:
    with file.open("rb") as stream:
        told = stream.read(8)
        length = int.from_bytes(told, "little")
        text = stream.read(length) if length < MOST_HEADER_BYTES else b""
    if known is not None and crc32(told + text) != known.get(HEADER):
        raise CheckpointError(str(file), ABSENT, "has changed bytes (header: wrong CRC-32)", USE_ANOTHER)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
    except (ValueError, AttributeError):
        raise CheckpointError(str(file), ABSENT, DAMAGED, USE_ANOTHER) from None
    return 8 + length, header


def _entry(file: Path, name: str, entry: Any, start: int, size: int, known: Mapping[str, int] | None) -> Stored | None:
    try:
        dtype, shape, (begin, end) = NAMED[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        fits = all(type(one) is int and one >= 0 for one in (*shape, begin)) and start + end <= size
        fits = fits and end - begin == prod(shape) * dtype.itemsize
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise CheckpointError(str(file), name, DAMAGED, USE_ANOTHER)
    if known is not None and name not in known:
        raise CheckpointError(str(file), name, f"is not listed in {CHECKSUMS}", USE_ANOTHER)
    record = StoredBytes(file, start + begin, end - begin, None if known is None else known[name])
    runs = (Run(record, 0, prod(shape)),) if prod(shape) else ()
    return Stored(shape, dtype, runs)
