"""Conversations, learnt on the assistant's turns alone; or a prompt with its completion, learnt on the completion.

A row is one conversation, cut at `seq_len` tokens; one of which nothing is left to learn gives no row.
torch is imported where tensors are made: preparing data needs `rows` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from launcher.task import IGNORED, Batch, Kind, Metrics, Record, Row
from launcher.task.causal_lm import next_token_loss_sum, next_token_metrics, next_tokens, num_next_tokens
from launcher.task.templates import learnt_tokens

if TYPE_CHECKING:
    from torch import Tensor


class Chat:
    name = "chat"
    auto_class = "AutoModelForCausalLM"
    columns: dict[str, Kind] = {"input_ids": "tokens", "loss_mask": "bytes"}  # noqa: RUF012 - never altered
    logits_per_token = True
    every_token_counts_alike = True
    sequences_per_sample = 1

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.config_overrides: dict[str, Any] = {}

    def logits_width(self, config: Any) -> int:
        return int(config.vocab_size)

    def rows(self, records: Iterable[Sequence[Record]], tokenizer: Any) -> Iterator[Row]:
        for some in records:
            for record in some:
                ids, mask = learnt_tokens(record, record.parts, tokenizer)
                if any(mask[1 : self.seq_len]):
                    yield {"input_ids": ids[: self.seq_len], "loss_mask": mask[: self.seq_len]}

    def collate(self, rows: Sequence[Row], pad_id: int) -> Batch:
        from launcher.task.padding import pad_right, padded

        batch = pad_right(rows, pad_id)
        labels = batch["input_ids"].masked_fill(padded([row["loss_mask"] for row in rows], 0) == 0, IGNORED)
        labels[:, 0] = IGNORED  # nothing predicts it
        return {**batch, "labels": labels}

    def dummy_rows(self, count: int) -> list[Row]:
        return [{"input_ids": [0], "loss_mask": [0]} for _ in range(count)]

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
