"""Reads a folder of torch distributed checkpoint (DCP): `.metadata` and `*.distcp`, whatever the number of ranks.

`.metadata` lists for every tensor its chunks (offsets, sizes), and for every chunk the file and the byte range of a
small archive of torch.save. Source: torch/distributed/checkpoint/{metadata,filesystem}.py, torch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import ABSENT, CheckpointError
from launcher.stored import torch_zip
from launcher.stored.records import DAMAGED, USE_ANOTHER, StoredBytes, StoredTensor
from launcher.stored.safe_pickle import damage_named, unpickle
from launcher.stored.tensors import TensorEntry, safe_relative

OPTIMIZER_ROOTS = ("optim", "optimizer", "optimizers")


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it begins, how large it is, and where its archive lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int
    num_bytes: int

    def stored(self) -> StoredTensor:
        tensor = torch_zip.load_part(self.file, self.start, self.num_bytes)
        if not isinstance(tensor, StoredTensor) or (tensor.shape, tensor.dtype) != (self.sizes, self.dtype):
            raise CheckpointError(str(self.file), ABSENT, DAMAGED, USE_ANOTHER)
        return tensor


class DcpSource:
    """The model's tensors in a DCP folder; a `TensorSource`. Optimizer state and non-tensors are left alone.

    root: what they were saved under; `ema` for the average of the weights.
    """

    def __init__(self, folder: Path, root: str = "model") -> None:
        file = folder / ".metadata"
        with file.open("rb") as stream:
            metadata = unpickle(stream, file)
        with damage_named(file):
            entries = metadata.state_dict_metadata
            places = _places(folder, metadata.storage_data)
            keys = _model_keys({key for key, entry in entries.items() if hasattr(entry, "chunks")}, metadata, root)
            self.chunks = {name: _chunks(file, key, entries[key], places) for name, key in keys.items()}
            self.tensors = {name: _entry(entries[key]) for name, key in keys.items()}
        self.aliases: dict[str, str] = {}

    def read(self, name: str) -> torch.Tensor:
        entry, chunks = self.tensors[name], self.chunks[name]
        if len(chunks) == 1:
            return chunks[0].stored().read()
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for chunk in chunks:
            box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[box] = chunk.stored().read()
        return whole

    def records(self) -> list[StoredBytes]:
        """Every stored record that the weights need, once."""
        found = (chunk.stored().record for chunks in self.chunks.values() for chunk in chunks)
        return list(dict.fromkeys(found))


def _places(folder: Path, storage_data: Any) -> dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]]:
    """(key, offsets) -> (file, first byte, bytes); files are checked for presence and length at once."""
    places, lengths = {}, {}
    for index, info in storage_data.items():
        if getattr(info, "transform_descriptors", None):
            rule = f"holds transformed (e.g. compressed) bytes: {info.transform_descriptors}"
            raise CheckpointError(str(folder / info.relative_path), ABSENT, rule, "save without stream transforms")
        file = safe_relative(folder, info.relative_path)
        if not file.is_file():
            raise CheckpointError(str(folder), info.relative_path, "is missing", USE_ANOTHER)
        if file not in lengths:
            lengths[file] = file.stat().st_size
        if info.offset + info.length > lengths[file]:
            raise CheckpointError(str(file), ABSENT, DAMAGED, USE_ANOTHER)
        places[index.fqn, tuple(getattr(index, "offset", None) or ())] = (file, info.offset, info.length)
    return places


def _model_keys(keys: set[str], metadata: Any, root: str) -> dict[str, str]:
    """Parameter name -> key in the checkpoint.

    DCP flattens `{"model": {"a.b": t}}` to the key `model.a.b` and keeps the path ("model", "a.b") in `planner_data`;
    only that tells it from a flat `{"model.a.b": t}`, which is how a plain Llama is saved.
    """
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    split = {key: tuple(map(str, paths.get(key, (key,)))) for key in sorted(keys)}
    inside = {".".join(path[path.index(root) + 1 :]): key for key, path in split.items() if root in path[:-1]}
    if inside or root != "model":
        return inside
    return {".".join(path): key for key, path in split.items() if path[0] not in OPTIMIZER_ROOTS}


def _entry(metadata: Any) -> TensorEntry:
    dtype = metadata.properties.state[0]  # first of what TensorProperties pickles
    assert isinstance(dtype, torch.dtype)
    return TensorEntry(tuple(metadata.size), dtype)


def _chunks(file: Path, key: str, metadata: Any, places: dict[Any, Any]) -> tuple[Chunk, ...]:
    """The chunks of one tensor; together they must fill it, or unset memory would be taken for weights."""
    chunks, dtype = [], _entry(metadata).dtype
    for chunk in metadata.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        place = places.get((key, offsets)) or (places.get((key, ())) if not any(offsets) else None)
        if place is None:
            raise CheckpointError(str(file), key, f"has no stored chunk at {offsets}", USE_ANOTHER)
        chunks.append(Chunk(offsets, sizes, dtype, *place))
    filled = sum(torch.Size(chunk.sizes).numel() for chunk in chunks)
    if filled != torch.Size(metadata.size).numel():
        raise CheckpointError(str(file), key, "has chunks that do not fill it", USE_ANOTHER)
    return tuple(chunks)
