"""How likely a model finds texts: documents in windows, the choices of a question, the last word of a passage.

Shapes: B rows, T tokens of the longest, V vocabulary. A row is `input_ids` and `first`, the first token that is scored;
logits are computed from the token before it on, in fp32. Texts are cut as lm-evaluation-harness cuts them, so that the
numbers are its numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from launcher.errors import ABSENT, DataError, ModelError
from launcher.task import IGNORED, Record
from launcher.task.padding import padded
from launcher.task.scores import mean
from tools.evaluation.fields import Fields, filled
from tools.evaluation.opened import Opened
from tools.evaluation.values import Floats, Measure, Outcome, Part, Table

LN2 = math.log(2)


def row(context: Sequence[int], continuation: Sequence[int], limit: int) -> dict[str, Any]:
    """The last `limit` + 1 tokens: the last of all is only a target. A continuation that is longer is refused."""
    assert context
    ids = [*context, *continuation][-(limit + 1) :]
    return {"input_ids": ids, "first": len(ids) - len(continuation)}


def likelihoods(model: Opened, parts: Sequence[Part]) -> list[Outcome]:
    """`nats` (log-likelihood, 0 or less), `tokens`, `greedy` (whether each was the likeliest), of each row."""
    rows = [part.row for part in parts]
    inputs = padded([ids["input_ids"][:-1] for ids in rows], 0)
    start = min(row["first"] for row in rows) - 1
    targets = padded([[IGNORED] * (row["first"] - 1) + list(row["input_ids"][row["first"] :]) for row in rows], IGNORED)
    targets = targets[:, start:].to(model.device)
    logits = model.next_token_logits(inputs.to(model.device), keep=inputs.shape[1] - start)
    valid = targets != IGNORED
    some, wanted = logits[valid].float(), targets[valid]
    nats = torch.zeros_like(targets, dtype=torch.float64)
    nats[valid] = -functional.cross_entropy(some, wanted, reduction="none").double()
    right = torch.ones_like(valid)
    right[valid] = some.argmax(-1) == wanted
    found = zip(nats.sum(1).tolist(), valid.sum(1).tolist(), right.all(1).tolist(), strict=True)
    return [{"nats": n, "tokens": t, "greedy": int(g)} for n, t, g in found]


class _Scored:
    """What the questions here share."""

    auto_class = "AutoModelForCausalLM"

    def __init__(self, tokenizer: Any, limit: int, fields: Fields) -> None:
        self.tokenizer = tokenizer
        self.limit = limit
        """Tokens that the model takes at once."""
        self.fields = fields

    def score(self, model: Opened, parts: list[Part]) -> list[Outcome]:
        return likelihoods(model, parts)

    def start(self) -> int:
        """The token before a text."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((token_id for token_id in known if token_id is not None), None)
        if found is None:
            rule = "has a tokenizer with neither a first nor a last token (bos, eos), so nothing comes before a text"
            raise ModelError("MODEL", ABSENT, rule, "give the tokenizer an eos_token")
        return int(found)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer(list(texts), return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def pairs(self, where: str, context: str, continuations: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of continuations of one context, cut where the context alone would end."""
        bare = context.rstrip()
        spaces = context[len(bare) :]
        if not bare:
            encoded = self.encode([spaces + text for text in continuations])
            start = self.start()
            # a tokenizer that begins every text with that token has put it there already
            return [self._row(where, [start], ids[1:] if ids[:1] == [start] else ids) for ids in encoded]
        first, *wholes = self.encode([bare, *(context + text for text in continuations)])
        return [self._row(where, whole[: len(first)], whole[len(first) :]) for whole in wholes]

    def _row(self, where: str, context: list[int], continuation: list[int]) -> dict[str, Any]:
        if not continuation:
            raise DataError(where, ABSENT, "has an answer without a token", "give each answer a text")
        if len(continuation) > self.limit:
            rule = f"has an answer of {len(continuation)} tokens, more than the {self.limit} that the model takes"
            raise DataError(where, ABSENT, rule, "leave it out")
        return row(context, continuation, self.limit)


class Perplexity(_Scored):
    """Whole documents, each token once; windows overlap by `stride` tokens, so that so many at least come before a token."""

    name = "perplexity"
    headline = "bits_per_byte"

    def __init__(self, tokenizer: Any, limit: int, fields: Fields, stride: int | None) -> None:
        super().__init__(tokenizer, limit, fields)
        self.stride = limit // 2 if stride is None else stride
        if not 1 <= self.stride < limit:
            rule = f"is not between 1 and {limit - 1}: windows are {limit} tokens"
            raise DataError("--stride", self.stride, rule, "give fewer, or a larger --seq-len")

    def parts(self, records: Iterable[Record]) -> Iterator[list[Part]]:
        start, example = self.start(), 0
        for record in records:
            (ids,) = self.encode([record.text])
            ids = ids[1:] if ids[:1] == [self.tokenizer.bos_token_id] else ids
            facts = {
                "length": len(ids),
                "bytes": len(record.text.encode()),
                "words": len(re.split(r"\s+", record.text)),
            }
            facts |= self.fields.facts(record)
            if ids:
                rows = rolling([start, *ids], self.limit, self.stride)
                yield [Part(example, i, row, facts) for i, row in enumerate(rows)]
                example += 1

    def merged(self, facts: Mapping[str, Any], outcomes: list[Outcome]) -> Outcome:
        sums = {name: sum(outcome[name] for outcome in outcomes) for name in ("nats", "tokens")}
        return {**sums, "bytes": facts["bytes"], "words": facts["words"]}

    def measure(self, table: Table) -> Measure:
        sums = np.stack([table.columns[name] for name in ("nats", "tokens", "bytes", "words")], axis=1)

        def scores(weights: Floats) -> dict[str, Floats]:
            nats, tokens, num_bytes, words = (weights @ sums).T
            loss = mean(-nats, tokens)
            return {
                "loss": loss,
                "perplexity": np.exp(loss),
                "bits_per_token": loss / LN2,
                "bits_per_byte": mean(-nats, num_bytes) / LN2,
                "byte_perplexity": np.exp(mean(-nats, num_bytes)),
                "word_perplexity": np.exp(mean(-nats, words)),
            }

        return scores


def rolling(ids: Sequence[int], limit: int, stride: int) -> list[dict[str, Any]]:
    """Rows of at most `limit` inputs that score every token of `ids` but the first once.

    The last window reaches as far back as it can, so its tokens have more before them than `stride`.
    """
    rows, done = [], 1  # tokens that need no score any more
    while done < len(ids):
        end = min(len(ids), limit + 1 if done == 1 else done + limit + 1 - stride)
        begin = max(0, end - limit - 1)
        rows.append({"input_ids": list(ids[begin:end]), "first": done - begin})
        done = end
    return rows


class MultipleChoice(_Scored):
    """Which of several continuations is the likeliest, as it is and per character."""

    name = "multiple_choice"
    headline = "accuracy_norm"

    def parts(self, records: Iterable[Record]) -> Iterator[list[Part]]:
        for example, record in enumerate(records):
            choices = self._choices(record)
            gold = self._gold(record, choices)
            context = filled(self.fields.prompt or "{query}", self.fields, record)
            delimiter = "" if context[-1:].isspace() else self.fields.delimiter
            rows = self.pairs(record.where, context, [delimiter + choice for choice in choices])
            facts = {"gold": gold, "characters": [len(choice) for choice in choices], **self.fields.facts(record)}
            facts.setdefault("length", len(rows[0]["input_ids"]))
            yield [Part(example, i, row, facts) for i, row in enumerate(rows)]

    def _choices(self, record: Record) -> list[str]:
        choices = self.fields.listed("choices", record)
        if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
            where = f"{record.where}: {self.fields.name('choices')}"
            raise DataError(where, choices, "is not a list of two texts or more", "give the answers to choose from")
        return choices

    def _gold(self, record: Record, choices: list[str]) -> int:
        gold = self.fields.value("gold", record)
        where = f"{record.where}: {self.fields.name('gold')}"
        if isinstance(gold, str) and gold in choices:
            return choices.index(gold)
        try:
            number = -1 if isinstance(gold, bool) else int(gold)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < len(choices):
            rule = f"is neither one of the {len(choices)} choices nor its place from 0"
            raise DataError(where, gold, rule, "say which choice is right")
        return number

    def merged(self, facts: Mapping[str, Any], outcomes: list[Outcome]) -> Outcome:
        nats, gold = np.array([outcome["nats"] for outcome in outcomes]), facts["gold"]
        answer, normed = int(nats.argmax()), int((nats / np.array(facts["characters"])).argmax())
        shares = np.exp(nats - np.logaddexp.reduce(nats))
        truth = np.eye(len(nats))[gold]
        return {
            "choice_nats": nats.tolist(),
            "answer": answer,
            "truth": gold,
            "right": int(answer == gold),
            "right_norm": int(normed == gold),
            "confidence": float(shares[answer]),
            "brier": float(((shares - truth) ** 2).sum()),
        }

    def measure(self, table: Table) -> Measure:
        columns = np.stack([table.columns[name] for name in ("right", "right_norm", "brier")], axis=1)

        def scores(weights: Floats) -> dict[str, Floats]:
            right, normed, brier = (weights @ columns).T
            number = weights.sum(1)
            return {
                "accuracy": mean(right, number),
                "accuracy_norm": mean(normed, number),
                "brier": mean(brier, number),
            }

        return scores


class Cloze(_Scored):
    """The end of a passage: whether it is what the model would write, and how likely it is (LAMBADA)."""

    name = "cloze"
    headline = "accuracy"

    def parts(self, records: Iterable[Record]) -> Iterator[list[Part]]:
        for example, record in enumerate(records):
            context = filled(self.fields.prompt or "{context}", self.fields, record)
            continuation = self.fields.text("continuation", record)
            joined = "" if context[-1:].isspace() or continuation[:1].isspace() else self.fields.delimiter
            (row,) = self.pairs(record.where, context, [joined + continuation])
            facts = self.fields.facts(record)
            yield [Part(example, 0, row, {"length": len(row["input_ids"]), **facts})]

    def merged(self, facts: Mapping[str, Any], outcomes: list[Outcome]) -> Outcome:
        (outcome,) = outcomes
        return {**outcome, "right": outcome["greedy"]}

    def measure(self, table: Table) -> Measure:
        columns = np.stack([table.columns[name] for name in ("right", "nats")], axis=1)

        def scores(weights: Floats) -> dict[str, Floats]:
            right, nats = (weights @ columns).T
            number = weights.sum(1)
            return {"accuracy": mean(right, number), "perplexity": np.exp(mean(-nats, number))}

        return scores
