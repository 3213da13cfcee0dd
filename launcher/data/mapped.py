"""The samples of one prepared split, by memory map: rows as views of the files, or fixed-length rows as one block.

A shard is mapped when it is first touched, so opening a folder costs nothing per shard. Mapped pages count as resident
memory although they belong to the page cache; they are given back when they exceed `RESIDENT_BYTES`.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from launcher.data.order import Ints
from launcher.task import Row

RESIDENT_BYTES = 160 << 20
"""Mapped pages that may stay resident: what is touched again soon, far below a rank's share of a machine's memory."""

CHECK_ROWS = 512
"""Rows between two looks at the resident memory: the kernel maps 64 KiB around a touched page, so 32 MiB at most."""

_MADV_DONTNEED = 4  # linux/mman.h; the pages stay in the page cache

Allocate = Callable[[tuple[int, int]], NDArray[np.int64]]
"""Makes an int64 array of a shape that is overwritten at once: ordinary memory, or pinned."""


class ShardStore(Protocol):
    """Shards that are brought here when they are needed, by their place in the index."""

    num_open: int
    """Of these shards as many may stay mapped; a file that is mapped keeps its place on the disk, removed or not."""

    def path(self, number: int) -> Path:
        """Where the shard lies now."""

    def ahead(self, numbers: Sequence[int]) -> None:
        """These will be needed soon, in this order."""


@dataclass(frozen=True)
class PreparedSplit:
    """Random access to the samples of one split."""

    folder: Path
    entry: dict[str, Any]
    store: ShardStore | None = None
    """Where the shards come from; left out, they lie in the folder."""

    def __len__(self) -> int:
        return int(self.entry["num_samples"])

    @property
    def num_tokens(self) -> int:
        return int(self.entry["num_tokens"])

    def rows(self, ids: Ints) -> list[Row]:
        """The samples with these ids, which they carry as `sample`; lists are read-only views of the file, in its type."""
        self._begin(len(ids))
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        places = (ids - self._starts[numbers]).tolist()
        return [
            {**self._shard(shard).row(place), "sample": int(sample)}
            for shard, place, sample in zip(numbers.tolist(), places, ids, strict=True)
        ]

    def block(self, ids: Ints, allocate: Allocate | None = None) -> Ints | None:
        """The tokens of these samples, (samples, tokens), or None unless they hold tokens only and equally many."""
        blocks = self.blocks(ids, len(ids), allocate)
        return None if blocks is None else next(blocks, None)

    def blocks(self, ids: Ints, num_rows: int, allocate: Allocate | None = None) -> Iterator[Ints] | None:
        """`block` in pieces of `num_rows` samples, each made when it is asked for: then it is still in the core's cache
        when it is used, and its memory is there from the one before.

        Rows are copied straight from the file into the widened block, which is quicker than a gather of narrow rows that
        is widened after it.
        """
        self._begin(len(ids))
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        found = [self._shard(number).plain for number in dict.fromkeys(numbers.tolist())]
        if not all(plain and plain.length == found[0].length for plain in found):  # type: ignore[union-attr]
            return None
        places = ids - self._starts[numbers]
        facts = self._plain_facts[numbers]
        if (places >= facts[:, _COUNT]).any():
            return None
        rounds, rest = np.divmod(places, facts[:, _ROWS])
        length = int(facts[0, _LENGTH])
        of_batch = facts[:, _BEGIN] + rounds * facts[:, _STRIDE]
        begins = np.where(rounds == facts[:, _LAST], facts[:, _LAST_BEGIN], of_batch) + rest * length
        flat = self._flat
        rows = [flat[n][at : at + length] for n, at in zip(numbers.tolist(), begins.tolist(), strict=True)]
        return (_joined(rows[i : i + num_rows], length, allocate) for i in range(0, len(rows), num_rows))

    def costs(self, ids: Ints) -> Ints:
        """Tokens of each of these samples."""
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        places = (ids - self._starts[numbers]).tolist()
        pairs = zip(numbers.tolist(), places, strict=True)
        return np.array([len(self._shard(shard).row(place)["input_ids"]) for shard, place in pairs], dtype=np.int64)

    def lengths(self) -> Ints:
        """Tokens of every sample, in their order: 8 bytes each."""
        parts = [np.empty(0, dtype=np.int64)]
        for number in range(len(self.entry["shards"])):
            self._begin(0)
            parts.append(self._shard(number).lengths())
        return np.concatenate(parts)

    def label_counts(self, num_labels: int) -> tuple[int, ...]:
        """How often each class stands in the column `label`, be it one per sample or several; 0s where there is none."""
        counts = np.zeros(num_labels, dtype=np.int64)
        for number in range(len(self.entry["shards"])):
            self._begin(0)
            for ids in self._shard(number).cells("label"):
                counts += np.bincount(ids, minlength=num_labels)
        return tuple(counts.tolist())

    @cached_property
    def _starts(self) -> Ints:
        """First sample id of each shard."""
        lengths = np.array([shard["num_samples"] for shard in self.entry["shards"]], dtype=np.int64)
        return np.cumsum(lengths) - lengths

    @cached_property
    def _open(self) -> dict[int, _Shard]:
        return {}

    @cached_property
    def _pages(self) -> _Pages:
        return _Pages(self._open)

    def _begin(self, num_rows: int) -> None:
        """Before rows are read: what was mapped long ago is let go. Views that were handed out stay good."""
        self._pages.touch(num_rows)
        while self.store and len(self._open) > self.store.num_open:
            longest_open = next(iter(self._open))
            del self._open[longest_open]
            self._flat.pop(longest_open, None)

    def _shard(self, number: int) -> _Shard:
        shard = self._open.get(number)
        if shard is None:
            entry = self.entry["shards"][number]
            path = self.store.path(number) if self.store else self.folder / entry["file"]
            shard = self._open[number] = _Shard(path)
            if shard.plain is not None:
                self._flat[number], *facts = shard.plain
                self._plain_facts[number] = facts
        return shard

    @cached_property
    def _flat(self) -> dict[int, NDArray[Any]]:
        return {}

    @cached_property
    def _plain_facts(self) -> Ints:
        """Of each shard that was opened: the numbers of its `_Plain`."""
        return np.zeros((len(self.entry["shards"]), 7), dtype=np.int64)


class _Shard:
    """One Arrow stream file: where each record batch's rows begin, nothing per row."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        # closing gives the file descriptor back (a process has 1,024 of them); the mapping lives on with the buffer
        with pyarrow.memory_map(str(path)) as file:
            self.mapped = file.read_buffer()
        with pyarrow.ipc.open_stream(pyarrow.BufferReader(self.mapped)) as reader:
            self._batches = [_columns(batch) for batch in reader]
        sizes = [len(columns["input_ids"].offsets) - 1 for columns in self._batches]
        self._firsts = np.cumsum([0, *sizes])[:-1]

    def row(self, place: int) -> Row:
        number = int(np.searchsorted(self._firsts, place, side="right")) - 1
        at = place - int(self._firsts[number])
        return {name: column[at] for name, column in self._batches[number].items()}

    def lengths(self) -> Ints:
        return np.concatenate([np.diff(columns["input_ids"].offsets).astype(np.int64) for columns in self._batches])

    def cells(self, name: str) -> list[NDArray[Any]]:
        """All values of a column, one array per record batch; none where there is no such column."""
        columns = [columns[name] for columns in self._batches if name in columns]
        return [c.values[c.offsets[0] : c.offsets[-1]] if isinstance(c, _Lists) else c.values for c in columns]

    @cached_property
    def plain(self) -> _Plain | None:
        """Where the rows lie, if they hold tokens only and the record batches lie as evenly as our writer leaves them."""
        if any(set(columns) != {"input_ids"} for columns in self._batches):
            return None
        lists = [columns["input_ids"] for columns in self._batches]
        dtype, num_rows = lists[0].values.dtype, len(lists[0].offsets) - 1
        length = int(lists[0].offsets[1] - lists[0].offsets[0])
        flat = np.frombuffer(self.mapped, dtype=dtype, count=self.mapped.size // dtype.itemsize)
        addresses = [column.values.ctypes.data + int(column.offsets[0]) * dtype.itemsize for column in lists]
        begins = (np.array(addresses, dtype=np.int64) - flat.ctypes.data) // dtype.itemsize
        strides = set(np.diff(begins[:-1]).tolist())
        if len(strides) > 1 or any(len(column.offsets) - 1 != num_rows for column in lists[:-1]):
            return None
        equal = [_leading(np.diff(column.offsets) == length) for column in lists]
        full = _leading(np.array(equal) == num_rows)
        count = full * num_rows + (equal[full] if full < len(equal) else 0)
        stride = strides.pop() if strides else 0
        return _Plain(flat, length, count, num_rows, int(begins[0]), stride, len(lists) - 1, int(begins[-1]))


_LENGTH, _COUNT, _ROWS, _BEGIN, _STRIDE, _LAST, _LAST_BEGIN = range(7)


class _Plain(NamedTuple):
    """The first `num_equal` rows of a shard have `length` tokens each; of `flat`, the file as tokens, row i begins at
    `begin + i // num_rows * stride + i % num_rows * length`, but for record batch `last`, the shorter, at `last_begin`."""

    flat: NDArray[Any]
    length: int
    num_equal: int
    num_rows: int
    begin: int
    stride: int
    last: int
    last_begin: int


def _joined(rows: list[NDArray[Any]], length: int, allocate: Allocate | None) -> Ints:
    """Rows of equal length -> (rows, length) int64."""
    shape = (len(rows), length)
    tokens = allocate(shape) if allocate else np.empty(shape, dtype=np.int64)
    np.concatenate(rows, out=tokens.reshape(-1))
    return tokens


def _leading(flags: NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return int(flags.size if flags.all() else flags.argmin())


@dataclass(frozen=True)
class _Lists:
    """A list column of a record batch."""

    offsets: NDArray[Any]
    values: NDArray[Any]

    def __getitem__(self, i: int) -> NDArray[Any]:
        return self.values[self.offsets[i] : self.offsets[i + 1]]


@dataclass(frozen=True)
class _Scalars:
    values: NDArray[Any]

    def __getitem__(self, i: int) -> Any:
        value = self.values[i]
        return value.item() if isinstance(value, np.generic) else value


def _columns(batch: Any) -> dict[str, Any]:
    import pyarrow

    columns: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pyarrow.types.is_list(column.type):
            columns[name] = _Lists(column.offsets.to_numpy(), column.values.to_numpy())
        else:
            columns[name] = _Scalars(column.to_numpy(zero_copy_only=False))
    return columns


class _Pages:
    """Gives mapped pages back to the page cache when the process keeps too many resident. Linux only, elsewhere idle."""

    def __init__(self, shards: dict[int, _Shard]) -> None:
        self._shards = shards
        self._num_rows = 0
        self._base = _resident_shared_bytes()

    def touch(self, num_rows: int) -> None:
        self._num_rows += num_rows
        if self._num_rows < CHECK_ROWS or self._base is None:
            return
        self._num_rows = 0
        if (_resident_shared_bytes() or 0) - self._base > RESIDENT_BYTES:
            madvise = ctypes.CDLL(None).madvise
            for shard in list(self._shards.values()):
                madvise(ctypes.c_void_p(shard.mapped.address), ctypes.c_size_t(shard.mapped.size), _MADV_DONTNEED)


def _resident_shared_bytes() -> int | None:
    """File-backed resident memory of this process: the third number of /proc/self/statm, in pages (proc(5))."""
    if sys.platform != "linux":
        return None
    return int(Path("/proc/self/statm").read_bytes().split()[2]) * resource.getpagesize()
