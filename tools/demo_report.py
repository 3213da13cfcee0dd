"""What the demo reports: the lessons, their scores, the number to beat, the summary, and whether promises were kept."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from launcher.data.prepared import PreparedData
from launcher.errors import FleetuneError
from launcher.job import JobSpec
from launcher.plan import Plan
from launcher.units import show_count, show_seconds
from tools.evaluate import Scores

PERPLEXITY_SHARE = 0.5  # promised: at most this share of the untrained model's; measured 0.09
F1_GAIN = 0.3  # promised: at least this much above always naming the most frequent package; measured 0.76


@dataclass(frozen=True)
class Lesson:
    """One of the two things that are shown."""

    name: str
    """Of the folder, and of `jobs/demo-NAME.yaml`."""
    corpus: str
    checkpoint_kind: str
    """Prefix that `tools.convert` knows the engine's format by."""
    metric: str


@dataclass(frozen=True)
class Learnt:
    """What came of a lesson."""

    lesson: Lesson
    spec: JobSpec
    plan: Plan
    data: PreparedData
    before: Scores
    after: Scores
    seconds: float

    @property
    def model_dir(self) -> Path:
        return Path(self.spec.output_dir) / "model"


def majority_f1(data: PreparedData) -> float:
    """Macro F1 of always naming the class that most training texts have: the number to beat.

    That class has recall 1 and its share p as precision, so F1 = 2p / (1 + p); the other classes seen have 0.
    """
    in_training = Counter(_labels(data, "train"))
    held_out = Counter(_labels(data, "validation"))
    guess = in_training.most_common(1)[0][0]
    share = held_out[guess] / held_out.total()
    return 2 * share / (1 + share) / len({*held_out, guess})


def _labels(data: PreparedData, split: str) -> list[int]:
    samples = data.split(split)
    return [row["label"] for row in samples.rows(np.arange(len(samples)))]


def summary(gpt: Learnt, bert: Learnt, majority: float) -> Table:
    """What was trained, where it lies, and the scores before and after."""
    table = Table("", "GPT", "BERT", title="fleetune demo")

    def row(name: str, of_gpt: str, of_bert: str) -> None:
        table.add_row(name, of_gpt, of_bert)

    row("learnt", "to write documentation", "which package a text documents")
    row("parameters", *(show_count(learnt.plan.num_params) for learnt in (gpt, bert)))
    row("steps", *(str(learnt.spec.training.max_steps) for learnt in (gpt, bert)))
    row("strategy", *(f"{learnt.plan.chosen.strategy} on {learnt.plan.num_ranks} ranks" for learnt in (gpt, bert)))
    row("held-out samples", *(str(learnt.after.num_samples) for learnt in (gpt, bert)))
    row("score", "perplexity, lower is better", "macro F1, higher is better")
    row("untrained", f"{_metric(gpt.before, gpt):.1f}", f"{_metric(bert.before, bert):.3f}")
    row("always the same answer", "", f"{majority:.3f}")
    row("trained", f"{_metric(gpt.after, gpt):.1f}", f"{_metric(bert.after, bert):.3f}")
    row("time", *(show_seconds(learnt.seconds) for learnt in (gpt, bert)))
    row("model folder", *(str(learnt.model_dir) for learnt in (gpt, bert)))
    return table


def _metric(scores: Scores, learnt: Learnt) -> float:
    return scores.metrics[learnt.lesson.metric]


def next_commands(gpt: Learnt, bert: Learnt) -> list[str]:
    """What to type now, ready to be copied."""
    folder, question = json.dumps(str(bert.model_dir)), json.dumps("Wait until the coroutine is done.")
    opener = f'from transformers import pipeline; print(pipeline("text-classification", {folder})({question}))'
    return [
        "next:",
        "  " + shlex.join(["fleetune", "eval", str(gpt.model_dir), "--prepared", gpt.spec.prepared_dir]),
        "  " + shlex.join(["python", "-c", opener]),
    ]


def check_promises(gpt: Learnt, bert: Learnt, majority: float) -> None:
    """Raises `FleetuneError` with the number that fell short."""
    untrained, trained, f1 = _metric(gpt.before, gpt), _metric(gpt.after, gpt), _metric(bert.after, bert)
    if not trained <= PERPLEXITY_SHARE * untrained:
        raise FleetuneError(f"perplexity went from {untrained:.1f} to {trained:.1f} only, not below half")
    if not f1 >= majority + F1_GAIN:
        raise FleetuneError(f"macro F1 is {f1:.3f}, not {F1_GAIN} above always the same answer ({majority:.3f})")
