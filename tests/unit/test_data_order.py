"""The order is a permutation, a good one, and knows nothing of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.order import GlobalOrder, WindowedOrder, permute

SEEDS = st.integers(0, 2**63 - 1)


@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_every_sample_stands_at_one_place(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed, epoch)), np.arange(size))


@pytest.mark.parametrize("size", [*range(1, 18), 255, 256, 257, 65_536, 65_537, 1_000_003])
def test_bijective_around_powers_of_two(size: int) -> None:
    assert np.bincount(permute(np.arange(size), size, 7, 0), minlength=size).tolist() == [1] * size


def test_the_order_never_changes_between_releases() -> None:
    """A resumed run must see the order it started with: these numbers are a promise."""
    assert permute(np.arange(10), 10, seed=1, epoch=0).tolist() == [6, 9, 1, 4, 8, 5, 7, 0, 2, 3]


def test_places_far_out_are_as_cheap_as_near_ones() -> None:
    """No table is made: one step of a corpus of 10^15 samples."""
    ids = GlobalOrder(10**15, seed=3).samples(10**15 - 100, 512)
    assert ids.shape == (512,)
    assert len(set(ids.tolist())) > 500
    assert ids.min() >= 0
    assert ids.max() < 10**15


@given(size=st.integers(1, 60), seed=SEEDS, start=st.integers(0, 120), count=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_a_stretch_of_the_order_is_the_same_however_it_is_cut(size: int, seed: int, start: int, count: int) -> None:
    order = GlobalOrder(size, seed)
    one_by_one = [int(order.samples(position, 1)[0]) for position in range(start, start + min(count, 10))]
    assert order.samples(start, count)[:10].tolist() == one_by_one
    assert order.samples(0, start + count).tolist()[start:] == order.samples(start, count).tolist()


@pytest.mark.parametrize("size", [97, 1000, 100_003])
@pytest.mark.parametrize("seed", range(4))
def test_runs_up_and_down_are_as_in_a_random_sequence(size: int, seed: int) -> None:
    """Wald and Wolfowitz's runs test above and below the median: within 4 standard deviations."""
    above = permute(np.arange(size), size, seed, 0) >= size / 2
    n1, n2 = int(above.sum()), int((~above).sum())
    mean = 1 + 2 * n1 * n2 / size
    variance = (mean - 1) * (mean - 2) / (size - 1)
    runs = 1 + int((above[1:] != above[:-1]).sum())
    assert abs(runs - mean) < 4 * variance**0.5


def test_epochs_and_seeds_are_independent() -> None:
    """Rank correlation of two random permutations of n has standard deviation 1/sqrt(n - 1)."""
    size = 20_000
    base = permute(np.arange(size), size, seed=0, epoch=0)
    others = [permute(np.arange(size), size, seed, epoch) for seed, epoch in ((0, 1), (0, 2), (1, 0), (2, 5))]
    for other in [np.arange(size), *others]:
        assert abs(np.corrcoef(base, other)[0, 1]) < 4 / (size - 1) ** 0.5


def test_every_order_of_three_is_drawn_about_equally_often() -> None:
    """6,000 draws over 6 orders: 1,000 each, standard deviation 29."""
    draws = [tuple(permute(np.arange(3), 3, seed, 0).tolist()) for seed in range(6000)]
    counts = [draws.count(order) for order in sorted(set(draws))]
    assert len(counts) == 6
    assert max(abs(count - 1000) for count in counts) < 130


SHARDS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(sizes=SHARDS, window=st.integers(1, 6), seed=SEEDS, epoch=st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_a_windowed_epoch_holds_every_sample_once_and_reads_a_shard_within_its_window(
    sizes: list[int], window: int, seed: int, epoch: int
) -> None:
    order = WindowedOrder(tuple(sizes), window, seed)
    total = sum(sizes)
    ids = order.samples(epoch * total, total)
    assert sorted(ids.tolist()) == list(range(total))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    for place in range(0, total, max(1, total // 10)):
        assert shard_of[ids[place]] in order.shards(epoch * total + place)[:window]
    # shards change at most once per shard and window: each is done with before its window is left
    last, first = {}, {}
    for place, shard in enumerate(shard_of[ids].tolist()):
        first.setdefault(shard, place)
        last[shard] = place
    wide = max(sum(sorted(sizes)[-window:]), 1)
    assert all(last[shard] - first[shard] < wide for shard in last)


@given(sizes=SHARDS, window=st.integers(1, 6), seed=SEEDS, start=st.integers(0, 2000), count=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_stretch_of_windows_is_the_same_however_it_is_cut(
    sizes: list[int], window: int, seed: int, start: int, count: int
) -> None:
    order = WindowedOrder(tuple(sizes), window, seed)
    cut = count // 2
    parts = [*order.samples(start, cut), *order.samples(start + cut, count - cut)]
    assert order.samples(start, count).tolist() == parts


def test_a_windowed_order_is_as_cheap_far_out() -> None:
    """10^9 samples in 30,000 shards: memory per shard, not per sample."""
    order = WindowedOrder((33_334,) * 30_000, window=16, seed=1)
    ids = order.samples(9 * 10**8, 512)
    assert len(set(ids.tolist())) == 512
    assert len({i // 33_334 for i in ids.tolist()}) == 16


@pytest.mark.parametrize("seed", range(3))
def test_a_windowed_order_passes_the_runs_test_on_sorted_labels(seed: int) -> None:
    """Labels sorted inside each shard, windows of 8 shards, within 4 standard deviations of the mean number of runs."""
    sizes = (500,) * 40
    labels = (WindowedOrder(sizes, 8, seed).samples(0, 20_000) % 500) >= 250
    n1, n2 = int(labels.sum()), int((~labels).sum())
    mean = 1 + 2 * n1 * n2 / len(labels)
    variance = (mean - 1) * (mean - 2) / (len(labels) - 1)
    runs = 1 + int((labels[1:] != labels[:-1]).sum())
    assert abs(runs - mean) < 4 * variance**0.5
