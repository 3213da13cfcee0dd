"""Losses that jump, scores that get better, noise on embeddings, and the names of scores."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from launcher.errors import DataError, SpecError
from launcher.job.spec import EvaluationSection
from launcher.job.tasks import LOWER_IS_BETTER, METRICS
from launcher.train.best import Best
from launcher.train.health import Spikes
from launcher.train.noise import add_noise
from tests.unit.test_together import raw


def test_a_jump_of_the_loss_is_seen_once_and_not_learnt_from() -> None:
    """A falling, noisy loss has none; one far above the last twenty is one, and so is the next."""
    drawn = random.Random(0)
    losses = [3.0 * math.exp(-step / 60) + drawn.gauss(0, 0.05) for step in range(200)]
    spikes = Spikes()
    assert [step for step, loss in enumerate(losses) if spikes.see(step, loss)] == []
    assert spikes.see(200, losses[-1] + 1.0)
    assert spikes.see(201, losses[-1] + 1.0)
    assert not spikes.see(202, losses[-1])


def test_early_losses_are_not_judged() -> None:
    spikes = Spikes()
    assert not any(spikes.see(step, loss) for step, loss in enumerate([1.0, 1.0, 1.0, 50.0]))


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_best_score_is_the_lowest_loss_or_the_highest_of_others(metric: str) -> None:
    told = EvaluationSection(every_steps=1, metric=metric, patience=2, min_delta=0.05)
    best = Best.of(told, None)
    assert best is not None
    sign = -1 if metric in LOWER_IS_BETTER else 1
    seen = [best.see(step, {metric: sign * value}) for step, value in enumerate([1.0, 1.04, 2.0, math.nan, 2.01])]
    assert seen == [True, False, True, False, False]
    assert (best.step, best.stale, best.is_exhausted) == (2, 2, True)
    again = Best.of(told, best.to_json())
    assert again == best
    assert Best.of(told, {**best.to_json(), "metric": "f1"}).value is None  # type: ignore[union-attr]


def test_a_score_that_this_data_has_not_is_named() -> None:
    best = Best.of(EvaluationSection(every_steps=1, metric="f1_binary"), None)
    assert best is not None
    with pytest.raises(DataError, match="f1_binary is not scored on this data; choose one of loss, accuracy"):
        best.see(1, {"loss": 1.0, "accuracy": 0.5})
    with pytest.raises(DataError, match="hold samples out"):
        best.see(1, {})


def test_an_unknown_metric_is_refused_before_anything_starts() -> None:
    with pytest.raises(SpecError, match=r"evaluation.metric: bleu is no score of causal_lm; choose one of loss,"):
        raw(evaluation={"every_steps": 5, "metric": "bleu"})
    with pytest.raises(SpecError, match="has `patience` or `min_delta`, but no `metric`"):
        raw(evaluation={"patience": 2})
    with pytest.raises(SpecError, match="give `every_steps`"):
        raw(evaluation={"metric": "loss"})


@pytest.mark.parametrize("task", METRICS)
def test_the_scores_of_a_task_are_those_that_it_gives(task: str) -> None:
    """Without samples a task gives the names of most; what it gives is known here."""
    from launcher.task import Facts, task_of

    told: dict[str, Any] = {"name": task}
    made = task_of(raw(task=told), Facts(labels=("a", "b"), vocab_size=50, mask_id=4))
    assert set(made.metrics(0).result()) <= set(METRICS[task])


def test_noise_is_bounded_and_only_in_training() -> None:
    """NEFTune: uniform within alpha / sqrt(tokens x width)."""
    model = BertModel(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    table, ids = model.get_input_embeddings(), torch.arange(12).reshape(2, 6)
    clean = table(ids)
    add_noise(model, 5.0)
    model.eval()
    assert torch.equal(table(ids), clean)
    model.train()
    noise = (table(ids) - clean).abs()
    bound = 5.0 / math.sqrt(6 * 8)
    assert 0.8 * bound < noise.max() <= bound * (1 + 1e-6)
