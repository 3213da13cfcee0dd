"""What a run trains on: its own prepared data or a mixture, whole rows or bins, in which order, and as of which cursor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from launcher.checksum import file_digest
from launcher.data.mapped import Allocate, PreparedSplit
from launcher.data.mixture import MAX_PERIOD, MixtureOrder, Source, whole_weights
from launcher.data.order import GlobalOrder, Ints, WindowedOrder
from launcher.data.pack import PackedSplit, pack
from launcher.data.prepared import PreparedData, open_folder
from launcher.data.stream import Cursor, Dealing, Order, RowSource
from launcher.errors import DataError
from launcher.job.spec import DataSection, JobSpec, MixtureSource
from launcher.task import Row


@dataclass(frozen=True)
class TrainingData:
    """The rows of the training split, or of several, with their order."""

    split: RowSource
    order: Order
    dealing: Dealing
    num_tokens: int
    cursor: Cursor
    """Where training begins."""
    end: int | None = None
    """The position at which everything is used up; None where epochs go on for ever."""
    ahead: Callable[[int], None] | None = None
    """Fetches what the positions from this one on will need, where the data lie behind a URL."""

    def cursor_at(self, position: int) -> Cursor:
        return Cursor(position, self.cursor.fingerprint, self.cursor.segments)


def open_training(spec: JobSpec, data: PreparedData, saved: dict[str, Any] | None, today: str) -> TrainingData:
    """The training data of a spec, from the start or from a saved cursor on.

    today: the date that a newly opened segment of a mixture carries. DataError: a cursor of other data, sources that do
    not go together, weights that no schedule holds. Bins that are not planned yet are planned here.
    """
    dealing: Dealing = "by_cost" if is_packed(spec) else spec.data.batching
    if spec.data.mixture:
        return _mixed(spec, data, saved, today, dealing)
    split = _rows_of(spec, data)
    fingerprint = _fingerprint(data, split)
    window = data.origin.window_shards if data.origin else spec.data.window_shards
    if window is None:
        order: Order = GlobalOrder(len(split), spec.seed)
    else:
        order = _windowed(split, window, spec.seed)
        fingerprint += f"+window-{window}"
    cursor = Cursor.from_json(saved, fingerprint) if saved else Cursor(0, fingerprint)
    return TrainingData(split, order, dealing, split.num_tokens, cursor, ahead=_ahead(split, order))


def _windowed(split: PreparedSplit | PackedSplit, window: int, seed: int) -> WindowedOrder:
    assert isinstance(split, PreparedSplit), "bins hold samples of any shard; the spec is checked"
    return WindowedOrder(tuple(shard["num_samples"] for shard in split.entry["shards"]), window, seed)


def _ahead(split: PreparedSplit | PackedSplit, order: Order) -> Callable[[int], None] | None:
    store = split.store if isinstance(split, PreparedSplit) else None
    if store is None or not isinstance(order, WindowedOrder):
        return None
    return lambda position: store.ahead(order.shards(position))


def is_packed(spec: JobSpec) -> bool:
    return spec.data.packing == "best_fit"


def _rows_of(spec: JobSpec, data: PreparedData) -> PreparedSplit | PackedSplit:
    split = data.split("train")
    return pack(split, spec.training.seq_len) if is_packed(spec) else split


def _fingerprint(data: PreparedData, split: PreparedSplit | PackedSplit) -> str:
    """A position counts bins where there are bins, so their plan is part of what it is a position of."""
    return f"{data.fingerprint}+{split.digest}" if isinstance(split, PackedSplit) else data.fingerprint


def _mixed(
    spec: JobSpec, own: PreparedData, saved: dict[str, Any] | None, today: str, dealing: Dealing
) -> TrainingData:
    datas = [own, *(open_folder(Path(source.prepared)) for source in spec.data.mixture)]
    for source, data in zip(spec.data.mixture, datas[1:], strict=True):
        _check_alike(own, data, source.prepared)
    splits = [_rows_of(spec, data) for data in datas]
    names = [_fingerprint(data, split) for data, split in zip(datas, splits, strict=True)]
    sources = _sources(spec, splits, names)
    cursor = _mixture_cursor(spec, sources, saved, today)
    segment = cursor.segments[-1]
    given = tuple(int(segment["given"].get(name, 0)) for name in names)
    order = MixtureOrder(sources, spec.seed, int(segment["from"]), given)
    joined = JoinedSplit(splits)
    return TrainingData(joined, order, dealing, joined.num_tokens, cursor, order.end)


def _sources(spec: JobSpec, splits: Sequence[PreparedSplit | PackedSplit], names: Sequence[str]) -> tuple[Source, ...]:
    drawn: list[DataSection | MixtureSource] = [spec.data, *spec.data.mixture]
    weights = whole_weights([source.weight for source in drawn])
    if weights is None:
        rule = f"have no common denominator up to {MAX_PERIOD}, so no exact schedule"
        shown = ", ".join(str(source.weight) for source in drawn)
        raise DataError("data.mixture: weights", shown, rule, "round them")
    limits = [_limit(source.max_epochs, len(split)) for source, split in zip(drawn, splits, strict=True)]
    return tuple(map(Source, names, map(len, splits), weights, limits))


def _limit(max_epochs: float | None, num_samples: int) -> int | None:
    return None if max_epochs is None else max(1, round(max_epochs * num_samples))


def _mixture_cursor(spec: JobSpec, sources: tuple[Source, ...], saved: dict[str, Any] | None, today: str) -> Cursor:
    """The saved cursor; if the mixture is not the one it was saved under, with a new segment from here on."""
    shares = {s.name: {"weight": s.weight, "limit": s.limit, "num_samples": s.num_samples} for s in sources}
    if saved is None:
        return Cursor(0, "mixture", ({"from": 0, "date": today, "sources": shares, "given": {}},))
    cursor = Cursor.from_json(saved, "mixture")
    last = cursor.segments[-1]
    if last["sources"] == shares:
        return cursor
    given = {**last["given"], **_order_of(last, spec.seed).counts(cursor.position)}
    segment = {"from": cursor.position, "date": today, "sources": shares, "given": given}
    return Cursor(cursor.position, "mixture", (*cursor.segments, segment))


def _order_of(segment: dict[str, Any], seed: int) -> MixtureOrder:
    sources = tuple(
        Source(name, share["num_samples"], share["weight"], share["limit"])
        for name, share in segment["sources"].items()
    )
    given = tuple(int(segment["given"].get(source.name, 0)) for source in sources)
    return MixtureOrder(sources, seed, int(segment["from"]), given)


def _check_alike(own: PreparedData, other: PreparedData, folder: str) -> None:
    """Rows of one run have one vocabulary, one task and one length."""
    for key in ("task", "seq_len", "vocab_size", "labels"):
        if own.index[key] != other.index[key]:
            rule = f"was prepared with {key} {other.index[key]}, this spec's data with {own.index[key]}"
            raise DataError("data.mixture", folder, rule, "prepare both with the same task, seq_len and tokenizer")
    if file_digest(own.tokenizer_dir / "tokenizer.json") != file_digest(other.tokenizer_dir / "tokenizer.json"):
        rule = "was prepared with another tokenizer than this spec's data"
        raise DataError("data.mixture", folder, rule, "prepare both with the same tokenizer")


class JoinedSplit:
    """Several splits as one: the samples of the first, then those of the next."""

    def __init__(self, splits: Sequence[PreparedSplit | PackedSplit]) -> None:
        self._splits = splits

    def __len__(self) -> int:
        return sum(map(len, self._splits))

    @property
    def num_tokens(self) -> int:
        return sum(split.num_tokens for split in self._splits)

    def rows(self, ids: Ints) -> list[Row]:
        rows: list[Row] = [{}] * len(ids)
        for split, mine, inside in self._parts(ids):
            for place, row in zip(mine.tolist(), split.rows(inside), strict=True):
                rows[place] = row
        return rows

    def costs(self, ids: Ints) -> Ints:
        costs = np.empty(len(ids), dtype=np.int64)
        for split, mine, inside in self._parts(ids):
            costs[mine] = split.costs(inside)
        return costs

    def block(self, ids: Ints, allocate: Allocate | None = None) -> Ints | None:
        tokens: Ints | None = None
        for split, mine, inside in self._parts(ids):
            part = split.block(inside)
            if part is None or (tokens is not None and tokens.shape[1] != part.shape[1]):
                return None
            if tokens is None:
                shape = (len(ids), part.shape[1])
                tokens = allocate(shape) if allocate else np.empty(shape, dtype=np.int64)
            tokens[mine] = part
        return tokens

    def blocks(self, ids: Ints, num_rows: int, allocate: Allocate | None = None) -> Iterator[Ints] | None:
        found = []
        for begin in range(0, len(ids), num_rows):
            tokens = self.block(ids[begin : begin + num_rows], allocate)
            if tokens is None:
                return None
            found.append(tokens)
        return iter(found)

    def _parts(self, ids: Ints) -> list[tuple[PreparedSplit | PackedSplit, Ints, Ints]]:
        """Each split that holds some of the ids: which of them, and their numbers in it."""
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        chosen = [np.flatnonzero(numbers == number) for number in range(len(self._splits))]
        found = zip(self._splits, chosen, self._starts.tolist(), strict=True)
        return [(split, mine, ids[mine] - start) for split, mine, start in found if mine.size]

    @cached_property
    def _starts(self) -> Ints:
        sizes = np.array(list(map(len, self._splits)), dtype=np.int64)
        return np.cumsum(sizes) - sizes
