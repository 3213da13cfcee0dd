"""A mixture keeps its shares at every prefix, its limits, and what a source has given when the mixture changes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.mixture import MAX_PERIOD, MixtureOrder, Source, schedule, whole_weights

SEEDS = st.integers(0, 2**63 - 1)
WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=7)


def mixture(weights: list[int], limits: list[int | None] | None = None, sizes: list[int] | None = None) -> MixtureOrder:
    limits, sizes = limits or [None] * len(weights), sizes or [10 + 7 * i for i in range(len(weights))]
    sources = [Source(f"s{i}", sizes[i], weights[i], limits[i]) for i in range(len(weights))]
    return MixtureOrder(tuple(sources), seed=5)


@given(weights=WEIGHTS)
@settings(max_examples=300, deadline=None)
def test_every_prefix_has_its_shares_within_one_sample(weights: list[int]) -> None:
    """In exact arithmetic: the error of every source after every place is below 1."""
    made = schedule(tuple(weights))
    for number, weight in enumerate(weights):
        counts = np.cumsum(made.pattern == number)
        errors = [abs(int(c) - Fraction((n + 1) * weight, sum(weights))) for n, c in enumerate(counts)]
        assert max(errors) < 1
        assert errors[-1] == 0


@given(weights=WEIGHTS, seed=SEEDS, start=st.integers(0, 10**12), count=st.integers(1, 50), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_place_does_not_depend_on_where_reading_began(
    weights: list[int], seed: int, start: int, count: int, data: st.DataObject
) -> None:
    order = mixture(weights)
    whole = order.places(start, count)
    at = data.draw(st.integers(0, count - 1))
    alone = order.places(start + at, 1)
    assert (alone.sources[0], alone.samples[0], alone.epochs[0]) == (
        whole.sources[at],
        whole.samples[at],
        whole.epochs[at],
    )


@given(weights=WEIGHTS, data=st.data())
@settings(max_examples=100, deadline=None)
def test_each_source_gives_its_samples_once_per_epoch_and_no_more_than_its_limit(
    weights: list[int], data: st.DataObject
) -> None:
    limits = [data.draw(st.integers(1, 80)) for _ in weights]
    order = mixture(weights, limits)
    assert order.end == sum(limits)
    places = order.places(0, order.end)
    for number, source in enumerate(order.sources):
        mine = places.sources == number
        assert mine.sum() == limits[number]
        for epoch in np.unique(places.epochs[mine]):
            drawn = places.samples[mine & (places.epochs == epoch)]
            assert len(set(drawn.tolist())) == len(drawn) <= source.num_samples
    half = order.end // 2
    assert order.counts(half) == {f"s{i}": int((places.sources[:half] == i).sum()) for i in range(len(weights))}


def test_when_one_is_used_up_the_others_keep_their_shares() -> None:
    order = mixture([1, 2, 1], limits=[3, None, None])
    places = order.places(0, 300)
    after = int(np.flatnonzero(places.sources == 0)[-1]) + 1
    counts = np.bincount(places.sources[after : after + 240], minlength=3)
    assert counts.tolist() == [0, 160, 80]


@given(weights=WEIGHTS, changed=WEIGHTS, at=st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_a_changed_mixture_goes_on_where_each_source_stood(weights: list[int], changed: list[int], at: int) -> None:
    """No sample of a source comes twice in an epoch, and none is left out, across the change."""
    old = mixture(weights)
    counts = old.counts(at)
    sources = tuple(Source(f"s{i}", 10 + 7 * i, weight) for i, weight in enumerate(changed))
    new = MixtureOrder(sources, 5, start=at, given=tuple(counts.get(s.name, 0) for s in sources))
    before, after = old.places(0, at), new.places(at, 200)
    for number, source in enumerate(sources):
        drawn = [*before.samples[before.sources == number], *after.samples[after.sources == number]]
        epochs = [*before.epochs[before.sources == number], *after.epochs[after.sources == number]]
        assert epochs == [i // source.num_samples for i in range(len(drawn))]
        for epoch in range(len(drawn) // source.num_samples):
            part = drawn[epoch * source.num_samples : (epoch + 1) * source.num_samples]
            assert sorted(part) == list(range(source.num_samples))


def test_a_source_alone_and_in_company_has_the_same_order() -> None:
    """The order of a source is keyed by its name: what is mixed in does not change it."""
    alone = MixtureOrder((Source("s1", 17, 1),), seed=5).places(0, 40)
    mixed = mixture([3, 2, 5]).places(0, 400)
    mine = mixed.samples[mixed.sources == 1]
    assert mine[:40].tolist() == alone.samples.tolist()


def test_far_out_it_costs_no_more() -> None:
    """10^9 samples of 1,000 tokens and one step at the end of them: nothing is counted up to there."""
    order = mixture([7, 2, 1], sizes=[10**9, 10**8, 10**6])
    places = order.places(10**9, 512)
    assert len(places.samples) == 512
    assert np.bincount(places.sources).tolist() == pytest.approx([358.4, 102.4, 51.2], abs=1)


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ([0.7, 0.2, 0.1], (7, 2, 1)),
        ([1, 1], (1, 1)),
        ([30, 20], (3, 2)),
        ([0.333, 0.667], (333, 667)),
        ([1e-4, 1], (1, 10_000)),
    ],
)
def test_weights_are_read_as_they_are_written(weights: list[float], whole: tuple[int, ...]) -> None:
    assert whole_weights(weights) == whole


def test_weights_with_too_many_digits_are_not_rounded() -> None:
    assert whole_weights([1 / 7, 0.5]) is None
    assert sum(whole_weights([1, MAX_PERIOD - 1]) or ()) == MAX_PERIOD
