"""Pseudo-perplexity of masked language models: PLL-word-l2r (Kauf & Ivanova 2023, after Salazar et al. 2020).

Each token is asked for with itself and the later tokens of its word hidden: hiding it alone would let the rest of a split
word give it away. A text of n tokens is n rows, batched like any others; only the hidden state at the asked token goes
through the head, so no (B, T, V) is ever made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from launcher.errors import ABSENT, ModelError
from launcher.task import Record
from launcher.task.encoding import frame_of
from launcher.task.padding import pad_right
from launcher.task.scores import mean
from tools.evaluation.fields import Fields
from tools.evaluation.opened import Opened
from tools.evaluation.values import Floats, Measure, Outcome, Part, Table


class PseudoPerplexity:
    name = "pseudo_perplexity"
    auto_class = "AutoModelForMaskedLM"
    headline = "pseudo_perplexity"

    def __init__(self, tokenizer: Any, limit: int, fields: Fields) -> None:
        if tokenizer.mask_token_id is None:
            raise ModelError("MODEL", ABSENT, "has a tokenizer without a mask token", "give a masked language model")
        self.tokenizer = tokenizer
        self.fields = fields
        self.before, self.behind = frame_of(tokenizer)
        self.room = limit - len(self.before) - len(self.behind)

    def parts(self, records: Iterable[Record]) -> Iterator[list[Part]]:
        example = 0
        for record in records:
            encoded = self.tokenizer(record.text, add_special_tokens=False, verbose=False)
            ids, words = list(encoded["input_ids"]), encoded.word_ids(0)
            if not ids:
                continue
            facts = {"length": len(ids), **self.fields.facts(record)}
            rows = [
                row
                for start in range(0, len(ids), self.room)
                for row in self._rows(ids[start : start + self.room], words[start : start + self.room])
            ]
            yield [Part(example, i, row, facts) for i, row in enumerate(rows)]
            example += 1

    def _rows(self, ids: Sequence[int], words: Sequence[int | None]) -> Iterator[dict[str, Any]]:
        ends = [next((j for j in range(i, len(ids)) if words[j] != word), len(ids)) for i, word in enumerate(words)]
        for place, end in enumerate(ends):
            hidden = [*ids[:place], *[self.tokenizer.mask_token_id] * (end - place), *ids[end:]]
            yield {
                "input_ids": [*self.before, *hidden, *self.behind],
                "place": len(self.before) + place,
                "target": ids[place],
            }

    def score(self, model: Opened, parts: list[Part]) -> list[Outcome]:
        rows = [part.row for part in parts]
        batch = {name: tensor.to(model.device) for name, tensor in pad_right(rows, model.pad_id).items()}
        places = torch.tensor([row["place"] for row in rows], device=model.device)
        with ExitStack() as hooks:
            for module in model.modules:
                hooks.enter_context(_only(module.base_model, places))
            logits = model.logits(batch)[:, 0].float()
        targets = torch.tensor([row["target"] for row in rows], device=model.device)
        losses = functional.cross_entropy(logits, targets, reduction="none").double()
        right = (logits.argmax(-1) == targets).long()
        return [{"nats": -loss, "guessed": hit} for loss, hit in zip(losses.tolist(), right.tolist(), strict=True)]

    def merged(self, facts: Mapping[str, Any], outcomes: list[Outcome]) -> Outcome:
        sums = {name: sum(outcome[name] for outcome in outcomes) for name in ("nats", "guessed")}
        return {**sums, "tokens": len(outcomes)}

    def measure(self, table: Table) -> Measure:
        sums = np.stack([table.columns[name] for name in ("nats", "guessed", "tokens")], axis=1)

        def scores(weights: Floats) -> dict[str, Floats]:
            nats, guessed, tokens = (weights @ sums).T
            loss = mean(-nats, tokens)
            return {"loss": loss, "pseudo_perplexity": np.exp(loss), "accuracy": mean(guessed, tokens)}

        return scores


class _only:
    """While it lasts, the body of a model hands on the hidden state at one place of each row alone: (B, 1, H)."""

    def __init__(self, body: Any, places: Tensor) -> None:
        self._hook = body.register_forward_hook(lambda module, inputs, output: self._cut(output))
        self._places = places

    def _cut(self, output: Any) -> Any:
        hidden = output[0]
        output["last_hidden_state"] = hidden[torch.arange(len(hidden), device=hidden.device), self._places][:, None]
        return output

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
