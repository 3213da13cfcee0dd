"""Training a SentencePiece tokenizer that gives every text back as it was: spaces, newlines, any script."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from launcher.data.pieces import fast_tokenizer, parse_model
from launcher.errors import ABSENT, DataError

_OPTIONS: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,  # indentation
    "byte_fallback": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": 3,
    "control_symbols": ["<cls>", "<sep>", "<mask>"],  # 4, 5, 6
    # every character of the names of special and byte pieces, so that such a name in a text can be spelled out
    "required_chars": "<>/0123456789ABCDEFabcdeklmnpsux",
    "character_coverage": 0.9995,  # SentencePiece's default; the rest goes by bytes
    "num_threads": 1,  # sums of floats in threads depend on their number
    "max_sentence_length": 1 << 20,  # bytes; longer lines would be left out in silence
    "minloglevel": 2,
}

_LINE_CHARACTERS = 1 << 16
"""Longer lines are cut for training: four bytes each at most, well below `max_sentence_length`."""

_SCORE_STEPS_PER_NAT = 16
"""Scores of a unigram model are rounded to 1/16 nat. SentencePiece adds them in fp32 over a whole text, which is exact
up to 2^24 / 16 = 1 M nats (some 100,000 tokens in one text): below that, no segmentation hangs on rounding errors."""


def train_sentencepiece(
    texts: Iterable[str], kind: Literal["unigram", "bpe"], vocab_size: int, out_dir: Path, *, add_cls_sep: bool = False
) -> Any:
    """Train, and save in `out_dir` what `AutoTokenizer.from_pretrained` and `SentencePieceProcessor` open alike.

    Ids: <unk> 0, <s> 1, </s> 2, <pad> 3, <cls> 4, <sep> 5, <mask> 6, 256 bytes, then the pieces learnt.
    Nothing is added to a text, or with `add_cls_sep` `<cls>` and `<sep>`. The same texts give the same files.
    """
    proto = parse_model(_trained(texts, kind, vocab_size))
    if kind == "unigram":
        _round_scores(proto)
    tokenizer = fast_tokenizer(proto, add_cls_sep=add_cls_sep)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out_dir)
    (out_dir / "tokenizer.model").write_bytes(proto.SerializeToString(deterministic=True))
    return tokenizer


def _trained(texts: Iterable[str], kind: str, vocab_size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts), model_writer=model, model_type=kind, vocab_size=vocab_size, **_OPTIONS
        )
    except RuntimeError as error:
        raise _explained(vocab_size, str(error)) from None
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """SentencePiece learns from lines; a newline itself is one byte piece. NUL is refused by its trainer."""
    for text in texts:
        for line in text.replace("\0", "").split("\n"):
            if line.strip():
                yield from (line[i : i + _LINE_CHARACTERS] for i in range(0, len(line), _LINE_CHARACTERS))


def _explained(vocab_size: int, complaint: str) -> DataError:
    """SentencePiece's own words on the size hold the size that is possible."""
    path = "data.train_tokenizer.vocab_size"
    if too_high := re.search(r"value <= (\d+)", complaint):
        return DataError(path, vocab_size, "is more than this text gives pieces for", f"at most {too_high[1]}")
    if too_low := re.search(rf"{vocab_size} vs (\d+)", complaint):
        rule = "leaves no room for the bytes, the special pieces and the characters of this text"
        return DataError(path, vocab_size, rule, f"more than {too_low[1]}")
    if "sentences_.empty()" in complaint:
        return DataError("data.train", ABSENT, "holds no text to train a tokenizer on", "give files with text in them")
    return DataError("data.train_tokenizer", ABSENT, f"fails in SentencePiece ({complaint})", "give other text")


def _round_scores(proto: Any) -> None:
    for piece in proto.pieces:
        piece.score = round(piece.score * _SCORE_STEPS_PER_NAT) / _SCORE_STEPS_PER_NAT
