"""One label per text. Rows are what the tokenizer gives for the text alone, cut at `seq_len` tokens.

torch is imported where tensors are made: preparing data needs `rows` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from launcher.task import IGNORED, Batch, Kind, Record, Row

if TYPE_CHECKING:
    from torch import Tensor


class SequenceClassification:
    name = "sequence_classification"
    auto_class = "AutoModelForSequenceClassification"
    columns: dict[str, Kind] = {"input_ids": "tokens", "label": "class"}  # noqa: RUF012 - never altered
    logits_per_token = False
    sequences_per_sample = 1

    def __init__(self, seq_len: int, labels: Sequence[str]) -> None:
        assert labels, "the labels come from the spec or from the prepared data"
        self.seq_len = seq_len
        self.labels = tuple(labels)
        self.config_overrides: dict[str, Any] = {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }

    def logits_width(self, config: Any) -> int:
        return int(config.num_labels)

    def rows(self, records: Iterable[Sequence[Record]], tokenizer: Any) -> Iterator[Row]:
        """Every record gives one row; its label was checked by the reader."""
        ids_of = self.config_overrides["label2id"]
        for some in records:
            texts = [record.text for record in some]
            encoded = tokenizer(texts, truncation=True, max_length=self.seq_len, return_attention_mask=False)
            for record, ids in zip(some, encoded["input_ids"], strict=True):
                # a tokenizer that adds nothing gives nothing for an empty text, and no model takes a row of 0 tokens
                yield {"input_ids": ids or [_filler(tokenizer)], "label": ids_of[record.label]}

    def collate(self, rows: Sequence[Row], pad_id: int) -> Batch:
        import torch

        from launcher.task.padding import pad_right

        labels = torch.tensor([int(row["label"]) for row in rows], dtype=torch.int64)
        return {**pad_right(rows, pad_id), "labels": labels}

    def dummy_rows(self, count: int) -> list[Row]:
        return [{"input_ids": [0], "label": IGNORED} for _ in range(count)]

    def num_valid(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        """`logits` (B, C)."""
        return _cross_entropy_sum(logits, batch["labels"])

    def metrics(self, num_samples: int = 0) -> ClassificationMetrics:
        return ClassificationMetrics(len(self.labels))


class ClassificationMetrics:
    """`sums` = the loss in nats, then the C x C counts [truth, prediction] row by row, float64 (exact to 2^53)."""

    def __init__(self, num_labels: int) -> None:
        import torch

        self.num_labels = num_labels
        self.sums = torch.zeros(1 + num_labels**2, dtype=torch.float64)

    def update(self, logits: Tensor, batch: Batch) -> None:
        import torch

        logits = logits.detach()
        labels = batch["labels"]
        valid = labels != IGNORED
        loss = _cross_entropy_sum(logits, labels)
        cells = labels[valid] * self.num_labels + logits.argmax(-1)[valid]
        counts = torch.bincount(cells, minlength=self.num_labels**2)
        self.sums = self.sums.to(logits.device) + torch.cat([loss.reshape(1).double(), counts.double()])

    def result(self) -> dict[str, float]:
        """Precision, recall and F1 are means over the classes seen as truth or prediction, 0 for 0/0 (as scikit-learn)."""
        counts = self.sums[1:].reshape(self.num_labels, self.num_labels).cpu()
        num_valid = float(counts.sum())
        if num_valid == 0:
            return dict.fromkeys(("loss", "accuracy", "precision", "recall", "f1"), float("nan"))
        truths, predictions, hits = counts.sum(1), counts.sum(0), counts.diagonal()
        seen = (truths + predictions) > 0
        return {
            "loss": float(self.sums[0]) / num_valid,
            "accuracy": float(hits.sum()) / num_valid,
            "precision": float((hits / predictions.clamp(min=1))[seen].mean()),
            "recall": float((hits / truths.clamp(min=1))[seen].mean()),
            "f1": float((2 * hits / (truths + predictions).clamp(min=1))[seen].mean()),
        }


def _cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def _filler(tokenizer: Any) -> int:
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
    return next(token_id for token_id in known if token_id is not None)
