"""The better of two answers, by direct preference optimisation (Rafailov et al., 2023, eq. 7).

loss = -log sigmoid(beta x ((chosen - reference chosen) - (rejected - reference rejected))), each the log-probability of
the whole answer. The reference is the model as it is before training. It never stands beside the model: its two numbers
per sample are computed before the first step and kept (launcher/train/reference.py), and the rows that come to `collate`
carry them as `reference`.
torch is imported where tensors are made: preparing data needs `rows` only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from launcher.task import IGNORED, Batch, Kind, Metrics, Record, Row, TokenScores
from launcher.task.causal_lm import next_tokens
from launcher.task.templates import learnt_tokens

if TYPE_CHECKING:
    from torch import Tensor


class Preference:
    name = "preference"
    auto_class = "AutoModelForCausalLM"
    columns: dict[str, Kind] = {"input_ids": "tokens", "second": "int", "loss_mask": "bytes"}  # noqa: RUF012 - never altered
    logits_per_token = True
    every_token_counts_alike = False
    sequences_per_sample = 2

    def __init__(self, seq_len: int, *, beta: float = 0.1) -> None:
        self.seq_len = seq_len
        self.beta = beta
        self.config_overrides: dict[str, Any] = {}

    def logits_width(self, config: Any) -> int:
        return int(config.vocab_size)

    def rows(self, records: Iterable[Sequence[Record]], tokenizer: Any) -> Iterator[Row]:
        """The tokens of the conversation with the chosen answer, then, from `second` on, with the rejected one; each at most
        `seq_len`. A pair of which either answer is cut off whole, or that the cut leaves alike, gives no row."""
        for some in records:
            for record in some:
                chosen, rejected = (self._cut(record, name, tokenizer) for name in ("chosen", "rejected"))
                if any(chosen[1][1:]) and any(rejected[1][1:]) and chosen[0] != rejected[0]:
                    yield {
                        "input_ids": [*chosen[0], *rejected[0]],
                        "second": len(chosen[0]),
                        "loss_mask": [*chosen[1], *rejected[1]],
                    }

    def _cut(self, record: Record, name: str, tokenizer: Any) -> tuple[list[int], list[int]]:
        ids, mask = learnt_tokens(record, record.parts[name], tokenizer)
        return ids[: self.seq_len], mask[: self.seq_len]

    def collate(self, rows: Sequence[Row], pad_id: int) -> Batch:
        """2 B sequences, the chosen ones first: `input_ids`, `attention_mask`, `labels` (2 B, T), `IGNORED` but in the
        answers. `reference` (B, 2): log-probabilities of chosen and rejected, nan where the row carries none.
        `samples` (B,), below 0 for a row that does not count."""
        import torch

        from launcher.task.padding import pad_right, padded

        halves = [
            {name: row[name][part] for name in ("input_ids", "loss_mask")}
            for take in (slice(0, 1), slice(1, 2))
            for row in rows
            for part in [slice(0, int(row["second"])), slice(int(row["second"]), None)][take]
        ]
        batch = pad_right(halves, pad_id)
        labels = batch["input_ids"].masked_fill(padded([half["loss_mask"] for half in halves], 0) == 0, IGNORED)
        labels[:, 0] = IGNORED  # nothing predicts it
        reference = [row.get("reference", (math.nan, math.nan)) for row in rows]
        return {
            **batch,
            "labels": labels,
            "reference": torch.tensor(reference, dtype=torch.float64).float(),
            "samples": torch.tensor([row.get("sample", 0) for row in rows]),
        }

    def dummy_rows(self, count: int) -> list[Row]:
        nothing = {"second": 1, "loss_mask": [0, 0], "reference": (0.0, 0.0), "sample": -1}
        return [{"input_ids": [0, 0], **nothing} for _ in range(count)]

    def num_valid(self, batch: Batch) -> int:
        return int((batch["samples"] >= 0).sum())

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        """`logits` (2 B, T, V); the loss is the sum over the pairs: NaN, which ends a run, where rows carry no reference.

        Nothing here looks at values: a trace has none, and on a GPU a look would wait for it.
        """
        return self.loss_of_nats(_nats(logits, batch), batch)

    def token_targets(self, batch: Batch) -> Tensor:
        return next_tokens(batch)

    def loss_of_nats(self, nats: Tensor, batch: Batch) -> Tensor:
        from torch.nn import functional

        rewards = self.rewards(nats, batch)
        losses = -functional.logsigmoid(rewards[:, 0] - rewards[:, 1])
        return losses.masked_fill(batch["samples"] < 0, 0.0).sum()

    def rewards(self, answers: Tensor, batch: Batch) -> Tensor:
        """Of the chosen and of the rejected answer, (B, 2), of their nats."""
        return self.beta * (_logps(answers) - batch["reference"])

    def answer_logps(self, answers: Tensor | TokenScores, batch: Batch) -> Tensor:
        """Log-probability in nats of the chosen and of the rejected answer, (B, 2), fp32; of logits, or what is left."""
        return _logps(answers.nats if isinstance(answers, tuple) else _nats(answers, batch))

    def metrics(self, num_samples: int = 0) -> Metrics:
        from launcher.task.metrics import PairMetrics

        return PairMetrics(self)


def _nats(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of each token that counts (2 B, T), fp32."""
    from torch.nn import functional

    flat, targets = logits.reshape(-1, logits.shape[-1]).float(), next_tokens(batch)
    nats = functional.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED, reduction="none")
    return nats.reshape(targets.shape)


def _logps(nats: Tensor) -> Tensor:
    return -nats.sum(1).reshape(2, -1).T
