"""Documents into bins of `seq_len` tokens, planned once: best-fit decreasing (Ding et al., ICML 2024).

The longest document goes first, each into the fullest bin that still has room. Lengths are small integers, so all
documents of one length are placed together: bins are kept by their free room, and of `k` bins with room `r` each takes
`r // length` documents before any emptier bin gets one. The work is one step per (length, room) met, not per document.
The plan depends on the lengths alone. It lies beside the shards; without it, it is made again, byte by byte the same.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from launcher.data.mapped import Allocate, PreparedSplit
from launcher.data.order import Ints
from launcher.errors import DataError
from launcher.task import Row

PLAN_VERSION = 1
"""Raised when the same lengths would give other bins."""

_ARRAYS = ("documents", "starts", "costs")


@dataclass(frozen=True)
class Bins:
    """Bin b holds the documents `documents[starts[b]:starts[b + 1]]`, the longest first."""

    documents: Ints
    starts: Ints
    costs: Ints
    """Sum of the squared lengths in each bin: what its attention costs."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, number: int) -> Ints:
        return self.documents[self.starts[number] : self.starts[number + 1]]


def best_fit(lengths: Ints, capacity: int) -> Bins:
    """Bins of at most `capacity` tokens that hold every document once. No length may exceed the capacity."""
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= capacity), "documents are cut before"
    longest_first = np.argsort(-lengths, kind="stable")
    bin_of = np.empty(lengths.size, dtype=np.int64)
    rooms, num_bins, done = _Rooms(capacity), 0, 0
    counts = np.bincount(lengths, minlength=capacity + 1)
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = done + int(counts[length])
        while done < end and (room := rooms.least_at_or_above(length)) is not None:
            taken = rooms.fill(room, length, end - done)
            bin_of[done : done + taken.size] = taken
            done += taken.size
        if done < end:
            bin_of[done:end] = rooms.open(num_bins, length, end - done)
            num_bins, done = int(bin_of[end - 1]) + 1, end
    by_bin = np.argsort(bin_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=num_bins))]).astype(np.int64)
    documents = longest_first[by_bin]
    squares = np.concatenate([[0], np.cumsum(lengths[documents] ** 2)])
    return Bins(documents, starts, squares[starts[1:]] - squares[starts[:-1]])


class _Rooms:
    """Bin numbers by their free room, and the rooms that occur as the bits of one integer."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._bins: list[list[Ints]] = [[] for _ in range(capacity + 1)]
        self._occurring = 0

    def least_at_or_above(self, length: int) -> int | None:
        above = self._occurring >> length
        return length + (above & -above).bit_length() - 1 if above else None

    def fill(self, room: int, length: int, num_documents: int) -> Ints:
        """The bin of each of the next documents, up to `num_documents`: bins of this room, filled one after another."""
        bins, each = np.concatenate(self._bins[room]), room // length
        self._bins[room], self._occurring = [], self._occurring & ~(1 << room)
        num_full, rest = divmod(min(num_documents, bins.size * each), each)
        self._put(bins[:num_full], room - each * length)
        self._put(bins[num_full : num_full + 1] if rest else bins[:0], room - rest * length)
        self._put(bins[num_full + bool(rest) :], room)
        return np.repeat(bins[: num_full + bool(rest)], each)[: num_full * each + rest]

    def open(self, first: int, length: int, num_documents: int) -> Ints:
        """Like `fill`, with as many new bins as it takes, numbered from `first`."""
        num_bins = -(-num_documents // (self._capacity // length))
        self._put(np.arange(first, first + num_bins), self._capacity)
        # no other bin has as much room: a bin that is empty is not kept
        return self.fill(self._capacity, length, num_documents)

    def _put(self, bins: Ints, room: int) -> None:
        if bins.size and room > 0:
            self._bins[room].append(bins)
            self._occurring |= 1 << room


@dataclass(frozen=True)
class PackedSplit:
    """A split seen as bins: a row is `{"documents": the rows of its documents}`."""

    split: PreparedSplit
    bins: Bins
    capacity: int

    def __len__(self) -> int:
        return len(self.bins)

    @property
    def num_tokens(self) -> int:
        return self.split.num_tokens

    def rows(self, ids: Ints) -> list[Row]:
        members = [self.bins.of(int(number)) for number in ids]
        documents = iter(self.split.rows(np.concatenate([np.empty(0, dtype=np.int64), *members])))
        return [{"documents": list(islice(documents, len(some)))} for some in members]

    def costs(self, ids: Ints) -> Ints:
        """What the attention of each of these bins costs."""
        return self.bins.costs[ids]

    def block(self, ids: Ints, allocate: Allocate | None = None) -> None:
        """A bin is no plain block: its documents are told apart."""

    def blocks(self, ids: Ints, num_rows: int, allocate: Allocate | None = None) -> None:
        """Nor are several."""

    @cached_property
    def digest(self) -> str:
        """Of which documents stand in which bin: with it, a place in the order names the same tokens for ever."""
        return _digest(self.bins)


def pack(split: PreparedSplit, capacity: int) -> PackedSplit:
    """The bins of a split: found beside its shards, or planned and left there. DataError for a document above a bin."""
    folder = split.folder / f"bins-{capacity}"
    bins = _found(folder, split)
    if bins is None:
        lengths = split.lengths()
        if lengths.size and lengths.max() > capacity:
            sample = int(lengths.argmax())
            rule = f"is longer than a bin of {capacity} tokens (training.seq_len)"
            way_out = "prepare the data again with this seq_len, which cuts longer documents"
            raise DataError(f"{split.folder}: sample {sample}", int(lengths[sample]), rule, way_out)
        bins = best_fit(lengths, capacity)
        with suppress(OSError):  # a folder that may only be read: planned again at every start, which is quick
            _store(folder, bins, split)
    return PackedSplit(split, bins, capacity)


def _store(folder: Path, bins: Bins, split: PreparedSplit) -> None:
    """In a folder of its own that appears whole or not at all."""
    building = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    building.mkdir(parents=True)
    try:
        for name in _ARRAYS:
            np.save(building / f"{name}.npy", getattr(bins, name))
        summary = {**_origin(split), "num_bins": len(bins), "digest": _digest(bins)}
        (building / "plan.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # one that is damaged or of other shards
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _found(folder: Path, split: PreparedSplit) -> Bins | None:
    """The stored plan, if it is of these shards and was not altered since."""
    try:
        summary = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS]
    except (OSError, ValueError, EOFError):
        return None
    bins = Bins(*arrays)
    expected = {**_origin(split), "num_bins": len(bins), "digest": _digest(bins)}
    return bins if summary == expected else None


def _origin(split: PreparedSplit) -> dict[str, Any]:
    return {"version": PLAN_VERSION, "shards": [shard["blake2b"] for shard in split.entry["shards"]]}


def _digest(bins: Bins) -> str:
    digest = blake2b(digest_size=16)
    for name in _ARRAYS:
        digest.update(np.ascontiguousarray(getattr(bins, name), dtype="<i8").tobytes())
    return digest.hexdigest()
