"""Where in a text the answer to a question stands. A long text gives several windows; the best answer of all is given.

Windows, targets and the choice of an answer follow transformers' example run_qa.py; exact match and F1 are those of the
SQuAD 2.0 evaluation script (which equals that of 1.1 where every question has an answer).
A target is the place of the first and of the last token of the first answer, or twice the place of `[CLS]` where the
window does not hold it. torch is imported where tensors are made: preparing data needs `rows` only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.errors import DataError
from launcher.task import IGNORED, Batch, Kind, Record, Row
from launcher.task.encoding import second_start

if TYPE_CHECKING:
    from torch import Tensor

    from launcher.task.scores import Floats, Scores


class ExtractiveQA:
    name = "extractive_qa"
    auto_class = "AutoModelForQuestionAnswering"
    columns: dict[str, Kind] = {  # noqa: RUF012 - never altered
        "input_ids": "tokens",
        "second": "int",
        "start": "int",
        "end": "int",
        "null": "int",
        "window": "int",
        "offsets": "ints",
        "context": "bytes",
        "answers": "bytes",
    }
    logits_per_token = True
    sequences_per_sample = 1

    def __init__(
        self,
        seq_len: int,
        *,
        doc_stride: int | None = None,
        max_answer_tokens: int = 30,
        no_answer: bool = False,
        null_threshold: float = 0.0,
    ) -> None:
        self.seq_len = seq_len
        self.doc_stride = doc_stride or max(1, seq_len // 3)
        self.max_answer_tokens = max_answer_tokens
        self.no_answer = no_answer
        self.null_threshold = null_threshold
        self.config_overrides: dict[str, Any] = {}

    def logits_width(self, config: Any) -> int:
        return 2

    def rows(self, records: Iterable[Sequence[Record]], tokenizer: Any) -> Iterator[Row]:
        """A row per window: `second`, the first token of the text; `null`, that of `[CLS]`; `window`, 0, 1, ... of a question;
        `offsets`, first and last character + 1 of each token of the text; `context` and `answers` (JSON), UTF-8."""
        for some in records:
            for record in some:
                yield from self._windows(record, tokenizer)

    def _windows(self, record: Record, tokenizer: Any) -> Iterator[Row]:
        question, context = record.parts["question"].lstrip(), record.parts["context"]
        self._check_room(record, question, tokenizer)
        encoded = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=self.seq_len,
            stride=self.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        answers = record.parts["answers"]
        for number, (ids, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
            sequence = encoded.sequence_ids(number)
            first = second_start(sequence)
            places = offsets[first : first + sequence.count(1)]
            null = _null_place(ids, tokenizer)
            start, end = _target(places, answers, first, null)
            begin = places[0][0] if places else 0
            slice_ = context[begin : places[-1][1] if places else 0]
            yield {
                "input_ids": ids,
                "second": first,
                "start": start,
                "end": end,
                "null": null,
                "window": number,
                "offsets": [place - begin for pair in places for place in pair],
                "context": list(slice_.encode()),
                "answers": list(json.dumps([text for text, _ in answers]).encode()),
            }

    def _check_room(self, record: Record, question: str, tokenizer: Any) -> None:
        num_question = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        num_taken = num_question + tokenizer.num_special_tokens_to_add(pair=True)
        if num_taken + self.doc_stride >= self.seq_len:
            rule = f"is {num_question} tokens, which leaves less of seq_len {self.seq_len} than the stride of {self.doc_stride}"
            way_out = "give more training.seq_len, or less task.doc_stride"
            raise DataError(f"{record.where}: question", record.parts["question"], rule, way_out)

    def collate(self, rows: Sequence[Row], pad_id: int) -> Batch:
        """`labels` (B, 2): first and last token; `samples`, `windows`, `nulls`, `seconds` (B,); `offsets` (B, 2 x tokens of
        the text), `contexts`, `answers` (B, bytes), filled up with -1."""
        import torch

        from launcher.task.padding import pad_right, padded

        return {
            **pad_right(rows, pad_id),
            "labels": torch.tensor([[row["start"], row["end"]] for row in rows]),
            "samples": torch.tensor([row.get("sample", -1) for row in rows]),
            **{f"{name}s": torch.tensor([row[name] for row in rows]) for name in ("window", "null", "second")},
            "offsets": padded([row["offsets"] for row in rows], -1),
            "contexts": padded([row["context"] for row in rows], -1),
            "answers": padded([row["answers"] for row in rows], -1),
        }

    def dummy_rows(self, count: int) -> list[Row]:
        nowhere = {"start": IGNORED, "end": IGNORED, "null": 0, "window": 0}
        return [
            {"input_ids": [0], "second": 1, **nowhere, "offsets": [], "context": [], "answers": []}
            for _ in range(count)
        ]

    def num_valid(self, batch: Batch) -> int:
        return int((batch["labels"][:, 0] != IGNORED).sum())

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        """`logits` (B, T, 2). Half the cross entropy of the first token and half that of the last, over all tokens but padding."""
        return self.losses(logits, batch).sum()

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        from torch.nn import functional

        # no padding among the choices (run_qa leaves it in): a loss must not depend on what else is in the batch
        is_token = batch["attention_mask"][:, :, None] == 1
        scores = logits.float().masked_fill(~is_token, -1e30).transpose(1, 2)  # (B, 2, T)
        flat = functional.cross_entropy(
            scores.reshape(-1, scores.shape[-1]), batch["labels"].reshape(-1), ignore_index=IGNORED, reduction="none"
        )
        return flat.reshape(-1, 2).mean(1)

    def metrics(self, num_samples: int = 0) -> AnswerMetrics:
        return AnswerMetrics(self, num_samples)


class AnswerMetrics:
    """`sums` is a `Table` with a row per window: its number, the loss, the score of its best answer, that of none, and what
    exact match and F1 would be if its best answer were given, or none. Which is given is known when all windows are."""

    def __init__(self, task: ExtractiveQA, num_samples: int) -> None:
        from launcher.task.scores import Table

        self.task = task
        self._table = Table(num_samples, width=8)

    @property
    def sums(self) -> Tensor:
        return self._table.rows

    @sums.setter
    def sums(self, rows: Tensor) -> None:
        self._table.rows = rows

    def update(self, logits: Tensor, batch: Batch) -> None:
        import torch

        samples = torch.where(batch["labels"][:, 0].cpu() == IGNORED, -1, batch["samples"].cpu())
        self._table.put(samples, self.rows(logits, batch))

    def rows(self, logits: Tensor, batch: Batch) -> Tensor:
        """(B, 8), a row per window."""
        return self.answered(logits, batch)[0]

    def answered(self, logits: Tensor, batch: Batch) -> tuple[Tensor, list[str]]:
        """The rows, and the words of the best answer in each window."""
        import torch

        losses = self.task.losses(logits.detach(), batch).double().cpu()
        scores = logits.detach().double().cpu().numpy()
        held = {name: batch[name].cpu().numpy() for name in ("nulls", "seconds", "offsets", "contexts", "answers")}
        rows, words = [], []
        for i in range(len(scores)):
            null, second = int(held["nulls"][i]), int(held["seconds"][i])
            offsets, context, answers = (
                row[i][row[i] >= 0] for row in (held[k] for k in ("offsets", "contexts", "answers"))
            )
            golds = json.loads(bytes(answers.astype(np.uint8))) if len(answers) else []
            text = bytes(context.astype(np.uint8)).decode()
            score, answer = self._best(scores[i], second, offsets.reshape(-1, 2), text)
            null_score = float(scores[i, null].sum())
            rows.append([score, null_score, *exact_and_f1(answer, golds), *exact_and_f1("", golds)])
            words.append(answer)
        found = torch.tensor(rows, dtype=torch.float64)
        return torch.cat([batch["windows"].cpu()[:, None].double(), losses[:, None], found], dim=1), words

    def _best(self, scores: Any, second: int, offsets: Any, context: str) -> tuple[float, str]:
        """Score and words of the best answer in the window: any span of the text of at most `max_answer_tokens`."""
        num = len(offsets)
        if num == 0:
            return float("-inf"), ""
        starts, ends = scores[second : second + num].T
        place = np.arange(num)
        length = place[None, :] - place[:, None] + 1
        allowed = (length >= 1) & (length <= self.task.max_answer_tokens)
        sums = np.where(allowed, starts[:, None] + ends[None, :], -np.inf)
        first, last = np.unravel_index(int(sums.argmax()), sums.shape)
        return float(sums[first, last]), context[offsets[first, 0] : offsets[last, 1]]

    def result(self) -> dict[str, float]:
        windows = self._table.found()
        questions = np.split(windows, np.flatnonzero(windows[:, 0] == 0)[1:]) if len(windows) else []
        merged = np.array([self.merged(question) for question in questions]).reshape(-1, 5)
        return {name: float(value[0]) for name, value in self.weighted(merged, np.ones((1, len(merged)))).items()}

    def merged(self, windows: Any) -> tuple[float, ...]:
        """(loss of its windows, windows, exact match, F1, has an answer) of one question: its best answer, or none where that
        is worth more."""
        best = windows[windows[:, 2].argmax()]
        exact, f1 = best[6:8] if self.is_none(windows) else best[4:6]
        return windows[:, 1].sum(), len(windows), exact, f1, best[6] == 0.0

    def is_none(self, windows: Any) -> bool:
        margin = windows[:, 3].min() - windows[:, 2].max()
        return bool(self.task.no_answer and margin > self.task.null_threshold)

    def weighted(self, rows: Floats, weights: Floats) -> Scores:
        """Means over the questions (N, 5); with `no_answer` also over those that have an answer and those that have none."""
        from launcher.task.scores import mean

        loss, num_windows = weights @ rows[:, 0], weights @ rows[:, 1]
        parts = {"": weights}
        if self.task.no_answer:
            parts |= {"has_answer_": weights * (rows[:, 4] == 1), "no_answer_": weights * (rows[:, 4] == 0)}
        scores = {
            f"{part}{name}": mean(some @ rows[:, column], some.sum(1))
            for part, some in parts.items()
            for column, name in ((2, "exact_match"), (3, "f1"))
        }
        return {"loss": mean(loss, num_windows), **scores}


def _null_place(ids: Sequence[int], tokenizer: Any) -> int:
    """Where "no answer" is said: at `[CLS]`, else at the first token of a text, else at the first token."""
    for token_id in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if token_id is not None and token_id in ids:
            return list(ids).index(token_id)
    return 0


def _target(
    places: Sequence[tuple[int, int]], answers: Sequence[tuple[str, int]], first: int, null: int
) -> tuple[int, int]:
    """First and last token of the first answer in a window whose text starts at token `first`."""
    if not answers or not places:
        return null, null
    text, begin = answers[0]
    stop = begin + len(text)
    if places[0][0] > begin or places[-1][1] < stop:
        return null, null
    start = max(i for i, (left, _) in enumerate(places) if left <= begin)
    end = min(i for i, (_, right) in enumerate(places) if right >= stop)
    return first + start, first + end


def exact_and_f1(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """The better of each over the right answers; no right answer, or only empty ones: the answer must be empty."""
    wanted = [words for gold in golds if (words := _words(gold))] or [[]]
    found = _words(answer)
    return max(float(found == words) for words in wanted), max(_f1(found, words) for words in wanted)


def _words(text: str) -> list[str]:
    """Lower case, without punctuation and articles, as the SQuAD script compares answers."""
    import re
    import string

    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    from collections import Counter

    if not found or not wanted:
        return float(found == wanted)
    num_same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * num_same / (len(found) + len(wanted))
