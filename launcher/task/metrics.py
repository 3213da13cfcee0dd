"""What the tasks report: what each sample adds, and the scores that follow. Training keeps the sums, evaluation the rows.

So a score means the same in `metrics.jsonl` of a run and in `fleetune eval`, and needs no logits to be kept. All is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from launcher.task import IGNORED, Batch, TokenScores
from launcher.task.scores import Floats, Scores, Table, class_scores, matthews, mean, pearson, spearman

if TYPE_CHECKING:
    from launcher.task.preference import Preference
    from launcher.task.sequence_classification import SequenceClassification
    from launcher.task.token_classification import TokenClassification


class Sums:
    """Scores that follow from sums over the samples: `sums` (k,) is all of the state, whatever was seen.

    Evaluation keeps the rows, a few numbers each, to ask the same of resamples and of parts of the data.
    """

    def __init__(self, width: int) -> None:
        self.sums = torch.zeros(width, dtype=torch.float64)

    def rows(self, logits: Tensor, batch: Batch) -> Tensor:
        """(B, k): what each sample adds to the sums; 0 where it is none."""
        raise NotImplementedError

    def of(self, sums: Floats) -> Scores:
        """The scores of sums (..., k)."""
        raise NotImplementedError

    def update(self, logits: Tensor, batch: Batch) -> None:
        added = self.rows(logits.detach(), batch).sum(0)
        self.sums = self.sums.to(added.device) + added

    def result(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.of(self.sums.cpu().numpy()).items()}

    def weighted(self, rows: Floats, weights: Floats) -> Scores:
        """The scores of samples (N, k) taken as often as `weights` (R, N) say: (R,) each."""
        return self.of(weights @ rows)


def token_sums(logits: Tensor | TokenScores, targets: Tensor) -> Tensor:
    """(B, 3): of each row the loss in nats, its targets, and those that are the likeliest. `targets` (B, T) are `IGNORED`
    where none counts. A row's numbers depend neither on its neighbours nor on the padding."""
    if isinstance(logits, TokenScores):
        found = (logits.nats, targets != IGNORED, logits.is_right)
        return torch.stack([part.double().sum(1) for part in found], dim=1)
    flat = logits.reshape(-1, logits.shape[-1]).float()
    losses = functional.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED, reduction="none")
    right = logits.argmax(-1) == targets
    parts = (losses.reshape(targets.shape), targets != IGNORED, right & (targets != IGNORED))
    return torch.stack([part.double().sum(1) for part in parts], dim=1)


class TokenMetrics(Sums):
    """Of the tokens that are asked for: loss in nats, perplexity, and the share that was the likeliest."""

    def __init__(self, targets_of: Callable[[Batch], Tensor]) -> None:
        super().__init__(width=3)
        self.targets_of = targets_of
        """The target at each position (B, T), `IGNORED` where none counts."""

    def rows(self, logits: Tensor, batch: Batch) -> Tensor:
        return token_sums(logits, self.targets_of(batch))

    def of(self, sums: Floats) -> Scores:
        loss = mean(sums[..., 0], sums[..., 1])
        return {"loss": loss, "perplexity": np.exp(loss), "accuracy": mean(sums[..., 2], sums[..., 1])}


