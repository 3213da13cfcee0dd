"""From the global order to what one rank reads: micro-batches of a step, a prefetch thread, batches to evaluate.

The rows of step s are the same set on any number of ranks: the global batch is cut from the order first, then dealt to
the ranks. Nothing here has a state but the thread; a position is one integer.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from launcher.data.deal import Deal, by_cost, by_length
from launcher.data.mapped import Allocate
from launcher.data.order import Ints
from launcher.errors import DataError
from launcher.task import Row
from launcher.task.block import TokenBlock

StepT = TypeVar("StepT")


class RowSource(Protocol):
    """What a split is to this module: a prepared one, its bins, or several together."""

    def __len__(self) -> int: ...

    def rows(self, ids: Ints) -> list[Row]: ...

    def costs(self, ids: Ints) -> Ints:
        """What evens out the ranks' work: the tokens of a sample, or what the attention of a bin costs."""

    def block(self, ids: Ints, allocate: Allocate | None = None) -> Ints | None:
        """The tokens of samples of equal length that hold nothing else, (samples, tokens)."""

    def blocks(self, ids: Ints, num_rows: int, allocate: Allocate | None = None) -> Iterator[Ints] | None:
        """The same in pieces of `num_rows` samples."""


class Order(Protocol):
    """Which sample stands at a global position: a function of nothing else."""

    def samples(self, start: int, count: int) -> Ints: ...

    def epochs(self, start: int, count: int) -> Ints: ...


@dataclass(frozen=True)
class Cursor:
    """Where the run stands in the data: samples consumed so far over all epochs and ranks, and of which data."""

    position: int
    fingerprint: str
    segments: tuple[dict[str, Any], ...] = ()
    """Of a mixture: from which position and day on which sources were drawn from, and what each had given by then."""

    def to_json(self) -> dict[str, Any]:
        segments = {"segments": list(self.segments)} if self.segments else {}
        return {"position": self.position, "fingerprint": self.fingerprint, **segments}

    @classmethod
    def from_json(cls, saved: dict[str, Any], fingerprint: str) -> Cursor:
        """The saved cursor, if it is one of the data with this fingerprint; otherwise `DataError`."""
        if saved["fingerprint"] != fingerprint:
            raise DataError(
                "data",
                fingerprint,
                f"is not the fingerprint of the data this run was trained on so far ({saved['fingerprint']})",
                "restore that data, or start afresh in another output_dir",
            )
        return cls(int(saved["position"]), fingerprint, tuple(saved.get("segments", ())))


Dealing = Literal["in_turns", "by_cost", "by_length"]


