"""What training teaches, asked again: the rows, losses and scores are the tasks' own (`launcher.task`).

Beside them stand what only evaluation can say: probabilities and how well they are meant (Brier, calibration, AUROC).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from launcher.data.prepared import PreparedData
from launcher.task import IGNORED, Batch, Record, Row, Task
from launcher.task.extractive_qa import AnswerMetrics, ExtractiveQA
from launcher.task.preference import Preference
from launcher.task.regression import Regression
from launcher.task.scores import mean
from launcher.task.sequence_classification import SequenceClassification
from launcher.task.token_classification import TokenClassification
from launcher.train.reference import answer_logps
from tools.evaluation.calibration import ece_of
from tools.evaluation.fields import Fields
from tools.evaluation.opened import Opened
from tools.evaluation.values import Floats, Measure, Outcome, Part, Table

MOST_CLASSES = 100  # whose probabilities are kept for each example: 800 bytes of it
_HEADLINES = {
    "causal_lm": "loss",
    "chat": "loss",
    "masked_lm": "loss",
    "sequence_classification": "accuracy",
    "regression": "mae",
    "token_classification": "f1",
    "extractive_qa": "f1",
    "preference": "accuracy",
}


class Learnt:
    """A task of training."""

    def __init__(self, task: Task, tokenizer: Any, fields: Fields, reference: Opened | None = None) -> None:
        self.task = task
        self.name = task.name
        self.auto_class = task.auto_class
        self.headline = _HEADLINES[task.name]
        self.tokenizer = tokenizer
        self.fields = fields
        self.reference = reference
        """What the answers of `preference` are measured against."""
        self._metrics = task.metrics()
        packing = getattr(task, "packing", "none")
        self._joins = packing != "none"
        """Whether rows are made of several records, so that an example is a row and no record."""

    def parts(self, records: Iterable[Record]) -> Iterator[list[Part]]:
        if self._joins:
            rows = self.task.rows(([record] for record in records), self.tokenizer)
            yield from of_rows(rows)
            return
        example = row_number = 0
        for record in records:
            rows_of_one = list(self.task.rows(iter([[record]]), self.tokenizer))
            if not rows_of_one:
                continue
            facts = {"length": sum(len(row["input_ids"]) for row in rows_of_one), **self.fields.facts(record)}
            parts = [Part(example, i, {"sample": row_number + i, **row}, facts) for i, row in enumerate(rows_of_one)]
            yield parts
            example, row_number = example + 1, row_number + len(parts)

    def score(self, model: Opened, parts: list[Part]) -> list[Outcome]:
        rows = [part.row for part in parts]
        batch = self._batch(model, rows)
        logits = model.logits(batch, self._kind())
        extras = self._extras(logits, batch)
        if isinstance(self._metrics, AnswerMetrics):
            found, answers = self._metrics.answered(logits, batch)
            extras = [{"answer": answer} for answer in answers]
        else:
            found = self._metrics.rows(logits, batch)
        return [{"row": row, **extra} for row, extra in zip(found.tolist(), extras, strict=True)]

    def _batch(self, model: Opened, rows: list[Row]) -> Batch:
        if isinstance(self.task, Preference):
            assert self.reference is not None, "the door asks for it"
            logps = answer_logps(self.task, rows, model.pad_id, model.device, self.reference.logits)
            rows = [{**row, "reference": tuple(pair)} for row, pair in zip(rows, logps, strict=True)]
        return {name: tensor.to(model.device) for name, tensor in self.task.collate(rows, model.pad_id).items()}

    def _kind(self) -> str:
        if isinstance(self.task, Regression | ExtractiveQA):
            return "numbers"
        return "answers" if getattr(self.task, "multi_label", False) else "classes"

    def _extras(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        task = self.task
        if isinstance(task, SequenceClassification):
            shares = logits.double().sigmoid() if task.multi_label else logits.double().softmax(-1)
            if len(task.labels) > MOST_CLASSES:
                return [{} for _ in shares]
            return [{"probabilities": row} for row in shares.tolist()]
        if isinstance(task, TokenClassification):
            guesses = logits.argmax(-1)
            firsts = batch["first_labels"]
            return [
                {"tags": [task.labels[i] for i in guess[first >= 0].tolist()]}
                for guess, first in zip(guesses, firsts, strict=True)
            ]
        if task.name == "causal_lm" and self.tokenizer is not None:
            return [{"bytes": self._num_bytes(labels)} for labels in batch["labels"]]
        return [{} for _ in range(len(batch["input_ids"]) // task.sequences_per_sample)]

    def _num_bytes(self, labels: Tensor) -> int:
        """Of the text of the targets. A character that a block's edge cuts in two counts as the mark that stands for it."""
        return len(self.tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True).encode())

    def merged(self, facts: Mapping[str, Any], outcomes: list[Outcome]) -> Outcome:
        if isinstance(self._metrics, AnswerMetrics):
            windows = np.array([outcome["row"] for outcome in outcomes])
            best = outcomes[int(windows[:, 2].argmax())]["answer"]
            row = [float(value) for value in self._metrics.merged(windows)]
            return {"row": row, "answer": "" if self._metrics.is_none(windows) else best, "right": int(row[2])}
        merged = dict(outcomes[0])
        if len(outcomes) > 1:  # a sentence longer than a row
            merged["row"] = np.sum([outcome["row"] for outcome in outcomes], axis=0).tolist()
            merged["tags"] = [tag for outcome in outcomes for tag in outcome["tags"]]
        return {**merged, **self._verdict(merged)}

    def _verdict(self, outcome: Outcome) -> Outcome:
        """Right or wrong, where an example is one of the two, and how sure of itself the model was."""
        task, row = self.task, outcome["row"]
        if isinstance(task, Preference):
            return {"right": int(row[2])}
        if isinstance(task, Regression):
            return {"answer": row[0], "truth": row[1]}
        if not isinstance(task, SequenceClassification):
            return {}
        if task.multi_label:
            return {"right": int(row[3])}
        truth, guess = int(row[2]), int(row[3])
        found: Outcome = {"answer": task.labels[guess], "truth": task.labels[truth], "right": int(truth == guess)}
        if "probabilities" in outcome:
            shares = np.array(outcome["probabilities"])
            found["confidence"] = float(shares[guess])
            found["brier"] = float(((shares - np.eye(len(shares))[truth]) ** 2).sum())
        return found

    def measure(self, table: Table) -> Measure:
        rows = table.columns["row"]
        calibrated = table.has("confidence")
        two = calibrated and len(getattr(self.task, "labels", ())) == 2

        def scores(weights: Floats) -> dict[str, Floats]:
            found = dict(self._metrics.weighted(rows, weights))
            if self.name == "causal_lm":
                found["bits_per_token"] = found["loss"] / math.log(2)
            if table.has("bytes"):
                found["bits_per_byte"] = mean(weights @ rows[:, 0], weights @ table.columns["bytes"]) / math.log(2)
            if two:
                found["auroc"] = auroc(table.columns["probabilities"][:, 1], rows[:, 2] == 1, weights)
            if calibrated:
                found["brier"] = mean(weights @ table.columns["brier"], weights.sum(1))
                found["ece"] = ece_of(table.columns["confidence"], table.columns["right"], weights)
            return found

        return scores


def auroc(shares: Floats, truth: Any, weights: Floats) -> Floats:
    """scikit-learn's, for each row of weights; nan where only one class was drawn."""
    from sklearn.metrics import roc_auc_score

    order = np.argsort(shares, kind="stable")
    shares, truth, weights = shares[order], truth[order], weights[:, order]
    found = [
        roc_auc_score(truth[row > 0], shares[row > 0], sample_weight=row[row > 0])
        if 0 < (row @ truth) < row.sum()
        else np.nan
        for row in weights
    ]
    return np.array(found)


def of_rows(rows: Iterable[Row]) -> Iterator[list[Part]]:
    """Rows without their records: each an example, but the windows of a question, which are one."""
    held: list[Part] = []
    example = 0
    for number, row in enumerate(rows):
        if held and row.get("window", 0) == 0:
            yield held
            held, example = [], example + 1
        held.append(Part(example, len(held), {"sample": number, **row}, {"length": len(row["input_ids"])}))
    if held:
        yield held


def held_out_rows(data: PreparedData) -> Iterator[Row]:
    """The validation samples of prepared data, in their order."""
    split = data.split("validation")
    for i in range(len(split)):
        yield from split.rows(np.array([i]))
