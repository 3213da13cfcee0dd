"""Dealing a global batch keeps every row once, evens out the ranks' work and leaves little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.deal import Deal, by_cost, by_length, in_turns
from launcher.data.pack import best_fit

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


def all_rows(deal: Deal) -> list[int]:
    return sorted(row for rank in deal for rows in rank for row in rows)


@given(shape=SHAPES, seed=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_every_row_is_dealt_once_and_every_rank_has_as_many_micro_batches(
    shape: tuple[int, int, int], seed: int
) -> None:
    world, micro, steps = shape
    lengths = np.random.default_rng(seed).integers(1, 100, world * micro * steps)
    for deal in (in_turns(len(lengths), world, micro), by_cost(lengths**2, world, micro)):
        assert all_rows(deal) == list(range(len(lengths)))
        assert {len(rows) for rank in deal for rows in rank} == {micro}
        assert {len(rank) for rank in deal} == {steps}
    deal = by_length(lengths, world, steps)
    assert all_rows(deal) == list(range(len(lengths)))
    assert {len(rank) for rank in deal} == {steps}
    padded = [len(rows) * int(lengths[rows].max()) for rank in deal for rows in rank]
    assert max(padded) <= micro * int(lengths.max())


def test_taking_turns_is_the_order_of_old() -> None:
    assert in_turns(8, 2, 2) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


def test_packed_bins_are_dealt_with_like_attention_cost() -> None:
    """Eight ranks with six bins each: taking turns leaves 1.2 and more between the most loaded rank and the mean."""
    random = np.random.default_rng(0)
    lengths = np.exp(random.normal(5.5, 1.2, 40_000)).astype(np.int64).clip(1, 2048)
    bins = best_fit(lengths, 2048)
    costs = np.add.reduceat(lengths[bins.documents] ** 2, bins.starts[:-1])
    turns, dealt = [], []
    for _ in range(50):
        batch = random.choice(costs, 48, replace=False)
        for found, deal in ((turns, in_turns(48, 8, 1)), (dealt, by_cost(batch, 8, 1))):
            loads = np.array([batch[[row for rows in rank for row in rows]].sum() for rank in deal])
            found.append(loads.max() / loads.mean())
    assert np.mean(turns) > 1.2
    assert np.mean(dealt) < 1.02


@pytest.mark.parametrize("world", [1, 2, 4])
def test_like_lengths_leave_little_padding(world: int) -> None:
    """Log-normal lengths, 64 rows in 8 micro-batches."""
    random = np.random.default_rng(1)
    shares: dict[str, list[float]] = {"turns": [], "length": []}
    for _ in range(50):
        lengths = np.exp(random.normal(4, 0.8, 64)).astype(np.int64).clip(1, 512)
        for name, deal in (
            ("turns", in_turns(64, world, 8)),
            ("length", by_length(lengths, world, 8 // world)),
        ):
            padded = sum(len(rows) * int(lengths[rows].max()) for rank in deal for rows in rank)
            shares[name].append(lengths.sum() / padded)
    assert np.mean(shares["turns"]) < 0.5
    assert np.mean(shares["length"]) > 0.8
