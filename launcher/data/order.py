"""The data order is a function, not a state: which sample stands at global position p, for any p, in O(1) memory.

Epoch e is a keyed pseudo-random permutation of the samples: a balanced Feistel network over the smallest domain
4^k >= size, walked on until it lands inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).
The domain is below 4 x size, so fewer than four rounds of the network are expected per position. The round function is
the 64-bit finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) over half-block and round key: mixing, not secrecy.
The key comes from (seed, epoch) alone, so more epochs never change the earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

NUM_ROUNDS = 8
"""Luby and Rackoff need 4 for indistinguishability with random rounds; doubled, since halves of 1 to 3 bits mix slowly."""


def permute(index: Ints, size: int, seed: int, epoch: int) -> Ints:
    """Sample at each place `index` (0 <= index < size) of the epoch; a bijection of range(size) for every size >= 1."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    image = _feistel(index.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(image >= np.uint64(size))
    while outside.size:
        image[outside] = _feistel(image[outside], half_bits, keys)
        outside = outside[image[outside] >= np.uint64(size)]
    return image.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    message = f"fleetune order 1 seed {seed} epoch {epoch}".encode()
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
        parts = [np.empty(0, dtype=np.int64)]
        position, end = start, start + count
        while position < end:
            epoch, place = divmod(position, self.num_samples)
            stop = min(end - position + place, self.num_samples)
            parts.append(permute(np.arange(place, stop), self.num_samples, self.seed, epoch))
            position += stop - place
        return np.concatenate(parts)
