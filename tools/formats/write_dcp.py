"""A `State` as a folder that torch DCP loads, cut along the first dimension for any number of ranks; or as one file.

The layout is torch 2.13's (distributed/checkpoint/filesystem.py): one archive of `torch.save` per chunk, one after
another in `__<rank>_0.distcp`, and `.metadata`. Names are those of `get_state_dict`: model and optim, nested.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from launcher.stored.state import STEP, State
from launcher.stored.values import Values, numel
from tools.formats.archive import Archive, PlannedTensor, archive_file, plan_archive
from tools.formats.files import Part, Planned, Slot, literal_file

METADATA_VERSION = "1.0.0"  # torch.distributed.checkpoint.filesystem.CURRENT_DCP_VERSION
Path_ = tuple[str | int, ...]


def plan_dcp(state: State, ranks: int, dtype: torch.dtype | None) -> list[Planned]:
    """`dtype` casts floating weights; the optimiser keeps its own."""
    folder = _Folder(ranks)
    for path, values, target in _entries(state, dtype):
        folder.add_tensor(path, values, target)
    for path, value in _plain(state):
        folder.add_plain(path, value)
    return folder.files()


def plan_torch(state: State, name: str, dtype: torch.dtype | None) -> list[Planned]:
    """One file: a state dict, or with the optimiser `{"model": ..., "optim": ..., "step": ...}` as DCP would gather it."""
    model: OrderedDict[str, Any] = OrderedDict()
    for tensor, values in state.tensors.items():
        model[tensor] = _planned(values, _cast(values, dtype), tensor)
    for alias, kept in state.aliases.items():
        model[alias] = model[kept]
    if state.optimizer is None:
        return [archive_file(name, model)]
    optim = {
        "state": {
            tensor: {key: _planned(values, values.dtype, tensor) for key, values in states.items()}
            for tensor, states in state.optimizer.state.items()
        },
        "param_groups": [{**group.settings, "params": list(group.names)} for group in state.optimizer.groups],
    }
    return [archive_file(name, {"model": model, "optim": optim, **_step(state)})]


def _step(state: State) -> dict[str, int]:
    return {} if state.step is None else {"step": state.step}


def _planned(values: Values, dtype: torch.dtype, name: str) -> PlannedTensor:
    return PlannedTensor(values.shape, dtype, [Part(values, 0, numel(values), name)])


def _cast(values: Values, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and values.dtype.is_floating_point else values.dtype


def _entries(state: State, dtype: torch.dtype | None) -> Iterator[tuple[Path_, Values, torch.dtype]]:
    """Tied names are written each for itself, as `get_model_state_dict` gives them."""
    nested: Path_ = ("model",) if state.optimizer is not None else ()
    for name, values in state.tensors.items():
        yield (*nested, name), values, _cast(values, dtype)
    for name, kept in state.aliases.items():
        yield (*nested, name), state.tensors[kept], _cast(state.tensors[kept], dtype)
    for name, states in (state.optimizer.state if state.optimizer else {}).items():
        for key, values in states.items():
            yield ("optim", "state", name, key), values, values.dtype


def _plain(state: State) -> Iterator[tuple[Path_, Any]]:
    for number, group in enumerate(state.optimizer.groups if state.optimizer else ()):
        for key, value in {**group.settings, "params": list(group.names)}.items():
            yield ("optim", "param_groups", number, key), value
    if state.optimizer is not None:
        yield from (((name,), value) for name, value in _step(state).items())


class _Folder:
    def __init__(self, ranks: int) -> None:
        self.ends = [0] * ranks
        self.archives: list[list[Archive]] = [[] for _ in range(ranks)]
        self.entries: dict[str, Any] = {}
        self.places: dict[MetadataIndex, Any] = {}
        self.paths: dict[str, Path_] = {}

    def add_tensor(self, path: Path_, values: Values, dtype: torch.dtype) -> None:
        key, chunks = self._key(path), []
        for number, (rank, first, rows) in enumerate(_rows(values.shape, len(self.ends), STEP in path[3:])):
            offsets = torch.Size((first, *(0 for _ in values.shape[1:]))) if values.shape else torch.Size()
            sizes = torch.Size((rows, *values.shape[1:])) if values.shape else torch.Size()
            row = numel(values) // values.shape[0] if values.shape and values.shape[0] else 1
            part = Part(values, first * row, sizes.numel(), str(path[-1]))
            place = self._append(rank, plan_archive(PlannedTensor(sizes, dtype, [part]), self.ends[rank]))
            self.places[MetadataIndex(key, offsets, number)] = place
            chunks.append(ChunkStorageMetadata(offsets, sizes))
        self.entries[key] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(values.shape), chunks)

    def add_plain(self, path: Path_, value: Any) -> None:
        key = self._key(path)
        self.places[MetadataIndex(key)] = self._append(0, plan_archive(value, self.ends[0]))
        self.entries[key] = BytesStorageMetadata()

    def _key(self, path: Path_) -> str:
        key = ".".join(map(str, path))
        self.paths[key] = path
        return key

    def _append(self, rank: int, archive: Archive) -> Any:
        self.archives[rank].append(archive)
        self.ends[rank] += archive.num_bytes
        return _StorageInfo(f"__{rank}_0.distcp", archive.start, archive.num_bytes)

    def files(self) -> list[Planned]:
        metadata = Metadata(self.entries, self.paths, self.places, StorageMeta(save_id="converted"), METADATA_VERSION)
        stream = io.BytesIO()
        pickle.dump(metadata, stream)
        data = [_joined(f"__{rank}_0.distcp", self.ends[rank], made) for rank, made in enumerate(self.archives) if made]
        return [*data, literal_file(".metadata", stream.getvalue())]


def _rows(shape: tuple[int, ...], ranks: int, is_step: bool) -> Iterator[tuple[int, int, int]]:
    """(rank, first row, rows) as FSDP2 cuts a tensor: equal blocks, the last ones shorter or empty."""
    if not shape or is_step or not shape[0]:
        yield 0, 0, shape[0] if shape else 1
        return
    block = -(-shape[0] // ranks)
    for rank in range(ranks):
        first = rank * block
        if first < shape[0]:
            yield rank, first, min(block, shape[0] - first)


def _joined(name: str, size: int, archives: Sequence[Archive]) -> Planned:
    slots: list[Slot] = [slot for archive in archives for slot in archive.slots]

    def seal(crcs: Sequence[int]) -> list[tuple[int, bytes]]:
        written, at = [], 0
        for archive in archives:
            written += archive.seal(crcs[at : at + len(archive.slots)])
            at += len(archive.slots)
        return written

    return Planned(name, size, tuple(slots), seal)
