"""Rows by memory map: the same tokens row by row and as a block, shards opened when touched, memory given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data import mapped, shards
from launcher.data.mapped import PreparedSplit
from launcher.data.order import GlobalOrder
from launcher.data.stream import BatchStream
from launcher.task.block import TokenBlock
from launcher.task.padding import pad_right

LENGTH = 16


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of two record batches of ten rows, so that a few rows have all kinds of neighbours."""
    monkeypatch.setattr(shards, "BATCH_ROWS", 10)
    monkeypatch.setattr(shards, "SHARD_BYTES", 2 * 10 * LENGTH * 2)


def split_of(folder: Path, rows: list[Any]) -> PreparedSplit:
    schema = shards.Schema({"input_ids": "tokens"}, 50_000)
    entry = shards.write_split(folder / "train", ({"input_ids": row} for row in rows), schema, "of a test")
    return PreparedSplit(folder / "train", entry)


def tokens_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50_000, (count, LENGTH))


@pytest.mark.parametrize("count", [1, 10, 13, 20, 25, 47, 60])
@pytest.mark.usefixtures("small_shards")
def test_a_block_holds_the_rows(tmp_path: Path, count: int) -> None:
    expected = tokens_of(count)
    split = split_of(tmp_path, list(expected))
    ids = np.random.default_rng(1).integers(0, count, 33)
    block = split.block(ids)
    assert block is not None
    assert np.array_equal(block, expected[ids])
    assert [row["input_ids"].tolist() for row in split.rows(ids)] == expected[ids].tolist()


@pytest.mark.usefixtures("small_shards")
def test_a_last_row_that_is_shorter_is_no_part_of_a_block(tmp_path: Path) -> None:
    """As `concat` leaves it: all blocks are full but the last."""
    expected = [*tokens_of(46), np.arange(5)]
    split = split_of(tmp_path, expected)
    assert split.block(np.array([3, 46])) is None
    assert np.array_equal(split.block(np.arange(46)), np.stack(expected[:46]))


@pytest.mark.usefixtures("small_shards")
def test_uneven_rows_are_no_block(tmp_path: Path) -> None:
    split = split_of(tmp_path, [np.arange(1 + i % 7) for i in range(30)])
    assert split.block(np.array([0, 8])) is None
    assert split.costs(np.array([0, 8, 13])).tolist() == [1, 2, 7]
    assert split.lengths().tolist() == [1 + i % 7 for i in range(30)]


@pytest.mark.usefixtures("small_shards")
def test_a_shard_is_opened_when_it_is_touched(tmp_path: Path) -> None:
    split = split_of(tmp_path, list(tokens_of(60)))
    (tmp_path / "train" / split.entry["shards"][2]["file"]).unlink()
    assert split.block(np.array([0, 39])) is not None
    with pytest.raises(FileNotFoundError):
        split.block(np.array([40]))


@pytest.mark.usefixtures("small_shards")
def test_pages_that_were_given_back_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "RESIDENT_BYTES", -(1 << 40))
    monkeypatch.setattr(mapped, "CHECK_ROWS", 1)
    expected = tokens_of(47)
    split = split_of(tmp_path, list(expected))
    for _ in range(3):
        assert np.array_equal(split.block(np.arange(47)), expected)


@pytest.mark.usefixtures("small_shards")
def test_a_stream_of_equal_rows_gives_blocks_into_memory_of_the_callers(tmp_path: Path) -> None:
    expected = tokens_of(48)
    split = split_of(tmp_path, list(expected))
    given: list[np.ndarray] = []

    def allocate(shape: tuple[int, int]) -> np.ndarray:
        given.append(np.empty(shape, dtype=np.int64))
        return given[-1]

    order = GlobalOrder(48, seed=2)
    stream = BatchStream(split, order, 12, rank=1, world_size=2, micro_batch_size=3, allocate=allocate)
    first, second = stream.micro_batches(60)
    ids = order.samples(60, 12)[1::2]
    assert isinstance(first, TokenBlock)
    assert np.array_equal(np.concatenate([first.tokens, second.tokens]), expected[ids])
    assert np.shares_memory(first.tokens, given[0])
    assert [(row["sample"], row["epoch"]) for row in first] == [(int(i), 1) for i in ids[:3]]
    batch = pad_right(first, pad_id=0)
    assert batch["input_ids"].tolist() == expected[ids[:3]].tolist()
    assert batch["attention_mask"].sum() == 3 * LENGTH
