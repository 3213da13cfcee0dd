"""More training records from few: copies with words left out, words swapped, tokens masked (Wei and Zou, EMNLP 2019).

A copy is a function of the record, its number and the seed alone; held-out records have none.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np

from launcher.errors import ABSENT, DataError
from launcher.job.spec import AugmentSection
from launcher.task import Record, Row


def copies_of(record: Record, options: AugmentSection, seed: int) -> list[Record]:
    """The altered copies of a record; what it is labelled with stays."""
    return [_altered(record, options, _generator(record, seed, number)) for number in range(options.copies)]


def masked(row: Row, record: Record, options: AugmentSection, seed: int, tokenizer: Any) -> Row:
    """The row with a share of its tokens hidden; those that frame a text are not."""
    if options.token_masking == 0:
        return row
    mask_id = tokenizer.mask_token_id
    if mask_id is None:
        way_out = "leave it out, or give a tokenizer with a mask token"
        raise DataError("data.augment.token_masking", ABSENT, "needs a mask token, which the tokenizer lacks", way_out)
    ids = np.array(row["input_ids"])
    rng = _generator(record, seed, -1)
    is_hidden = (rng.random(ids.size) < options.token_masking) & ~np.isin(ids, tokenizer.all_special_ids)
    return {**row, "input_ids": np.where(is_hidden, mask_id, ids)}


def _generator(record: Record, seed: int, number: int) -> np.random.Generator:
    digest = blake2b(repr((seed, number, record.text, record.label)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _altered(record: Record, options: AugmentSection, rng: np.random.Generator) -> Record:
    if "pair" not in record.parts:
        return record._replace(text=_altered_text(record.text, options, rng))
    pair = tuple(_altered_text(text, options, rng) for text in record.parts["pair"])
    return record._replace(text="\n".join(pair), parts={**record.parts, "pair": pair})


def _altered_text(text: str, options: AugmentSection, rng: np.random.Generator) -> str:
    """Words are what blanks divide; at least one stays."""
    words = text.split()
    if len(words) < 2:
        return text
    stays = rng.random(len(words)) >= options.word_dropout
    stays[int(rng.integers(len(words)))] = True
    kept = [word for word, is_kept in zip(words, stays.tolist(), strict=True) if is_kept]
    for at in np.flatnonzero(rng.random(len(kept) - 1) < options.word_swap).tolist():
        kept[at], kept[at + 1] = kept[at + 1], kept[at]
    return " ".join(kept)
