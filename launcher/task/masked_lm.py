"""Hidden words: a share of the tokens is masked anew in every epoch, and to be guessed from both sides.

A row is a stretch of text framed as the tokenizer frames one (`[CLS]` and `[SEP]`). What is hidden is a pure function of
(seed, sample, epoch): see masking.py. torch is imported where tensors are made: preparing data needs `rows` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from launcher.errors import ABSENT, DataError
from launcher.task import IGNORED, Batch, Kind, Metrics, Record, Row
from launcher.task.causal_lm import cross_entropy_sum
from launcher.task.encoding import frame_of
from launcher.task.masking import mask_tokens

if TYPE_CHECKING:
    from torch import Tensor

SPECIAL, CONTINUES, BEGINS = 0, 1, 2
"""What a token is, in the column `words`: one that frames the text, one inside a word, the first of a word."""


class MaskedLM:
    name = "masked_lm"
    auto_class = "AutoModelForMaskedLM"
    columns: dict[str, Kind] = {"input_ids": "tokens", "words": "bytes"}  # noqa: RUF012 - never altered
    logits_per_token = True
    every_token_counts_alike = True
    sequences_per_sample = 1

    def __init__(
        self,
        seq_len: int,
        packing: Literal["concat", "none", "best_fit"],
        *,
        seed: int = 0,
        share: float = 0.15,
        whole_words: bool = False,
        stride: int = 0,
        mask_id: int | None = None,
        vocab_size: int = 0,
    ) -> None:
        self.seq_len = seq_len
        self.packing = packing
        self.seed = seed
        self.share = share
        self.whole_words = whole_words
        self.stride = stride
        self.mask_id = mask_id
        self.vocab_size = vocab_size
        self.config_overrides: dict[str, Any] = {}

    def logits_width(self, config: Any) -> int:
        return int(config.vocab_size)

    def rows(self, records: Iterable[Sequence[Record]], tokenizer: Any) -> Iterator[Row]:
        """`concat`: texts one after the other, `[SEP]` between them, cut into stretches; `none`: each cut by itself."""
        if tokenizer.mask_token_id is None:
            way_out = "give the tokenizer of a masked language model, or data.train_tokenizer"
            raise DataError("data.tokenizer", ABSENT, "has no mask token", way_out)
        before, behind = frame_of(tokenizer)
        room = self.seq_len - len(before) - len(behind)
        if room <= self.stride:
            shared = f" and behind the {self.stride} of data.stride" if self.stride else ""
            rule = f"leaves no token between the {len(before) + len(behind)} that frame a text{shared}"
            raise DataError("training.seq_len", self.seq_len, rule, "give more")
        texts = _texts(records, tokenizer, self.whole_words)
        if self.packing == "concat":
            texts = _joined(texts, behind, room)
        for ids, words in texts:
            for start in range(0, max(1, len(ids) - self.stride), room - self.stride):
                some, kinds = ids[start : start + room], words[start : start + room]
                if start:  # what the window before has asked for is shown here
                    kinds[: self.stride] = [SPECIAL] * self.stride
                if any(kinds):
                    frame = [SPECIAL] * len(before), [SPECIAL] * len(behind)
                    yield {"input_ids": [*before, *some, *behind], "words": [*frame[0], *kinds, *frame[1]]}

    def collate(self, rows: Sequence[Row], pad_id: int) -> Batch:
        """Masked by each row's `sample` and `epoch`. Without an epoch, as when scoring, the same tokens are asked of every
        model, whatever its seed."""
        from launcher.task.padding import pad_right, padded

        shown = [self._masked(row) for row in rows]
        batch = pad_right([{"input_ids": ids} for ids, _ in shown], pad_id)
        return {**batch, "labels": padded([labels for _, labels in shown], IGNORED)}

    def _masked(self, row: Row) -> tuple[Any, Any]:
        ids, kinds = np.asarray(row["input_ids"], dtype=np.int64), np.asarray(row["words"])
        if not kinds.any():
            return ids, np.full(len(ids), IGNORED)
        assert self.mask_id is not None, "rows are made with a tokenizer that has one"
        words = np.cumsum(kinds == BEGINS) if self.whole_words else None
        return mask_tokens(
            ids,
            kinds == SPECIAL,
            self.seed if "epoch" in row else 0,
            row.get("sample", 0),
            row.get("epoch", 0),
            mask_id=self.mask_id,
            vocab_size=self.vocab_size,
            share=self.share,
            words=words,
        )

    def dummy_rows(self, count: int) -> list[Row]:
        return [{"input_ids": [0], "words": [SPECIAL]} for _ in range(count)]

    def num_valid(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        return cross_entropy_sum(logits, batch["labels"])

    def token_targets(self, batch: Batch) -> Tensor:
        return batch["labels"]

    def loss_of_nats(self, nats: Tensor, batch: Batch) -> Tensor:
        return nats.sum()

    def metrics(self, num_samples: int = 0) -> Metrics:
        """`perplexity` is that of the hidden tokens (a pseudo-perplexity: both sides are known)."""
        from launcher.task.metrics import TokenMetrics

        return TokenMetrics(lambda batch: batch["labels"])


def _texts(
    records: Iterable[Sequence[Record]], tokenizer: Any, whole_words: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """(token ids, `BEGINS` or `CONTINUES` for each) of every text; words are the tokenizer's own pre-tokens."""
    for some in records:
        texts = [record.text for record in some]
        if not whole_words:
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            yield from ((ids, [BEGINS] * len(ids)) for ids in encoded["input_ids"] if ids)
            continue
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
        for i, ids in enumerate(encoded["input_ids"]):
            words = encoded.word_ids(i)
            fresh = [BEGINS if j == 0 or word != words[j - 1] else CONTINUES for j, word in enumerate(words)]
            if ids:
                yield ids, fresh


def _joined(
    texts: Iterable[tuple[list[int], list[int]]], between: list[int], room: int
) -> Iterator[tuple[list[int], list[int]]]:
    """The same tokens in stretches of a multiple of `room`, then what is left over."""
    ids: list[int] = []
    words: list[int] = []
    for some, kinds in texts:
        if ids or words:
            ids, words = [*ids, *between], [*words, *[SPECIAL] * len(between)]
        ids, words = [*ids, *some], [*words, *kinds]
        end = len(ids) - len(ids) % room
        if end:
            yield ids[:end], words[:end]
            ids, words = ids[end:], words[end:]
    if ids:
        yield ids, words
