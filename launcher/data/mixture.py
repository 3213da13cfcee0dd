"""Several sources in fixed shares: which source, and which of its samples, stands at a global position.

Weights are whole numbers. In every prefix of n samples a source of weight w among W in all has n w / W of them, off by
less than one: a schedule of W places is made once by earliest deadline first (Baruah, Cohen, Plaxton and Varvel,
"Proportionate progress", Algorithmica 1996) and repeats, so a position costs one look-up. A source that has given all
it may drops out, and the others go on in their shares; that happens at most once per source, at computable places.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from math import lcm

import numpy as np

from launcher.data.order import Ints, permute

MAX_PERIOD = 100_000
"""Places of a schedule: weights of five digits. Beyond, the schedule would take seconds to make and megabytes to keep."""


@dataclass(frozen=True)
class Source:
    """One source of a mixture."""

    name: str
    """What its own order is keyed by, and its count is kept under: the fingerprint of its data."""
    num_samples: int
    weight: int
    limit: int | None = None
    """Samples it gives at most, over all its epochs."""


@dataclass(frozen=True)
class Places:
    """What stands at consecutive global positions, one entry per position."""

    sources: Ints
    samples: Ints
    epochs: Ints


@dataclass(frozen=True)
class MixtureOrder:
    """The order from global position `start` on, where source i had already given `given[i]` samples."""

    sources: tuple[Source, ...]
    seed: int
    start: int = 0
    given: tuple[int, ...] = ()

    @property
    def end(self) -> int | None:
        """The first position at which every source is used up; None if one of them never is."""
        last = self._stretches[-1]
        return None if last.active else last.start

    def places(self, start: int, count: int) -> Places:
        """Sources, samples within each, and epochs of each at `start` ... `start + count - 1`, which lie before `end`."""
        assert start >= self.start, "what lies before belongs to an earlier mixture"
        parts = [stretch.turns(*span) for stretch, span in self._spans(start, start + count)]
        sources = np.concatenate([np.empty(0, dtype=np.int64), *(part[0] for part in parts)])
        turns = np.concatenate([np.empty(0, dtype=np.int64), *(part[1] for part in parts)])
        assert len(sources) == count, "the run is no longer than the mixture"
        samples, epochs = np.empty_like(turns), np.empty_like(turns)
        for number in np.unique(sources).tolist():
            mine = sources == number
            samples[mine], epochs[mine] = self._drawn(self.sources[number], turns[mine])
        return Places(sources, samples, epochs)

    def samples(self, start: int, count: int) -> Ints:
        """As `GlobalOrder.samples`, where the samples of all sources stand one source after another."""
        places = self.places(start, count)
        sizes = np.array([source.num_samples for source in self.sources], dtype=np.int64)
        return (np.cumsum(sizes) - sizes)[places.sources] + places.samples

    def epochs(self, start: int, count: int) -> Ints:
        """The epoch of its own source at each of these positions."""
        return self.places(start, count).epochs

    def counts(self, position: int) -> dict[str, int]:
        """Samples that each source has given before `position`, by name."""
        stretch = next(s for s in reversed(self._stretches) if s.start <= position)
        return dict(zip([s.name for s in self.sources], stretch.given_before(position), strict=True))

    def _drawn(self, source: Source, turns: Ints) -> tuple[Ints, Ints]:
        """The samples of a source's turns, each epoch a permutation keyed by (seed, epoch, source)."""
        epochs, places = np.divmod(turns, source.num_samples)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            samples[mine] = permute(places[mine], source.num_samples, self.seed, epoch, source.name)
        return samples, epochs

    def _spans(self, start: int, end: int) -> Iterator[tuple[_Stretch, tuple[int, int]]]:
        for stretch, after in pairwise([*self._stretches, None]):
            assert stretch is not None
            first = max(start, stretch.start)
            last = min(end, after.start) if after else end
            if first < last and stretch.active:
                yield stretch, (first, last)

    @cached_property
    def _stretches(self) -> tuple[_Stretch, ...]:
        """One per set of sources that still give; the last is the one in which no limit is reached any more."""
        given = self.given or (0,) * len(self.sources)
        stretches = [_Stretch.of(self.sources, self.start, given)]
        while (end := stretches[-1].end) is not None:
            stretches.append(_Stretch.of(self.sources, end, stretches[-1].given_before(end)))
        return tuple(stretches)


