"""A number for a text or a pair of texts, by the mean squared error.

torch is imported where tensors are made: preparing data needs `rows` only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from launcher.task import Batch, Kind, Metrics, Record, Row
from launcher.task.encoding import text_rows

if TYPE_CHECKING:
    from torch import Tensor


class Regression:
    name = "regression"
    auto_class = "AutoModelForSequenceClassification"
    columns: dict[str, Kind] = {"input_ids": "tokens", "second": "int", "target": "float"}  # noqa: RUF012 - never altered
    logits_per_token = False
    sequences_per_sample = 1

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.config_overrides: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}

    def logits_width(self, config: Any) -> int:
        return 1

    def rows(self, records: Iterable[Sequence[Record]], tokenizer: Any) -> Iterator[Row]:
        for some in records:
            for record, row in zip(some, text_rows(some, tokenizer, self.seq_len), strict=True):
                yield {**row, "target": record.parts["target"]}

    def collate(self, rows: Sequence[Row], pad_id: int) -> Batch:
        """`labels` (B,) fp32, nan where none counts; `samples` (B,) the places of the rows in their split."""
        import torch

        from launcher.task.padding import pad_right

        return {
            **pad_right(rows, pad_id),
            "labels": torch.tensor([row["target"] for row in rows], dtype=torch.float32),
            "samples": torch.tensor([row.get("sample", -1) for row in rows]),
        }

    def dummy_rows(self, count: int) -> list[Row]:
        return [{"input_ids": [0], "target": math.nan} for _ in range(count)]

    def num_valid(self, batch: Batch) -> int:
        return int((~batch["labels"].isnan()).sum())

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        """`logits` (B, 1)."""
        import torch

        answers, targets = logits.float().squeeze(-1), batch["labels"]
        return torch.where(targets.isnan(), answers * 0.0, (answers - targets.nan_to_num()) ** 2).sum()

    def metrics(self, num_samples: int = 0) -> Metrics:
        from launcher.task.metrics import NumberMetrics

        return NumberMetrics(num_samples)
