"""WHAT IS LEARNED: one file per task. A task turns records into rows, rows into batches, and outputs into a loss.

Shapes here and in the tasks: B rows of a batch, T tokens of the longest row, V vocabulary, C classes.
Nothing in this file needs torch or numpy: `task_of` loads the one task that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from launcher.job.spec import JobSpec

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Target that never counts in a loss: `ignore_index` of torch's cross entropy."""

Row = dict[str, Any]
"""One sample: `input_ids`, a 1-D array or list of token ids, and for classification `label`, a class id."""

Batch = dict[str, "Tensor"]


class Record(NamedTuple):
    """One text as it was read, and where: `line` counts from 1 (for parquet, the row)."""

    text: str
    label: str | None = None
    file: str = ""
    line: int = 0


class Metrics(Protocol):
    """Scores gathered batch by batch. `sums` is all of its state: add those of all ranks, then ask `result`."""

    sums: Tensor

    def update(self, logits: Tensor, batch: Batch) -> None: ...

    def result(self) -> dict[str, float]: ...


class Task(Protocol):
    name: str
    auto_class: str
    """Class of `transformers` that opens the model with the right head."""
    config_overrides: dict[str, Any]
    """What the head needs to be told in the model's config."""
    columns: tuple[str, ...]
    """Keys of a row, in the order of the prepared columns."""

    def rows(self, records: Iterable[Sequence[Record]], tokenizer: Any) -> Iterator[Row]:
        """Lists of records -> rows of at most `seq_len` tokens, in the order of the records."""

    def collate(self, rows: Sequence[Row], pad_id: int) -> Batch:
        """Rows -> `input_ids`, `attention_mask` (B, T) int64, padded right, and `labels`, `IGNORED` where none counts."""

    def dummy_rows(self, count: int) -> list[Row]:
        """Rows without a target, for a rank that has run out while others still compute."""

    def num_valid(self, batch: Batch) -> int:
        """Targets that count in the loss."""

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        """Sum (not mean) of the cross entropies in nats over the valid targets, in fp32; 0 with a gradient if none."""

    def metrics(self) -> Metrics:
        """A fresh accumulator."""


def task_of(spec: JobSpec, labels: Sequence[str] | None = None) -> Task:
    """The task of a spec. `labels`: names of the classes by id, when the spec leaves them to be found in the data."""
    if spec.task.name == "causal_lm":
        from launcher.task.causal_lm import CausalLM

        return CausalLM(seq_len=spec.training.seq_len, packing=spec.data.packing)
    from launcher.task.sequence_classification import SequenceClassification

    names = tuple(spec.task.labels or labels or ())
    return SequenceClassification(seq_len=spec.training.seq_len, labels=names)
