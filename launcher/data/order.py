"""The data order is a function, not a state: which sample stands at global position p, for any p, in O(1) memory.

Epoch e is a keyed pseudo-random permutation of the samples: a balanced Feistel network over the smallest domain
4^k >= size, walked on until it lands inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).
The domain is below 4 x size, so fewer than four rounds of the network are expected per position. The round function is
the 64-bit finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) over half-block and round key: mixing, not secrecy.
The key comes from (seed, epoch) alone, so more epochs never change the earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

NUM_ROUNDS = 8
"""Luby and Rackoff need 4 for indistinguishability with random rounds; doubled, since halves of 1 to 3 bits mix slowly."""

STRETCH = 4096
"""Places computed at once: about a millisecond, which a seek costs too, and 32 KiB."""


def permute(index: Ints, size: int, seed: int, epoch: int, part: str = "") -> Ints:
    """Sample at each place `index` (0 <= index < size) of the epoch; a bijection of range(size) for every size >= 1.

    part: of the data, where several parts have orders of their own.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch, part)
    image = _feistel(index.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(image >= np.uint64(size))
    while outside.size:
        image[outside] = _feistel(image[outside], half_bits, keys)
        outside = outside[image[outside] >= np.uint64(size)]
    return image.astype(np.int64)


def permuted(first: int, last: int, size: int, seed: int, epoch: int, part: str = "") -> Ints:
    """`permute` at the places first ... last - 1, made in stretches: a few places cost as many calls as thousands."""
    if last - first > STRETCH:
        return permute(np.arange(first, last), size, seed, epoch, part)
    begin = first - first % STRETCH
    stretches = [_stretch(at, size, seed, epoch, part) for at in range(begin, last, STRETCH)]
    whole = stretches[0] if len(stretches) == 1 else np.concatenate(stretches)
    return whole[first - begin : last - begin]


@lru_cache(maxsize=16)
def _stretch(begin: int, size: int, seed: int, epoch: int, part: str) -> Ints:
    places = permute(np.arange(begin, min(begin + STRETCH, size)), size, seed, epoch, part)
    places.flags.writeable = False
    return places


def _round_keys(seed: int, epoch: int, part: str) -> NDArray[np.uint64]:
    message = f"fleetune order 1 seed {seed} epoch {epoch}{part and f' part {part}'}".encode()
    return np.frombuffer(blake2b(message, digest_size=8 * NUM_ROUNDS).digest(), dtype="<u8").astype(np.uint64)


def _feistel(block: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = block >> shift, block & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << shift) | right


def _mixed(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser; uint64 arrays wrap modulo 2^64 without a warning."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@dataclass(frozen=True)
class GlobalOrder:
    """The endless sequence of samples, epoch after epoch, that all ranks share."""

    num_samples: int
    seed: int

    def samples(self, start: int, count: int) -> Ints:
        """Sample ids at the global positions start ... start + count - 1, across as many epochs as they span."""
        parts = [
            permuted(first, last, self.num_samples, self.seed, epoch)
            for epoch, first, last in _by_epoch(start, count, self.num_samples)
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def epochs(self, start: int, count: int) -> Ints:
        """The epoch at each of these positions."""
        return np.arange(start, start + count) // self.num_samples


@dataclass(frozen=True)
class WindowedOrder:
    """Like `GlobalOrder`, for data of which only some shards are at hand: shards in random order, then windows of them.

    Each epoch permutes the shards, takes `window` of them at a time and permutes the samples of these. So samples of
    one shard are read within one window, and memory is two integers per shard.
    """

    shard_sizes: tuple[int, ...]
    """Samples of each shard."""
    window: int
    """Shards to draw from at a time."""
    seed: int

    @cached_property
    def num_samples(self) -> int:
        return sum(self.shard_sizes)

    def samples(self, start: int, count: int) -> Ints:
        """As `GlobalOrder.samples`."""
        parts = [
            self._epoch(epoch).samples(np.arange(first, last))
            for epoch, first, last in _by_epoch(start, count, self.num_samples)
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def epochs(self, start: int, count: int) -> Ints:
        return np.arange(start, start + count) // self.num_samples

    def shards(self, position: int) -> list[int]:
        """The shards of the window that holds global `position`, and of the next one: what to fetch, in order."""
        epoch, place = divmod(position, self.num_samples)
        here = self._epoch(epoch).window_of(place)
        following = self._epoch(epoch).window_shards(here + 1) or self._epoch(epoch + 1).window_shards(0)
        return [*self._epoch(epoch).window_shards(here), *following]

    def _epoch(self, epoch: int) -> _EpochOfWindows:
        return _epoch_of_windows(self.shard_sizes, self.window, self.seed, epoch)


@dataclass(frozen=True, eq=False)
class _EpochOfWindows:
    window: int
    seed: int
    epoch: int
    shards: Ints
    """In the order of the epoch."""
    begins: Ints
    """Place in the epoch at which each of them would begin if they were read one after another, and the end."""
    firsts: Ints
    """First sample id of each of them."""

    def samples(self, places: Ints) -> Ints:
        ids = np.empty_like(places)
        windows = self.window_of(places)
        for window in np.unique(windows).tolist():
            mine = windows == window
            begin, end = self._bounds(window)
            inside = permute(places[mine] - begin, end - begin, self.seed, self.epoch, f"window {window}") + begin
            shards = np.searchsorted(self.begins, inside, side="right") - 1
            ids[mine] = self.firsts[shards] + inside - self.begins[shards]
        return ids

    def window_of(self, places: Any) -> Any:
        return (np.searchsorted(self.begins, places, side="right") - 1) // self.window

    def window_shards(self, window: int) -> list[int]:
        return list(map(int, self.shards[window * self.window : (window + 1) * self.window]))

    def _bounds(self, window: int) -> tuple[int, int]:
        last = min((window + 1) * self.window, len(self.shards))
        return int(self.begins[window * self.window]), int(self.begins[last])


@lru_cache(maxsize=4)
def _epoch_of_windows(shard_sizes: tuple[int, ...], window: int, seed: int, epoch: int) -> _EpochOfWindows:
    sizes = np.array(shard_sizes, dtype=np.int64)
    shards = permute(np.arange(len(sizes)), len(sizes), seed, epoch, "shards")
    begins = np.concatenate([[0], np.cumsum(sizes[shards])])
    return _EpochOfWindows(window, seed, epoch, shards, begins, (np.cumsum(sizes) - sizes)[shards])


def _by_epoch(start: int, count: int, num_samples: int) -> Iterator[tuple[int, int, int]]:
    """(epoch, first place, last place + 1) of each stretch of the positions."""
    position, end = start, start + count
    while position < end:
        epoch, place = divmod(position, num_samples)
        stop = min(end - position + place, num_samples)
        yield epoch, place, stop
        position += stop - place
