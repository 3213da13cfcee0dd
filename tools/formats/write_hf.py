"""Weights of a `State` as safetensors shards with their index and checksums; adapters as peft's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from isal.isal_zlib import crc32

from launcher.errors import CheckpointError
from launcher.stored.tensors import TensorEntry
from launcher.stored.values import Values, numel
from tools.formats.files import Part, Planned, Slot
from tools.formats.hf import CHECKSUMS, DTYPE_NAMES, HEADER, Shard, plan_shards


def plan_hf(
    tensors: Mapping[str, Values], entries: Mapping[str, TensorEntry], shard_bytes: int, stem: str = "model"
) -> list[Planned]:
    """`entries` say the shape and dtype to be written, in the order to be written."""
    for name, entry in entries.items():
        if entry.dtype not in DTYPE_NAMES:
            raise CheckpointError(name, str(entry.dtype), "cannot be held by safetensors", "save the model without it")
    return [_file(shard, tensors) for shard in plan_shards(entries, shard_bytes, stem)]


def _file(shard: Shard, tensors: Mapping[str, Values]) -> Planned:
    header = shard.header()
    at, slots = len(header), []
    for name, entry in shard.tensors.items():
        slots.append(Slot(at, entry.dtype, (Part(tensors[name], 0, numel(tensors[name]), name),)))
        at += entry.num_bytes
    return Planned(shard.file_name, at, tuple(slots), lambda _crcs: [(0, header)])


def index_of(files: Sequence[Planned], stem: str = "model") -> tuple[str, dict[str, object]] | None:
    """The index's name and content, where there is more than one shard."""
    if len(files) == 1:
        return None
    total = sum(slot.num_bytes for file in files for slot in file.slots)
    names = {slot.parts[0].name: file.name for file in files for slot in file.slots}
    return f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": names}


def checksums_of(files: Sequence[Planned], crcs: Mapping[str, Sequence[int]]) -> tuple[str, dict[str, object]]:
    """The content of `checksums.json`, from what the copy found."""
    found = {}
    for file in files:
        sums = {slot.parts[0].name: crc for slot, crc in zip(file.slots, crcs[file.name], strict=True)}
        found[file.name] = {HEADER: crc32(file.seal(())[0][1]), **sums}
    return CHECKSUMS, {"crc32": found}
