"""Scores, streamed batch by batch and added over ranks, against scikit-learn, scipy, seqeval and the SQuAD script."""

from __future__ import annotations

import collections
import json
import math
import re
import string
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import accuracy_score as tag_accuracy
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score, recall_score
from sklearn.metrics import accuracy_score, matthews_corrcoef, precision_recall_fscore_support
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from launcher.task import IGNORED
from launcher.task.extractive_qa import ExtractiveQA, exact_and_f1
from launcher.task.regression import Regression
from launcher.task.scores import matthews
from launcher.task.sequence_classification import SequenceClassification, balanced_weights
from launcher.task.token_classification import TokenClassification


@pytest.mark.parametrize("seed", range(5))
def test_matthews_is_scikit_learns(seed: int) -> None:
    draw = np.random.default_rng(seed)
    truth, guess = draw.integers(0, 2 + seed, (2, 50))
    counts = torch.zeros(2 + seed, 2 + seed, dtype=torch.float64)
    for t, g in zip(truth, guess, strict=True):
        counts[t, g] += 1
    assert matthews(counts.numpy()) == pytest.approx(matthews_corrcoef(truth, guess), abs=1e-12)


def test_balanced_weights_are_scikit_learns() -> None:
    labels = [0] * 5 + [1] * 2 + [2]
    assert balanced_weights([5, 2, 1]) == pytest.approx(
        compute_class_weight("balanced", classes=np.arange(3), y=labels)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weighted_and_smoothed_loss_is_torchs_mean(smoothing: float) -> None:
    """The sum over ranks divided by the sum of the weights is the weighted mean of the whole batch."""
    task = SequenceClassification(8, ("a", "b", "c"), class_weights=(3.0, 0.5, 1.0), label_smoothing=smoothing)
    logits, labels = torch.randn(7, 3), torch.tensor([0, 1, 2, 0, 1, 1, 0])
    parts = [{"labels": labels[:4]}, {"labels": torch.cat([labels[4:], torch.tensor([IGNORED])])}]
    sums = [task.loss_sum(x, b) for x, b in zip((logits[:4], torch.cat([logits[4:], logits[:1]])), parts, strict=True)]
    ours = sum(sums) / sum(task.num_valid(part) for part in parts)
    expected = functional.cross_entropy(logits, labels, torch.tensor([3.0, 0.5, 1.0]), label_smoothing=smoothing)
    assert float(ours) == pytest.approx(expected.item(), rel=1e-6)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=30), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_scores_of_several_labels_are_scikit_learns(pairs: list[tuple[int, int]], size: int) -> None:
    """Labels as bits of a number; on two ranks, whose sums are added."""
    task = SequenceClassification(8, ("a", "b", "c"), multi_label=True)
    truth, guess = (np.array([[n >> k & 1 for k in range(3)] for n in numbers]) for numbers in zip(*pairs, strict=True))
    ranks = [task.metrics(), task.metrics()]
    for number, start in enumerate(range(0, len(pairs), size)):
        labels = torch.tensor(np.vstack([truth[start : start + size], [[IGNORED] * 3]]))
        logits = torch.tensor(np.vstack([guess[start : start + size] * 2.0 - 1, [[9.0] * 3]])).float()
        ranks[number % 2].update(logits, {"labels": labels})
    ranks[0].sums = ranks[0].sums + ranks[1].sums
    found = ranks[0].result()
    seen = [k for k in range(3) if truth[:, k].any() or guess[:, k].any()]
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    for average, suffix in (("micro", "_micro"), ("macro", "")):
        if not seen:
            continue
        scores = precision_recall_fscore_support(truth, guess, average=average, zero_division=0, labels=seen)[:3]
        assert [found[f"{name}{suffix}"] for name in ("precision", "recall", "f1")] == pytest.approx(list(scores))
    expected = functional.binary_cross_entropy_with_logits(torch.tensor(guess * 2.0 - 1), torch.tensor(truth * 1.0))
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_correlations_are_scipys(seed: int) -> None:
    """With ties, on two ranks that see the samples in turns, and a row that does not count."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, 8, 40) / 2.0
    guess = np.round(truth + draw.normal(size=40), 1).astype(np.float32)
    ranks = [Regression(8).metrics(40), Regression(8).metrics(40)]
    for rank, metrics in enumerate(ranks):
        ids = np.arange(rank, 40, 2)
        labels = torch.tensor([*truth[ids], math.nan]).float()
        logits = torch.tensor([*guess[ids], 7.0])[:, None]
        metrics.update(logits, {"labels": labels, "samples": torch.tensor([*ids, -1])})
    ranks[0].sums = ranks[0].sums + ranks[1].sums
    found = ranks[0].result()
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(guess, truth).statistic, abs=1e-9)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(guess, truth).statistic, abs=1e-9)
    assert found["loss"] == pytest.approx(float(((guess - truth) ** 2).mean()), rel=1e-6)


TAGS = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8), min_size=1, max_size=8)
)
@settings(max_examples=80, deadline=None)
def test_entities_are_seqevals(sentences: list[list[tuple[int, int]]]) -> None:
    task = TokenClassification(32, TAGS)
    metrics = task.metrics()
    for sentence in sentences:
        truth = torch.tensor([[IGNORED, *(t for t, _ in sentence), IGNORED]])
        guess = torch.tensor([[0, *(g for _, g in sentence), 1]])
        metrics.update(functional.one_hot(guess, 5).float(), {"labels": truth, "first_labels": truth})
    names = [[[TAGS[pair[k]] for pair in sentence] for sentence in sentences] for k in (0, 1)]
    found = metrics.result()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval's, where nothing is to be found
        assert found["f1"] == pytest.approx(entity_f1(*names))
        assert found["precision"] == pytest.approx(precision_score(*names))
        assert found["recall"] == pytest.approx(recall_score(*names))
        if {tag for side in names for sentence in side for tag in sentence} != {"O"}:
            assert found["f1_macro"] == pytest.approx(entity_f1(*names, average="macro"))
    assert found["accuracy"] == pytest.approx(tag_accuracy(*names))


def test_tags_that_are_no_entities_are_scored_as_classes() -> None:
    task = TokenClassification(32, ("NOUN", "VERB"))
    metrics = task.metrics()
    truth = torch.tensor([[0, 0, 1, 1]])
    metrics.update(
        functional.one_hot(torch.tensor([[0, 1, 1, 1]]), 2).float(), {"labels": truth, "first_labels": truth}
    )
    scores = precision_recall_fscore_support([0, 0, 1, 1], [0, 1, 1, 1], average="macro")
    assert (metrics.result()["f1"], metrics.result()["f1_macro"]) == pytest.approx((0.75, scores[2]))


# The SQuAD 2.0 script's own functions (worksheets.codalab.org/bundles/0x6b567e1cf2e041ec80d7098f031c5c9e), word by word.
def normalize_answer(s: str) -> str:
    def remove_articles(text: str) -> str:
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    return " ".join(remove_articles("".join(ch for ch in s.lower() if ch not in set(string.punctuation))).split())


def get_tokens(s: str) -> list[str]:
    return normalize_answer(s).split() if s else []


def compute_exact(a_gold: str, a_pred: str) -> int:
    return int(normalize_answer(a_gold) == normalize_answer(a_pred))


def compute_f1(a_gold: str, a_pred: str) -> float:
    gold_toks, pred_toks = get_tokens(a_gold), get_tokens(a_pred)
    num_same = sum((collections.Counter(gold_toks) & collections.Counter(pred_toks)).values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision, recall = 1.0 * num_same / len(pred_toks), 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


@given(st.text("aAnthe.,- 1b", max_size=12), st.lists(st.text("aAnthe.,- 1b", max_size=12), max_size=3))
@settings(max_examples=300, deadline=None)
def test_answers_are_compared_as_the_squad_script_does(answer: str, golds: list[str]) -> None:
    wanted = [gold for gold in golds if normalize_answer(gold)] or [""]
    exact = max(compute_exact(gold, answer) for gold in wanted)
    assert exact_and_f1(answer, golds) == pytest.approx((exact, max(compute_f1(gold, answer) for gold in wanted)))


def windows(rows: list[tuple[int, list[float], list[float], str, list[str]]]) -> dict[str, torch.Tensor]:
    """A batch of windows: (number, start scores, end scores, text of one-letter words, right answers)."""
    places = [[(2 * i, 2 * i + 1) for i in range((len(text) + 1) // 2)] for *_, text, _ in rows]
    longest = max(map(len, places))

    def filled(lists: list[list[int]]) -> torch.Tensor:
        width = max(map(len, lists))
        return torch.tensor([numbers + [-1] * (width - len(numbers)) for numbers in lists])

    assert all(len(starts) == longest + 1 for _, starts, *_ in rows), "[CLS] and the words"
    return {
        "labels": torch.zeros(len(rows), 2, dtype=torch.int64),
        "attention_mask": torch.ones(len(rows), longest + 1, dtype=torch.int64),
        "samples": torch.arange(len(rows)),
        "windows": torch.tensor([row[0] for row in rows]),
        "nulls": torch.zeros(len(rows), dtype=torch.int64),
        "seconds": torch.ones(len(rows), dtype=torch.int64),
        "offsets": filled([[n for pair in pairs for n in pair] for pairs in places]),
        "contexts": filled([list(text.encode()) for *_, text, _ in rows]),
        "answers": filled([list(json.dumps(golds).encode()) for *_, golds in rows]),
    }


ROWS: list[tuple[int, list[float], list[float], str, list[str]]] = [
    (0, [0, 1, 0, 0], [0, 0, 2, 0], "x y z", ["x y"]),  # 3 in this window,
    (1, [0, 0, 0, 4], [0, 0, 0, 1], "z q r", ["x y"]),  # 5 in the next: "r" is given
    (0, [9, 1, 0, 0], [9, 0, 0, 5], "k l m", []),  # none is worth 18
    (0, [0, 0, 0, 7], [0, 8, 1, 0], "u v w", ["u", "w"]),  # the end never stands before the start: "u" 8, "w" 7
]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_best_answer_of_all_windows_is_given(num_ranks: int) -> None:
    """Also where the windows of a question are scored by different ranks."""
    for no_answer, exact in ((True, [0, 1, 1]), (False, [0, 0, 1])):
        task = ExtractiveQA(16, max_answer_tokens=2, no_answer=no_answer)
        ranks = [task.metrics(len(ROWS)) for _ in range(num_ranks)]
        for rank, metrics in enumerate(ranks):
            batch = {name: tensor[rank::num_ranks] for name, tensor in windows(ROWS).items()}
            scores = torch.tensor([[row[1], row[2]] for row in ROWS]).float().transpose(1, 2)
            metrics.update(scores[rank::num_ranks], batch)
        ranks[0].sums = sum(metrics.sums for metrics in ranks)  # type: ignore[assignment]
        assert ranks[0].result()["exact_match"] == pytest.approx(np.mean(exact))


def test_nothing_scored_is_nan() -> None:
    tasks: list[Any] = [Regression(4), TokenClassification(4, TAGS), ExtractiveQA(16)]
    assert all(math.isnan(score) for task in tasks for score in task.metrics().result().values())
