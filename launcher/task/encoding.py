"""What the tasks ask of a tokenizer beside token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.task import Record, Row

_PROBE = "a"


def text_rows(records: Sequence[Record], tokenizer: Any, seq_len: int) -> list[Row]:
    """A row for each record's text or pair of texts, cut at `seq_len` tokens (of a pair, the longer is cut first).

    `second`: the token where the second text begins; the row's length where there is none.
    """
    pairs = [record.parts.get("pair", (record.text, None)) for record in records]
    firsts, seconds = ([pair[i] for pair in pairs] for i in (0, 1))
    if not any(second is not None for second in seconds):
        encoded = tokenizer(firsts, truncation=True, max_length=seq_len, return_attention_mask=False)
        return [_row(ids, len(ids), tokenizer) for ids in encoded["input_ids"]]
    encoded = tokenizer(firsts, seconds, truncation=True, max_length=seq_len, return_attention_mask=False)
    starts = [second_start(encoded.sequence_ids(i)) for i in range(len(pairs))]
    return [_row(ids, start, tokenizer) for ids, start in zip(encoded["input_ids"], starts, strict=True)]


def second_start(sequence_ids: Sequence[int | None]) -> int:
    """First token of the second text; the number of tokens where it has none left."""
    return next((i for i, number in enumerate(sequence_ids) if number == 1), len(sequence_ids))


def _row(ids: list[int], second: int, tokenizer: Any) -> Row:
    # a tokenizer that adds nothing gives nothing for an empty text, and no model takes a row of 0 tokens
    ids = ids or [filler(tokenizer)]
    return {"input_ids": ids, "second": min(second, len(ids)) or len(ids)}


def filler(tokenizer: Any) -> int:
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
    return int(next(token_id for token_id in known if token_id is not None))


def frame_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a single text: `[CLS]` and `[SEP]`, or nothing."""
    bare = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    framed = tokenizer(_PROBE)["input_ids"]
    start = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    return framed[:start], framed[start + len(bare) :]