@dataclass(frozen=True)
class BatchStream:
    """One rank's share of each optimiser step; how the global batch is shared out is `deal.py`'s."""

    split: RowSource
    order: Order
    global_batch_size: int
    rank: int
    world_size: int
    micro_batch_size: int
    dealing: Dealing = "in_turns"
    allocate: Allocate | None = None
    """Makes the memory of blocks of tokens; pinned where they go to an accelerator."""
    ahead: Callable[[int], None] | None = None
    """Told where each step begins, before its rows are read: what comes after may be fetched."""

    def __post_init__(self) -> None:
        assert self.global_batch_size % (self.world_size * self.micro_batch_size) == 0, "the planner sees to it"

    def micro_batches(self, position: int) -> Iterator[Sequence[Row]]:
        """The rows of the optimiser step that starts at global `position`; each says its `sample` and its `epoch`."""
        yield from self._shares(position)

    def _shares(self, position: int) -> Iterable[Sequence[Row]]:
        if self.ahead:
            self.ahead(position)
        ids = self.order.samples(position, self.global_batch_size)
        if self.dealing == "in_turns":  # `in_turns` in two slices: a step of thousands of rows costs no list of them
            return self._in_turns(
                ids[self.rank :: self.world_size], self._epochs(position)[self.rank :: self.world_size]
            )
        shares = self._deal(ids)[self.rank]
        mine = np.concatenate([np.array(share, dtype=np.int64) for share in shares])
        rows = self._rows(ids[mine], self._epochs(position)[mine])
        ends = np.cumsum([len(share) for share in shares]).tolist()
        return [rows[end - len(share) : end] for share, end in zip(shares, ends, strict=True)]

    def _in_turns(self, ids: Ints, epochs: Ints) -> Iterable[Sequence[Row]]:
        size = self.micro_batch_size
        blocks = self.split.blocks(ids, size, self.allocate)
        if blocks is None:
            rows = self._single(ids, epochs)
            return [rows[i : i + size] for i in range(0, len(rows), size)]
        begins = range(0, len(ids), size)
        return (TokenBlock(b, ids[i : i + size], epochs[i : i + size]) for i, b in zip(begins, blocks, strict=True))

    def _epochs(self, position: int) -> Ints:
        return self.order.epochs(position, self.global_batch_size)

    def _deal(self, ids: Ints) -> Deal:
        costs = self.split.costs(ids)
        if self.dealing == "by_cost":
            return by_cost(costs, self.world_size, self.micro_batch_size)
        return by_length(costs, self.world_size, len(ids) // (self.world_size * self.micro_batch_size))

    def _rows(self, ids: Ints, epochs: Ints) -> Sequence[Row]:
        tokens = self.split.block(ids, self.allocate)
        if tokens is not None:
            return TokenBlock(tokens, ids, epochs)
        return self._single(ids, epochs)

    def _single(self, ids: Ints, epochs: Ints) -> list[Row]:
        rows = self.split.rows(ids)
        for row, epoch in zip(rows, epochs.tolist(), strict=True):
            for sample in row.get("documents", [row]):
                sample["epoch"] = epoch
        return rows


def eval_batches(
    split: RowSource, rank: int, world_size: int, batch_size: int, max_samples: int | None = None
) -> Iterator[list[Row]]:
    """Samples 0, 1, 2, ... in turns over the ranks, each once. Every rank gets as many batches; late ones may be short or empty."""
    num_samples = len(split) if max_samples is None else min(len(split), max_samples)
    stride = world_size * batch_size
    for start in range(0, num_samples, stride):
        ids = np.arange(start + rank, min(start + stride, num_samples), world_size)
        yield split.rows(ids) if ids.size else []


class Prefetcher(Generic[StepT]):
    """Makes step n + 1 in a thread while the caller computes step n. Threads do: reading is a memory-mapped gather.

    `with Prefetcher(make, start, stride) as steps: for step in steps: ...`; `make(position)` runs in the thread, for
    start, start + stride, ... An error there is raised in the caller. Leaving the `with` ends the thread.
    """

    def __init__(self, make: Callable[[int], StepT], start: int, stride: int, stop: int | None = None) -> None:
        self._make = make
        self._positions = iter(_positions(start, stride, stop))
        self._ready: queue.Queue[tuple[StepT | None, BaseException | None] | None] = queue.Queue(maxsize=1)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher[StepT]:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[StepT]:
        while (item := self._ready.get()) is not None:
            step, error = item
            if error is not None:
                raise error
            yield step  # type: ignore[misc]  # a step whenever there is no error

    def close(self) -> None:
        self._closing.set()
        while self._thread.is_alive():
            self._drop_one()
            self._thread.join(timeout=0.05)

    def _work(self) -> None:
        for position in self._positions:
            try:
                item = (self._make(position), None)
            except BaseException as error:  # noqa: BLE001  handed to the caller's thread, where it is raised
                self._put((None, error))
                return
            if not self._put(item):
                return
        self._put(None)

    def _put(self, item: tuple[StepT | None, BaseException | None] | None) -> bool:
        """Wait for room, unless the caller is leaving."""
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _drop_one(self) -> None:
        try:
            self._ready.get_nowait()
        except queue.Empty:
            return


def _positions(start: int, stride: int, stop: int | None) -> Iterator[int]:
    position = start
    while stop is None or position < stop:
        yield position
        position += stride