@dataclass(frozen=True)
class _Stretch:
    """Positions from `start` on, over which the same sources give."""

    sources: tuple[Source, ...]
    start: int
    given: tuple[int, ...]
    active: tuple[int, ...]

    @classmethod
    def of(cls, sources: tuple[Source, ...], start: int, given: tuple[int, ...]) -> _Stretch:
        active = [i for i, s in enumerate(sources) if s.limit is None or given[i] < s.limit]
        return cls(sources, start, given, tuple(active))

    @cached_property
    def _schedule(self) -> _Schedule:
        return schedule(tuple(self.sources[i].weight for i in self.active))

    def turns(self, first: int, last: int) -> tuple[Ints, Ints]:
        """Of positions first ... last - 1: the source, and how many samples it has given before."""
        rounds, offsets = np.divmod(np.arange(first - self.start, last - self.start), self._schedule.period)
        chosen = self._schedule.pattern[offsets]
        weights = np.array([self.sources[i].weight for i in self.active])[chosen] // self._schedule.divisor
        numbers = np.array(self.active)[chosen]
        return numbers, np.array(self.given)[numbers] + rounds * weights + self._schedule.ranks[offsets]

    def given_before(self, position: int) -> tuple[int, ...]:
        given = list(self.given)
        if self.active:
            rounds, offset = divmod(position - self.start, self._schedule.period)
            within = np.bincount(self._schedule.pattern[:offset], minlength=len(self.active)).tolist()
            for i, extra in zip(self.active, within, strict=True):
                given[i] += rounds * self.sources[i].weight // self._schedule.divisor + extra
        return tuple(given)

    @cached_property
    def end(self) -> int | None:
        """The position after the last sample of the first source that is used up."""
        ends = []
        for chosen, i in enumerate(self.active):
            if (limit := self.sources[i].limit) is not None:
                weight = self.sources[i].weight // self._schedule.divisor
                rounds, rank = divmod(limit - self.given[i] - 1, weight)
                offset = int(np.flatnonzero(self._schedule.pattern == chosen)[rank])
                ends.append(self.start + rounds * self._schedule.period + offset + 1)
        return min(ends, default=None)


@dataclass(frozen=True, eq=False)
class _Schedule:
    """Which source at each place of the period, and how many times it stood there before."""

    pattern: Ints
    ranks: Ints
    divisor: int
    """The common divisor of the weights, which the period leaves out."""

    @property
    def period(self) -> int:
        return len(self.pattern)


@lru_cache(maxsize=64)
def schedule(weights: tuple[int, ...]) -> _Schedule:
    """Earliest deadline first: turn k of weight w among W may begin at floor(k W / w) and must end by ceil((k + 1) W / w).

    Such windows can always be met, and whoever keeps them is off its share by less than one at every place.
    """
    divisor = int(np.gcd.reduce(np.array(weights)))
    parts = [weight // divisor for weight in weights]
    period = sum(parts)
    waiting = [(0, i, 0) for i in range(len(parts))]
    ready: list[tuple[int, int, int]] = []
    pattern, ranks = np.empty(period, dtype=np.int64), np.empty(period, dtype=np.int64)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, i, turn = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(turn + 1) * period // parts[i]), i, turn))
        _, i, turn = heapq.heappop(ready)
        pattern[place], ranks[place] = i, turn
        if turn + 1 < parts[i]:
            heapq.heappush(waiting, ((turn + 1) * period // parts[i], i, turn + 1))
    return _Schedule(pattern, ranks, divisor)


def whole_weights(weights: Sequence[float]) -> tuple[int, ...] | None:
    """The same shares in whole numbers, read as the decimals that they are written as; None if above `MAX_PERIOD`."""
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [int(weight * lcm(*(w.denominator for w in exact))) for weight in exact]
    divisor = int(np.gcd.reduce(np.array(whole, dtype=object)))
    parts = tuple(weight // divisor for weight in whole)
    return parts if sum(parts) <= MAX_PERIOD else None
