"""Bins hold every document once, as few as best-fit decreasing makes, and the plan is found again or made again alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.mapped import PreparedSplit
from launcher.data.pack import Bins, best_fit, pack
from launcher.data.shards import Schema, write_split
from launcher.errors import DataError


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing as the textbook has it: the lengths in each bin."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [held for held in bins if capacity - sum(held) >= length]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    return bins


@given(capacity=st.integers(1, 40), data=st.data())
@settings(max_examples=300, deadline=None)
def test_the_bins_are_as_full_as_by_placing_one_document_after_another(capacity: int, data: st.DataObject) -> None:
    """How full each is: which of two bins with equal room a document goes into is a matter of taste."""
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    bins = best_fit(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(bins.documents.tolist()) == list(range(len(lengths)))
    held = [sum(lengths[i] for i in bins.of(b)) for b in range(len(bins))]
    assert sorted(held) == sorted(map(sum, one_by_one(lengths, capacity)))


def test_equal_lengths_are_packed_without_a_gap() -> None:
    bins = best_fit(np.full(10, 3, dtype=np.int64), 9)
    assert [len(bins.of(b)) for b in range(len(bins))] == [3, 3, 3, 1]


def test_a_million_documents_of_uneven_length_fill_their_bins() -> None:
    """Log-normal lengths, as in instruction sets; the figure of the paper's kind of plan is 0.9999."""
    lengths = np.exp(np.random.default_rng(0).normal(6, 1.2, 1_000_000)).astype(np.int64).clip(1, 2048)
    bins = best_fit(lengths, 2048)
    assert lengths.sum() / (len(bins) * 2048) > 0.9999


def split_of(folder: Path, lengths: list[int]) -> PreparedSplit:
    rows = ({"input_ids": np.full(length, i)} for i, length in enumerate(lengths))
    return PreparedSplit(folder, write_split(folder, rows, Schema({"input_ids": "tokens"}, 100), "of a test"))


def test_a_row_is_the_documents_of_a_bin(tmp_path: Path) -> None:
    packed = pack(split_of(tmp_path / "train", [5, 3, 4, 2, 6]), 8)
    rows = packed.rows(np.arange(len(packed)))
    held = [[(row["sample"], row["input_ids"].tolist()) for row in bin_["documents"]] for bin_ in rows]
    assert held == [[(4, [4] * 6), (3, [3] * 2)], [(0, [0] * 5), (1, [1] * 3)], [(2, [2] * 4)]]
    assert packed.num_tokens == 20


def test_the_plan_is_stored_once_and_found_again(tmp_path: Path) -> None:
    split = split_of(tmp_path / "train", [5, 3, 4, 2, 6])
    first = pack(split, 8)
    stored = tmp_path / "train" / "bins-8"
    before = (stored / "documents.npy").stat().st_mtime_ns
    again = pack(split, 8)
    assert (stored / "documents.npy").stat().st_mtime_ns == before
    assert again.digest == first.digest == json.loads((stored / "plan.json").read_text())["digest"]
    assert again.bins.documents.tolist() == first.bins.documents.tolist()


@pytest.mark.parametrize("damage", ["cut", "altered", "of other shards"])
def test_a_plan_that_is_not_of_these_shards_is_made_again(tmp_path: Path, damage: str) -> None:
    split = split_of(tmp_path / "train", [5, 3, 4, 2, 6])
    first = pack(split, 8)
    stored = tmp_path / "train" / "bins-8"
    if damage == "cut":
        (stored / "starts.npy").write_bytes(b"")
    elif damage == "altered":
        np.save(stored / "documents.npy", first.bins.documents[::-1].copy())
    else:
        plan = json.loads((stored / "plan.json").read_text())
        (stored / "plan.json").write_text(json.dumps({**plan, "shards": ["another"]}))
    assert pack(split, 8).bins.documents.tolist() == [4, 3, 0, 1, 2]
    assert json.loads((stored / "plan.json").read_text())["digest"] == first.digest


def test_a_plan_that_cannot_be_stored_serves_all_the_same(tmp_path: Path) -> None:
    """A file stands where the plan's folder would: whoever runs the test, it cannot be made."""
    split = split_of(tmp_path / "train", [5, 3])
    (tmp_path / "train" / "bins-8").write_text("in the way")
    assert len(pack(split, 8)) == 1


def test_a_document_longer_than_a_bin_is_named(tmp_path: Path) -> None:
    split = split_of(tmp_path / "train", [5, 9])
    with pytest.raises(DataError, match=r"sample 1: 9 is longer than a bin of 8 tokens"):
        pack(split, 8)


def test_nothing_to_pack() -> None:
    assert len(best_fit(np.empty(0, dtype=np.int64), 8)) == 0
    assert isinstance(best_fit(np.empty(0, dtype=np.int64), 8), Bins)
