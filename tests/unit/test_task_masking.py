"""What is masked depends on (seed, sample, epoch) alone, follows BERT's shares, and spares the special tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.task import IGNORED
from launcher.task.masking import mask_tokens, uniform

MASK, VOCAB = 4, 1000
PROMISED = (
    [4, 101, 102, 103, 4, 4, 106, 107, 108, 4, 4, 4],
    [100, -100, -100, -100, 104, 105, -100, -100, -100, 109, 110, 111],
)


def masked(
    length: int, sample: int = 0, seed: int = 1, epoch: int = 0, share: float = 0.15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.arange(length) + 10
    special = np.zeros(length, dtype=bool)
    special[[0, -1]] = True
    return ids, *mask_tokens(ids, special, seed, sample, epoch, mask_id=MASK, vocab_size=VOCAB, share=share)


@given(
    length=st.integers(2, 200),
    sample=st.integers(0, 2**63 - 1),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 2**31),
    share=st.floats(0.01, 1.0),
)
@settings(max_examples=200, deadline=None)
def test_it_is_a_function_and_spares_special_tokens(
    length: int, sample: int, seed: int, epoch: int, share: float
) -> None:
    ids, shown, labels = masked(length, sample, seed, epoch, share)
    again = masked(length, sample, seed, epoch, share)
    assert np.array_equal(shown, again[1])
    assert np.array_equal(labels, again[2])
    drawn = labels != IGNORED
    assert np.array_equal(labels[drawn], ids[drawn])
    assert np.array_equal(shown[~drawn], ids[~drawn])
    assert not drawn[[0, -1]].any()
    assert min(1, length - 2) <= drawn.sum() <= np.ceil(share * (length - 2)) + 1
    assert 0 <= shown.min() <= shown.max() < VOCAB


def test_the_shares_are_those_of_bert() -> None:
    """400 rows of 500 tokens: 30,000 drawn, so three standard deviations of each share are below 0.007."""
    rows = [masked(502, sample) for sample in range(400)]
    drawn = sum(int((labels != IGNORED).sum()) for _, _, labels in rows)
    to_mask = sum(int((shown[labels != IGNORED] == MASK).sum()) for _, shown, labels in rows)
    kept = sum(int(((shown == ids) & (labels != IGNORED)).sum()) for ids, shown, labels in rows)
    assert drawn / (400 * 500) == pytest.approx(0.15, abs=0.0003)
    assert to_mask / drawn == pytest.approx(0.8, abs=0.007)
    assert kept / drawn == pytest.approx(0.1, abs=0.007)


def test_every_token_is_drawn_about_equally_often() -> None:
    """4,000 rows of 20 tokens at 0.15: 600 each, standard deviation below 23."""
    counts = sum((masked(22, sample)[2] != IGNORED).astype(int) for sample in range(4000))
    assert np.abs(counts[1:-1] - 600).max() < 4 * 23


def test_samples_epochs_and_seeds_differ() -> None:
    base = masked(502)[1]
    for other in (masked(502, sample=1), masked(502, epoch=1), masked(502, seed=2)):
        assert not np.array_equal(base, other[1])


def test_neighbouring_streams_do_not_correlate() -> None:
    """Correlation of 10,000 independent pairs has standard deviation 0.01."""
    first = uniform(1, 0, 0, 10_000)
    for other in (uniform(1, 1, 0, 10_000), uniform(1, 0, 1, 10_000), uniform(2, 0, 0, 10_000)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.04


def test_the_masks_never_change_between_releases() -> None:
    """A resumed run must mask as it did: these numbers are a promise."""
    ids = np.arange(100, 112)
    shown, labels = mask_tokens(ids, np.zeros(12, dtype=bool), 7, 3, 1, mask_id=MASK, vocab_size=VOCAB, share=0.5)
    assert (shown.tolist(), labels.tolist()) == PROMISED
