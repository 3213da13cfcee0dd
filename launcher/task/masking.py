"""Which tokens a masked language model must guess, as a function of (seed, sample, epoch) alone.

The rule is BERT's (Devlin et al., NAACL 2019): a share of the tokens is drawn; of these 80% are replaced by the mask
token, 10% by a token at random, 10% stay. The random numbers are counter-based (Philox, Salmon et al., SC 2011), so the
masks depend neither on the batch, the rank nor what was masked before. Only the raw words of the generator are used,
which NumPy promises to keep (NEP 19); its distributions may change.
A row that comes from a stream carries its `sample` (place in the split) and its `epoch` beside `input_ids`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from launcher.task import IGNORED

Ints = NDArray[np.int64]

REPLACED_BY_MASK, REPLACED_BY_RANDOM = 0.8, 0.1
"""Shares of the drawn tokens; the rest stay as they are."""

_WORD = 2**64


def mask_tokens(
    input_ids: Ints,
    special_mask: NDArray[np.bool_],
    seed: int,
    sample: int,
    epoch: int,
    *,
    mask_id: int,
    vocab_size: int,
    share: float = 0.15,
    words: Ints | None = None,
) -> tuple[Ints, Ints]:
    """(ids to show the model, labels), both int64 (T,) like `input_ids`; labels are `IGNORED` where nothing is asked.

    special_mask: (T,), true for tokens that are never drawn (`[CLS]`, `[SEP]`, padding). The number of drawn tokens is
    the share of the others, rounded by a random number so that its mean is exact, and at least 1 if there is one: a
    row without a target teaches nothing. A token at random may be any id below `vocab_size`.
    words: (T,), for each token the number of its word; then whole words are drawn, one after the other, leaving out those
    that would be more tokens than wanted (all but the first), as in BERT's own whole-word masking.
    """
    draws = uniform(seed, sample, epoch, 1 + 3 * len(input_ids))
    order, kind, replacement = draws[1:].reshape(3, -1)
    candidates = np.flatnonzero(~special_mask)
    num_drawn = min(len(candidates), max(1, int(share * len(candidates) + draws[0])))
    in_order = candidates[np.argsort(order[candidates], kind="stable")]
    drawn = in_order[:num_drawn] if words is None else _whole(in_order, words, num_drawn)
    shown, labels = np.array(input_ids, dtype=np.int64), np.full(len(input_ids), IGNORED, dtype=np.int64)
    labels[drawn] = shown[drawn]
    shown[drawn[kind[drawn] < REPLACED_BY_MASK]] = mask_id
    at_random = drawn[kind[drawn] >= 1 - REPLACED_BY_RANDOM]
    shown[at_random] = (replacement[at_random] * vocab_size).astype(np.int64)
    return shown, labels


def _whole(in_order: Ints, words: Ints, num_drawn: int) -> Ints:
    """Tokens of the words that come first, each word standing where its first drawn token does."""
    held: dict[int, list[int]] = {}
    for token in in_order.tolist():
        held.setdefault(int(words[token]), []).append(token)
    drawn: list[int] = []
    for tokens in held.values():
        if not drawn or len(drawn) + len(tokens) <= num_drawn:
            drawn += tokens
        if len(drawn) >= num_drawn:
            break
    return np.array(drawn, dtype=np.int64)


def uniform(seed: int, sample: int, epoch: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1), a stream of its own for each (seed, epoch, sample) with 2^128 numbers in each.

    The key is (seed, epoch); the sample stands in the upper half of the 256-bit counter, which counting up from 0 never
    reaches.
    """
    bits = np.random.Philox(key=seed % _WORD + _WORD * (epoch % _WORD), counter=_WORD**2 * (sample % _WORD))
    return (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53
