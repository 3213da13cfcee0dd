"""Next-token prediction: documents joined and cut into blocks, or one window of a document per row.

A row holds tokens only, and with a stride also which of them count: what a window shares with the one before it is
there to look back on. A row's first token has nothing before it and is never a target, so a row of n tokens has n - 1
targets, and a block of one token, which would have none, is not made.
torch is imported where tensors are made: preparing data needs `rows` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from launcher.task import IGNORED, Batch, Kind, Metrics, Record, Row

if TYPE_CHECKING:
    from torch import Tensor


class CausalLM:
    name = "causal_lm"
    auto_class = "AutoModelForCausalLM"
    logits_per_token = True
    every_token_counts_alike = True
    sequences_per_sample = 1

    def __init__(self, seq_len: int, packing: Literal["concat", "none", "best_fit"], stride: int = 0) -> None:
        """stride: tokens that two windows of a document share; it needs a packing other than `concat`."""
        self.seq_len = seq_len
        self.packing = packing
        self.stride = stride
        self.columns: dict[str, Kind] = {"input_ids": "tokens", **({"loss_mask": "bytes"} if stride else {})}
        self.config_overrides: dict[str, Any] = {}

    def logits_width(self, config: Any) -> int:
        return int(config.vocab_size)

    def rows(self, records: Iterable[Sequence[Record]], tokenizer: Any) -> Iterator[Row]:
        documents = _documents(records, tokenizer)
        if self.stride:
            return _shared_windows(documents, self.seq_len, self.stride)
        blocks = _packed(documents, self.seq_len) if self.packing == "concat" else _windows(documents, self.seq_len)
        return ({"input_ids": block} for block in blocks if len(block) > 1)

    def collate(self, rows: Sequence[Row], pad_id: int) -> Batch:
        from launcher.task.padding import pad_right, padded

        batch = pad_right(rows, pad_id)
        counts = batch["attention_mask"]
        if "loss_mask" in rows[0]:
            counts = padded([row["loss_mask"] for row in rows], 0)
        labels = batch["input_ids"].masked_fill(counts == 0, IGNORED)
        labels[:, 0] = IGNORED  # nothing predicts it; said here so that a count of labels is a count of targets
        return {**batch, "labels": labels}

    def dummy_rows(self, count: int) -> list[Row]:
        return [{"input_ids": [0], **({"loss_mask": [0]} if self.stride else {})} for _ in range(count)]

    def num_valid(self, batch: Batch) -> int:
        return num_next_tokens(batch)

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        return next_token_loss_sum(logits, batch)

    def token_targets(self, batch: Batch) -> Tensor:
        return next_tokens(batch)

    def loss_of_nats(self, nats: Tensor, batch: Batch) -> Tensor:
        return nats.sum()

    def metrics(self, num_samples: int = 0) -> Metrics:
        return next_token_metrics()


def num_next_tokens(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def next_token_loss_sum(logits: Tensor, batch: Batch) -> Tensor:
    """Sum of the cross entropies in nats of every token that counts, given those before it; `logits` (B, T, V)."""
    return cross_entropy_sum(logits, next_tokens(batch))


def next_token_metrics() -> Metrics:
    """Loss in nats per target, perplexity, and the share of the targets that were the likeliest token."""
    from launcher.task.metrics import TokenMetrics

    return TokenMetrics(next_tokens)


def next_tokens(batch: Batch) -> Tensor:
    """Target of each position (B, T): the token after it. Labels move, not logits: no copy of (B, T, V)."""
    from torch.nn import functional

    return functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    from torch.nn import functional

    flat = logits.reshape(-1, logits.shape[-1]).float()
    return functional.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED, reduction="sum")


def _documents(records: Iterable[Sequence[Record]], tokenizer: Any) -> Iterator[NDArray[np.int64]]:
    """Token ids of each record with the end-of-text token behind; a record without a token is left out."""
    for some in records:
        texts = [record.text for record in some]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids in encoded["input_ids"]:
            if ids:
                yield np.array([*ids, tokenizer.eos_token_id], dtype=np.int64)


def _packed(documents: Iterable[NDArray[np.int64]], seq_len: int) -> Iterator[NDArray[np.int64]]:
    """Blocks of exactly `seq_len` tokens of the joined documents, then what is left over as a shorter one."""
    held: list[NDArray[np.int64]] = []
    num_held = 0
    for document in documents:
        held.append(document)
        num_held += len(document)
        if num_held >= seq_len:
            joined = np.concatenate(held)
            end = num_held - num_held % seq_len
            yield from joined[:end].reshape(-1, seq_len)
            held, num_held = [joined[end:].copy()], num_held - end
    if num_held:
        yield np.concatenate(held)


def _windows(documents: Iterable[NDArray[np.int64]], seq_len: int) -> Iterator[NDArray[np.int64]]:
    for document in documents:
        for start in range(0, len(document), seq_len):
            yield document[start : start + seq_len]


def _shared_windows(documents: Iterable[NDArray[np.int64]], seq_len: int, stride: int) -> Iterator[Row]:
    """Windows that begin `seq_len - stride` tokens apart; the last is the one that reaches the document's end."""
    for document in documents:
        for start in range(0, max(1, len(document) - stride), seq_len - stride):
            window = document[start : start + seq_len]
            mask = np.ones(len(window), dtype=np.uint8)
            mask[: stride if start else 0] = 0
            if mask[1:].any():
                yield {"input_ids": window, "loss_mask": mask}