class LabelMetrics(Sums):
    """`sums` = the loss, the weight of its targets, then the C x C counts [truth, prediction] row by row.

    Its rows are (loss, weight, truth, prediction), with -1 for both of a sample that does not count.
    """

    def __init__(self, task: SequenceClassification) -> None:
        super().__init__(width=2 + len(task.labels) ** 2)
        self.task = task

    def rows(self, logits: Tensor, batch: Batch) -> Tensor:
        labels, valid = batch["labels"], batch["labels"] != IGNORED
        weights = torch.ones_like(labels, dtype=torch.float64)
        if self.task.class_weights is not None:
            weights = weights.new_tensor(self.task.class_weights)[labels.clamp(min=0)]
        losses = self.task.losses(logits, batch).double()
        guesses = logits.argmax(-1)
        parts = (losses * valid, weights * valid, torch.where(valid, labels, -1), torch.where(valid, guesses, -1))
        return torch.stack([part.double() for part in parts], dim=1)

    def update(self, logits: Tensor, batch: Batch) -> None:
        rows = self.rows(logits.detach(), batch)
        added = torch.cat([rows[:, :2].sum(0), self._counts(rows[:, 2:].cpu()).to(rows.device)])
        self.sums = self.sums.to(rows.device) + added

    def _counts(self, pairs: Tensor) -> Tensor:
        pairs = pairs[pairs[:, 0] >= 0].long()
        cells = pairs[:, 0] * len(self.task.labels) + pairs[:, 1]
        return torch.bincount(cells, minlength=len(self.task.labels) ** 2).double()

    def weighted(self, rows: Floats, weights: Floats) -> Scores:
        num_labels = len(self.task.labels)
        cells = (rows[:, 2] * num_labels + rows[:, 3]).astype(np.int64)
        counts = [np.bincount(cells, row, minlength=num_labels**2) for row in weights]
        return self.of(np.concatenate([weights @ rows[:, :2], counts], axis=1))

    def of(self, sums: Floats) -> Scores:
        """Of two classes also `f1_binary`: the F1 of the second one, as scikit-learn's default has it."""
        num_labels = len(self.task.labels)
        counts = sums[..., 2:].reshape(*sums.shape[:-1], num_labels, num_labels)
        truths, guesses, hits = counts.sum(-1), counts.sum(-2), np.diagonal(counts, axis1=-2, axis2=-1)
        number = counts.sum((-2, -1))
        scores = class_scores(hits, guesses, truths)
        found = {name: scores[name] for name in ("precision", "recall", "f1", "f1_micro")}
        if num_labels == 2:
            found["f1_binary"] = 2 * hits[..., 1] / np.maximum(truths[..., 1] + guesses[..., 1], 1)
        found["matthews"] = matthews(counts)
        rates = {name: np.where(number > 0, score, np.nan) for name, score in found.items()}
        return {"loss": mean(sums[..., 0], sums[..., 1]), "accuracy": mean(hits.sum(-1), number), **rates}


class MultiLabelMetrics(Sums):
    """`sums` = the loss, yes-or-no answers, texts, texts with every answer right, then C hits, C yeses given, C true ones.

    An answer is yes where its probability is above one half.
    """

    def __init__(self, task: SequenceClassification) -> None:
        super().__init__(width=4 + 3 * len(task.labels))
        self.task = task

    def rows(self, logits: Tensor, batch: Batch) -> Tensor:
        valid = batch["labels"][:, :1] != IGNORED
        truth, yes = (batch["labels"] == 1) & valid, (logits > 0) & valid
        losses = self.task.losses(logits, batch).double().sum(1, keepdim=True)
        all_right = (truth == yes).all(1, keepdim=True) & valid
        parts = (losses, valid * len(self.task.labels), valid, all_right, truth & yes, yes, truth)
        return torch.cat([part.double() for part in parts], dim=1)

    def of(self, sums: Floats) -> Scores:
        """`accuracy` is the share of texts with exactly the right labels."""
        loss, num_answers, num_texts, num_right = np.moveaxis(sums[..., :4], -1, 0)
        hits, yes, truths = np.split(sums[..., 4:], 3, axis=-1)
        scores = {name: np.where(num_texts > 0, s, np.nan) for name, s in class_scores(hits, yes, truths).items()}
        return {"loss": mean(loss, num_answers), "accuracy": mean(num_right, num_texts), **scores}


