"""One description of a tensor for every format: where its elements lie, in row-major order, and how to fetch some.

`Stored` lies in files as runs of bytes, `Literal` in memory, `Computed` is made when it is asked for. All are read in
stretches of elements, so that a copy needs a buffer and not a tensor.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Protocol

import torch
from isal.isal_zlib import crc32, crc32_combine

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.records import DAMAGED, USE_ANOTHER, StoredBytes, StoredTensor

CHUNK_BYTES = 2**20  # of the file that is written; a few of them are all the memory that a copy takes
AHEAD_BYTES = 16 * 2**20  # asked of the disk beyond what is read: pieces of a parameter lie in several files
KEPT_TENSORS = 2  # one for each thread that copies
MOST_RUNS = 200_000  # of one tensor; beyond, its strides are so fine that reading it whole is cheaper


class Values(Protocol):
    """A tensor that can be read in part."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, start: int, into: torch.Tensor, ledger: Ledger | None = None) -> None:
        """Fills the 1-D `into`, of this dtype, with the elements from `start` on, in row-major order."""
        ...


def numel(values: Values) -> int:
    return prod(values.shape)


def num_bytes(values: Values) -> int:
    return numel(values) * values.dtype.itemsize


def whole(values: Values, ledger: Ledger | None = None) -> torch.Tensor:
    """All of it: contiguous, on the CPU."""
    flat = torch.empty(numel(values), dtype=values.dtype)
    values.read(0, flat, ledger)
    return flat.reshape(values.shape)


class Ledger:
    """The CRC-32 of all that was read, so that whole records are proved without a second reading."""

    def __init__(self) -> None:
        self._pieces: dict[StoredBytes, list[tuple[int, int, int]]] = defaultdict(list)
        self._lock = threading.Lock()

    def expect(self, records: Iterable[StoredBytes]) -> None:
        """These are proved as well, read or not."""
        for record in records:
            self._pieces.setdefault(record, [])

    def note(self, record: StoredBytes, start: int, data: memoryview) -> None:
        if record.crc32 is not None:
            piece = (start, data.nbytes, crc32(data))
            with self._lock:
                self._pieces[record].append(piece)

    def check(self, report: Callable[[int, int], None]) -> None:
        """Raises `CheckpointError` for the first record with other bytes than those that were written.

        What was not read (padding, the rest of a vector) is read now.
        """
        total = sum(record.num_bytes for record in self._pieces)
        done = 0
        for record, pieces in self._pieces.items():
            _check_record(record, sorted(pieces))
            done += record.num_bytes
            report(done, total)


def _check_record(record: StoredBytes, pieces: Sequence[tuple[int, int, int]]) -> None:
    at, crc = 0, 0
    for start, size, found in pieces:
        if start < at:  # read twice; a stretch that begins inside what is known and ends beyond is read again below
            continue
        crc = _crc_on(record, at, start, crc)
        crc, at = crc32_combine(crc, found, size), start + size
    crc = _crc_on(record, at, record.num_bytes, crc)
    if record.crc32 is not None and crc != record.crc32:
        rule = f"has changed bytes (record at {record.offset}: wrong CRC-32)"
        raise CheckpointError(str(record.file), ABSENT, rule, USE_ANOTHER)


def _crc_on(record: StoredBytes, start: int, end: int, crc: int) -> int:
    """`crc` continued over bytes `start` to `end`."""
    buffer = bytearray(min(CHUNK_BYTES, end - start))
    while start < end:
        view = memoryview(buffer)[: min(CHUNK_BYTES, end - start)]
        pread_into(record, start, view)
        crc, start = crc32(view, crc), start + len(view)
    return crc


