"""Labelled rows, losses and scores, against plain torch and scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, precision_recall_fscore_support
from torch.nn import functional

from launcher.job.load import parse_spec
from launcher.task import IGNORED, Facts, Record, task_of
from launcher.task.sequence_classification import SequenceClassification

TASK = SequenceClassification(seq_len=4, labels=("bad", "good", "odd"))


class Digits:
    pad_token_id, eos_token_id, unk_token_id = None, 7, None

    def __call__(self, texts: list[str], *, truncation: bool, max_length: int, **options: Any) -> dict[str, Any]:
        assert truncation
        return {"input_ids": [[int(digit) for digit in text][:max_length] for text in texts]}


def test_rows_hold_the_class_id_and_at_most_seq_len_tokens() -> None:
    records = [[Record("12", "good"), Record("12345", "bad")], [Record("", "odd")]]
    assert list(TASK.rows(records, Digits())) == [
        {"input_ids": [1, 2], "second": 2, "label": 1},
        {"input_ids": [1, 2, 3, 4], "second": 4, "label": 0},
        {"input_ids": [7], "second": 1, "label": 2},
    ]


def test_the_head_is_told_its_classes() -> None:
    assert TASK.config_overrides == {
        "num_labels": 3,
        "id2label": {0: "bad", 1: "good", 2: "odd"},
        "label2id": {"bad": 0, "good": 1, "odd": 2},
        "problem_type": "single_label_classification",
    }


def test_collate_and_loss() -> None:
    rows = [{"input_ids": np.array([1, 2], dtype=np.uint16), "label": 2}, {"input_ids": [3], "label": 0}]
    batch = TASK.collate([*rows, *TASK.dummy_rows(1)], pad_id=8)
    assert batch["input_ids"].tolist() == [[1, 2], [3, 8], [0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0], [1, 0]]
    assert batch["labels"].tolist() == [2, 0, IGNORED]
    assert TASK.num_valid(batch) == 2
    logits = torch.randn(3, 3)
    expected = functional.cross_entropy(logits[:2], torch.tensor([2, 0]), reduction="sum")
    assert TASK.loss_sum(logits, batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_dummy_rows_cost_nothing_and_keep_the_gradient() -> None:
    batch = TASK.collate(TASK.dummy_rows(2), pad_id=0)
    logits = torch.randn(2, 3, requires_grad=True)
    loss = TASK.loss_sum(logits, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert (loss.item(), logits.grad.abs().sum().item()) == (0.0, 0.0)  # type: ignore[union-attr]
    metrics = TASK.metrics()
    metrics.update(logits, batch)
    assert all(math.isnan(score) for score in metrics.result().values())


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_scores_are_those_of_scikit_learn(pairs: list[tuple[int, int]], batch_size: int) -> None:
    """Batch by batch, with a row that does not count in each."""
    metrics = TASK.metrics()
    for start in range(0, len(pairs), batch_size):
        some = [*pairs[start : start + batch_size], (IGNORED, 0)]
        logits = functional.one_hot(torch.tensor([guess for _, guess in some]), 3).float()
        metrics.update(logits, {"labels": torch.tensor([truth for truth, _ in some])})
    truths, guesses = zip(*pairs, strict=True)
    precision, recall, f1, _ = precision_recall_fscore_support(truths, guesses, average="macro", zero_division=0)
    loss = [math.log(2 + math.e) - (truth == guess) for truth, guess in pairs]
    assert metrics.result() == pytest.approx(
        {
            "loss": sum(loss) / len(loss),
            "accuracy": accuracy_score(truths, guesses),
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "f1_micro": f1_score(truths, guesses, average="micro"),
            "matthews": matthews_corrcoef(truths, guesses),
        },
        rel=1e-5,
    )


def test_the_task_of_a_spec() -> None:
    raw = {
        "output_dir": "out",
        "model": {"path": "m"},
        "task": "sequence_classification",
        "data": {"train": "x.csv"},
        "training": {"seq_len": 16, "global_batch_size": 4, "max_steps": 1},
    }
    assert task_of(parse_spec(raw), Facts(labels=("no", "yes"))).config_overrides["num_labels"] == 2
    named = {**raw, "task": {"name": "sequence_classification", "labels": ["a", "b", "c"]}}
    assert task_of(parse_spec(named)).config_overrides["num_labels"] == 3
    assert task_of(parse_spec({**raw, "task": "causal_lm"})).auto_class == "AutoModelForCausalLM"