class TagMetrics(Sums):
    """`sums` = the loss, its targets, words, words with the right tag, then hits, answers and truths of each kind counted.

    What is counted are the entities of BIO tags, as seqeval finds them, or, where the tags are not of that form (parts of
    speech, say), the tags themselves.
    """

    def __init__(self, task: TokenClassification) -> None:
        self.task = task
        self.is_bio = all(label == "O" or label[:2] in ("B-", "I-", "E-", "S-") for label in task.labels)
        kinds = {label[2:] for label in task.labels if label != "O"} if self.is_bio else set(task.labels)
        self.kinds = {kind: number for number, kind in enumerate(sorted(kinds))}
        super().__init__(width=4 + 3 * len(self.kinds))

    def rows(self, logits: Tensor, batch: Batch) -> Tensor:
        losses = token_sums(logits, batch["labels"])[:, :2].cpu()
        answers, firsts = logits.argmax(-1).cpu(), batch["first_labels"].cpu()
        valid = firsts != IGNORED
        words = torch.stack([valid.sum(1), ((answers == firsts) & valid).sum(1)], dim=1).double()
        counts = torch.zeros(len(firsts), 3, len(self.kinds), dtype=torch.float64)
        for row, (answer, first, mask) in enumerate(zip(answers, firsts, valid, strict=True)):
            given, true = self._found(answer[mask].tolist()), self._found(first[mask].tolist())
            for place, found in enumerate((given & true, given, true)):
                for kind, *_ in found:
                    counts[row, place, self.kinds[kind]] += 1
        return torch.cat([losses, words, counts.flatten(1)], dim=1)

    def update(self, logits: Tensor, batch: Batch) -> None:
        self.sums = self.sums.cpu() + self.rows(logits.detach(), batch).sum(0)

    def _found(self, tags: list[int]) -> set[tuple[Any, ...]]:
        """What is in one sentence: (kind, first word, last word)."""
        names = [self.task.labels[tag] for tag in tags]
        if not self.is_bio:
            return {(name, place) for place, name in enumerate(names)}
        from seqeval.metrics.sequence_labeling import get_entities

        return set(get_entities(names))

    def of(self, sums: Floats) -> Scores:
        """`precision`, `recall` and `f1` are of all entities together, as seqeval's own; `f1_macro`, the mean over kinds."""
        loss, num_targets, num_words, num_right = np.moveaxis(sums[..., :4], -1, 0)
        scores = class_scores(*np.split(sums[..., 4:], 3, axis=-1))
        found = {name: scores[f"{name}_micro"] for name in ("precision", "recall", "f1")} | {"f1_macro": scores["f1"]}
        rates = {name: np.where(num_words > 0, score, np.nan) for name, score in found.items()}
        return {"loss": mean(loss, num_targets), "accuracy": mean(num_right, num_words), **rates}


class PairMetrics(Sums):
    """`sums` = pairs, the loss, pairs whose chosen answer has the higher reward, sum of chosen and of rejected rewards."""

    def __init__(self, task: Preference) -> None:
        super().__init__(width=5)
        self.task = task

    def rows(self, logits: Tensor, batch: Batch) -> Tensor:
        valid = (batch["samples"] >= 0)[:, None]
        rewards = self.task.beta * (self.task.answer_logps(logits, batch) - batch["reference"]).double()
        margins = rewards[:, :1] - rewards[:, 1:]
        rows = torch.cat([valid.double(), -functional.logsigmoid(margins), (margins > 0).double(), rewards], dim=1)
        return torch.where(valid, rows, 0.0)

    def of(self, sums: Floats) -> Scores:
        names = ("loss", "accuracy", "chosen_reward", "rejected_reward")
        scores = {name: mean(sums[..., 1 + i], sums[..., 0]) for i, name in enumerate(names)}
        return {**scores, "reward_margin": scores["chosen_reward"] - scores["rejected_reward"]}


class NumberMetrics:
    """`sums` is a `Table` of (answer, target) per sample: the order of all of them is what Spearman's correlation needs."""

    def __init__(self, num_samples: int) -> None:
        self._table = Table(num_samples, width=2)

    @property
    def sums(self) -> Tensor:
        return self._table.rows

    @sums.setter
    def sums(self, rows: Tensor) -> None:
        self._table.rows = rows

    def rows(self, logits: Tensor, batch: Batch) -> Tensor:
        return torch.stack([logits.float().squeeze(-1), batch["labels"]], dim=1).double()

    def update(self, logits: Tensor, batch: Batch) -> None:
        self._table.put(torch.where(batch["labels"].isnan(), -1, batch["samples"]), self.rows(logits, batch))

    def result(self) -> dict[str, float]:
        found = self._table.found()
        scores = self.weighted(found, np.ones((1, len(found))))
        return {name: float(value[0]) for name, value in scores.items()}

    def weighted(self, rows: Floats, weights: Floats) -> Scores:
        answers, targets = rows.T
        number = weights.sum(1)
        return {
            "loss": mean(weights @ (answers - targets) ** 2, number),
            "mae": mean(weights @ abs(answers - targets), number),
            **{
                name: np.array([measure(*np.repeat(rows, row.astype(np.int64), axis=0).T) for row in weights])
                for name, measure in (("pearson", pearson), ("spearman", spearman))
            },
        }