def pread_into(record: StoredBytes, start: int, view: memoryview) -> None:
    """Fills `view` with the bytes of the record from `start`."""
    if start + view.nbytes > record.num_bytes:
        raise CheckpointError(str(record.file), ABSENT, DAMAGED, USE_ANOTHER)
    at, handle = record.offset + start, os.open(record.file, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, at, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        while view.nbytes and (count := os.preadv(handle, [view], at)):
            view, at = view[count:], at + count
    finally:
        os.close(handle)
    if view.nbytes:
        raise CheckpointError(str(record.file), ABSENT, DAMAGED, USE_ANOTHER)


@dataclass(frozen=True)
class Run:
    """Elements that lie side by side in a record."""

    record: StoredBytes
    start: int
    """First byte, from the beginning of the record."""
    numel: int


@dataclass(frozen=True)
class Stored:
    """A tensor whose elements are those of its runs, one after another."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    runs: tuple[Run, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(run.numel for run in self.runs))

    def read(self, start: int, into: torch.Tensor, ledger: Ledger | None = None) -> None:
        view, size = into.view(torch.uint8).numpy().data, self.dtype.itemsize
        index = bisect_right(self._ends, start)
        while view.nbytes:
            if index == len(self.runs):
                raise CheckpointError(str(self.runs[0].record.file), ABSENT, DAMAGED, USE_ANOTHER)
            run = self.runs[index]
            skip = start - (self._ends[index] - run.numel)
            here = view[: min(view.nbytes, (run.numel - skip) * size)]
            pread_into(run.record, run.start + skip * size, here)
            if ledger is not None:
                ledger.note(run.record, run.start + skip * size, here)
            view, start, index = view[here.nbytes :], start + here.nbytes // size, index + 1

    def records(self) -> Iterator[StoredBytes]:
        yield from dict.fromkeys(run.record for run in self.runs)


@dataclass(frozen=True)
class Literal:
    """A small tensor in memory."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, start: int, into: torch.Tensor, ledger: Ledger | None = None) -> None:
        into.copy_(self.tensor.reshape(-1)[start : start + into.numel()])


class Computed:
    """A tensor made from others when it is read; the last few stay, since a tensor is read in many stretches."""

    _recent: OrderedDict[Computed, torch.Tensor] = OrderedDict()  # noqa: RUF012 - shared on purpose: it bounds the memory
    _lock = threading.Lock()

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        make: Callable[[Ledger | None], torch.Tensor],
        of: Iterable[Values] = (),
    ) -> None:
        self.shape, self.dtype, self._make, self.of = tuple(shape), dtype, make, tuple(of)

    def read(self, start: int, into: torch.Tensor, ledger: Ledger | None = None) -> None:
        into.copy_(self._tensor(ledger)[start : start + into.numel()])

    def _tensor(self, ledger: Ledger | None) -> torch.Tensor:
        with self._lock:
            found = self._recent.pop(self, None)
            if found is None:
                while len(self._recent) >= KEPT_TENSORS:
                    self._recent.popitem(last=False)
                found = self._make(ledger).to(self.dtype).reshape(-1)
                assert found.numel() == prod(self.shape)
            self._recent[self] = found
            return found


def stored_tensor(tensor: StoredTensor) -> Values:
    """What a pickle says of a tensor, as runs."""
    axis, inner = len(tensor.shape), 1
    while axis and (tensor.shape[axis - 1] == 1 or tensor.stride[axis - 1] == inner):
        axis -= 1
        inner *= tensor.shape[axis]
    if not tensor.numel:
        return Stored(tensor.shape, tensor.dtype, ())
    if tensor.numel // inner > MOST_RUNS:
        return Computed(tensor.shape, tensor.dtype, lambda _ledger: tensor.read())
    starts = [tensor.offset]
    for length, stride in zip(tensor.shape[:axis], tensor.stride[:axis], strict=True):
        starts = [start + index * stride for start in starts for index in range(length)]
    size = tensor.dtype.itemsize
    return Stored(tensor.shape, tensor.dtype, tuple(Run(tensor.record, start * size, inner) for start in starts))


def box_runs(
    shape: tuple[int, ...], boxes: Iterable[tuple[tuple[int, ...], tuple[int, ...], Stored]]
) -> tuple[Run, ...]:
    """Runs of a tensor that is stored as boxes: (first index, size, values) of each, which together fill it."""
    placed: list[tuple[int, Run]] = []
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    for offsets, sizes, values in boxes:
        placed += _placed(shape, strides, offsets, sizes, values)
    return tuple(run for _, run in sorted(placed, key=lambda item: item[0]))


def _placed(
    shape: tuple[int, ...], strides: list[int], offsets: tuple[int, ...], sizes: tuple[int, ...], values: Stored
) -> Iterator[tuple[int, Run]]:
    """(first element in the whole tensor, run) of each stretch that is contiguous there and in the box."""
    axis = len(shape)
    while axis and sizes[axis - 1 : axis] == shape[axis - 1 : axis]:
        axis -= 1
    length = prod(sizes[max(axis - 1, 0) :])
    starts = [sum(at * step for at, step in zip(offsets, strides, strict=True))]
    for size, step in zip(sizes[: max(axis - 1, 0)], strides, strict=False):
        starts = [start + index * step for start in starts for index in range(size)]
    for number, start in enumerate(starts):
        at = start
        for run in _slice(values, number * length, length):
            yield at, run
            at += run.numel


def _slice(values: Stored, start: int, length: int) -> Iterator[Run]:
    """The runs of elements `start` to `start + length`."""
    at, size = 0, values.dtype.itemsize
    for run in values.runs:
        first, last = max(start, at), min(start + length, at + run.numel)
        if first < last:
            yield Run(run.record, run.start + (first - at) * size, last - first)
        at += run.numel


def stored_in(values: Values) -> Iterator[Stored]:
    """What lies in files, of a tensor and of those that it is made from."""
    if isinstance(values, Stored):
        yield values
    for one in getattr(values, "of", ()):
        yield from stored_in(one)


def same_values(one: Values, other: Values, ledger: Ledger | None = None) -> bool:
    """Whether two tensors hold the same bits, looked at in stretches."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    room = max(1, CHUNK_BYTES // one.dtype.itemsize)
    for start in range(0, numel(one), room):
        size = min(room, numel(one) - start)
        pair = [torch.empty(size, dtype=one.dtype) for _ in range(2)]
        one.read(start, pair[0], ledger)
        other.read(start, pair[1], ledger)
        if not torch.equal(pair[0].view(torch.uint8), pair[1].view(torch.uint8)):
            return False
    return True
