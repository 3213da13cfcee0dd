"""Steps are the same on any number of ranks; a thread reads ahead and always ends."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.order import GlobalOrder
from launcher.data.stream import BatchStream, Cursor, Prefetcher, eval_batches
from launcher.errors import DataError
from launcher.task import Row


class Numbers:
    """A split whose row is its own id."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def rows(self, ids: np.ndarray) -> list[Row]:
        return [{"input_ids": [int(i)]} for i in ids]

    def costs(self, ids: np.ndarray) -> np.ndarray:
        return ids % 37 + 1

    def block(self, ids: np.ndarray, allocate: Any = None) -> None:
        """No block: the rows are not of one split."""

    def blocks(self, ids: Any, num_rows: int, allocate: Any = None) -> None:
        """Nor several of them."""


def ids_of(rows: Sequence[Row]) -> list[int]:
    return [row["input_ids"][0] for row in rows]


def step_of(size: int, seed: int, batch: int, world_size: int, position: int) -> list[int]:
    """The global batch, put together again from what each rank got."""
    order, micro = GlobalOrder(size, seed), batch // world_size
    got = []
    for rank in range(world_size):
        stream = BatchStream(Numbers(size), order, batch, rank, world_size, micro_batch_size=micro)
        got.append([i for rows in stream.micro_batches(position) for i in ids_of(rows)])
    return [got[i % world_size][i // world_size] for i in range(batch)]


@given(
    size=st.integers(1, 300),
    seed=st.integers(0, 2**32),
    first=st.sampled_from([1, 2, 3, 4, 6, 12]),
    second=st.sampled_from([1, 2, 3, 4, 6, 12]),
    num_steps=st.integers(1, 20),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_a_change_of_ranks_at_any_step_changes_no_batch(
    size: int, seed: int, first: int, second: int, num_steps: int, data: st.DataObject
) -> None:
    """And over whole epochs every sample is seen exactly as often as there were epochs."""
    batch = 12
    interrupted = data.draw(st.integers(0, num_steps))
    whole = [step_of(size, seed, batch, 1, step * batch) for step in range(num_steps)]
    worlds = [first] * interrupted + [second] * (num_steps - interrupted)
    parts = [step_of(size, seed, batch, world, step * batch) for step, world in enumerate(worlds)]
    assert parts == whole
    seen = np.bincount(np.concatenate(parts), minlength=size)
    assert seen.max() - seen.min() <= 1


def test_micro_batches_have_their_size() -> None:
    stream = BatchStream(Numbers(100), GlobalOrder(100, 0), 12, rank=1, world_size=2, micro_batch_size=2)
    assert [len(rows) for rows in stream.micro_batches(24)] == [2, 2, 2]


@given(
    size=st.integers(1, 60),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 7),
    max_samples=st.none() | st.integers(1, 80),
)
@settings(max_examples=100, deadline=None)
def test_evaluation_scores_each_sample_once_in_equally_many_batches(
    size: int, world_size: int, batch_size: int, max_samples: int | None
) -> None:
    batches = [list(eval_batches(Numbers(size), r, world_size, batch_size, max_samples)) for r in range(world_size)]
    assert len({len(of_rank) for of_rank in batches}) == 1
    seen = sorted(i for of_rank in batches for rows in of_rank for i in ids_of(rows))
    assert seen == list(range(min(size, max_samples or size)))
    assert max(len(rows) for of_rank in batches for rows in of_rank) <= batch_size


def test_a_cursor_comes_back_from_json() -> None:
    cursor = Cursor(position=4096, fingerprint="abc")
    assert Cursor.from_json(cursor.to_json(), "abc") == cursor


def test_a_cursor_of_other_data_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        Cursor.from_json({"position": 8, "fingerprint": "old"}, "new")
    assert str(caught.value) == (
        "data: new is not the fingerprint of the data this run was trained on so far (old); "
        "restore that data, or start afresh in another output_dir"
    )


def test_the_prefetcher_gives_every_step_in_order_and_ends() -> None:
    with Prefetcher(lambda position: position * 10, start=4, stride=2, stop=12) as steps:
        assert list(steps) == [40, 60, 80, 100]
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def test_leaving_early_ends_the_thread() -> None:
    with Prefetcher(lambda position: position, start=0, stride=1) as steps:
        assert next(iter(steps)) == 0
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def test_an_error_while_reading_is_raised_where_the_step_is_taken() -> None:
    def make(position: int) -> int:
        if position == 2:
            raise DataError("shard", 2, "is cut", "prepare again")
        return position

    taken = []
    with Prefetcher(make, start=0, stride=1) as steps, pytest.raises(DataError, match="is cut"):
        taken.extend(steps)
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]
