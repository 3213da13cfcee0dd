"""One label per text or pair of texts, or with `multi_label` any number. Rows are what the tokenizer gives, cut at `seq_len`.

torch is imported where tensors are made: preparing data needs `rows` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from launcher.task import IGNORED, Batch, Kind, Metrics, Record, Row
from launcher.task.encoding import text_rows

if TYPE_CHECKING:
    from torch import Tensor


class SequenceClassification:
    name = "sequence_classification"
    auto_class = "AutoModelForSequenceClassification"
    logits_per_token = False
    sequences_per_sample = 1

    def __init__(
        self,
        seq_len: int,
        labels: Sequence[str],
        *,
        multi_label: bool = False,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        assert labels, "the labels come from the spec or from the prepared data"
        self.seq_len = seq_len
        self.labels = tuple(labels)
        self.multi_label = multi_label
        self.class_weights = None if class_weights is None else tuple(class_weights)
        self.label_smoothing = label_smoothing
        self.columns: dict[str, Kind] = {"input_ids": "tokens", "second": "int"}
        self.columns["label"] = "classes" if multi_label else "class"
        self.config_overrides: dict[str, Any] = {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
            "problem_type": f"{'multi' if multi_label else 'single'}_label_classification",
        }

    def logits_width(self, config: Any) -> int:
        return int(config.num_labels)

    def rows(self, records: Iterable[Sequence[Record]], tokenizer: Any) -> Iterator[Row]:
        """Every record gives one row; its labels were checked by the reader."""
        ids_of = self.config_overrides["label2id"]
        for some in records:
            for record, row in zip(some, text_rows(some, tokenizer, self.seq_len), strict=True):
                ids = sorted({ids_of[label] for label in record.labels})
                yield {**row, "label": ids if self.multi_label else ids[0]}

    def collate(self, rows: Sequence[Row], pad_id: int) -> Batch:
        """`labels` (B,) class ids, or with `multi_label` (B, C) of 0, 1 and, in a row that does not count, `IGNORED`."""
        import torch

        from launcher.task.padding import pad_right

        if not self.multi_label:
            labels = torch.tensor([int(row["label"]) for row in rows], dtype=torch.int64)
            return {**pad_right(rows, pad_id), "labels": labels}
        labels = torch.zeros(len(rows), len(self.labels), dtype=torch.int64)
        for number, row in enumerate(rows):
            if list(row["label"]) == [IGNORED]:
                labels[number] = IGNORED
            else:
                labels[number, torch.as_tensor(list(row["label"]), dtype=torch.int64)] = 1
        return {**pad_right(rows, pad_id), "labels": labels}

    def dummy_rows(self, count: int) -> list[Row]:
        return [{"input_ids": [0], "label": [IGNORED] if self.multi_label else IGNORED} for _ in range(count)]

    def num_valid(self, batch: Batch) -> float:
        """Texts; with weights, the sum of those of their classes; with `multi_label`, yes-or-no answers."""
        labels = batch["labels"][batch["labels"] != IGNORED]
        if self.class_weights is None:
            return int(labels.numel())
        return float(sum(self.class_weights[label] for label in labels.tolist()))

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.losses(logits, batch).sum()

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """`logits` (B, C). torch's cross entropy (B,) or, with `multi_label`, binary cross entropies of every class (B, C);
        0 where none counts."""
        import torch
        from torch.nn import functional

        logits, labels = logits.float(), batch["labels"]
        if self.multi_label:
            losses = functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
            return torch.where(labels == IGNORED, logits * 0.0, losses)
        weight = None if self.class_weights is None else logits.new_tensor(self.class_weights)
        return functional.cross_entropy(
            logits,
            labels,
            weight=weight,
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )

    def metrics(self, num_samples: int = 0) -> Metrics:
        from launcher.task.metrics import LabelMetrics, MultiLabelMetrics

        return MultiLabelMetrics(self) if self.multi_label else LabelMetrics(self)


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """samples / (classes x samples of the class), as scikit-learn's `balanced`; a class without a sample weighs 1."""
    return [sum(counts) / (len(counts) * count) if count else 1.0 for count in counts]
