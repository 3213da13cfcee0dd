"""Asks a model a question about every example: on one rank or many, from the start or from where a kill left it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from launcher.errors import DataError, ModelError
from launcher.train.world import World
from tools.evaluation.batches import Budget, batches, scored, windows
from tools.evaluation.opened import Opened
from tools.evaluation.spool import Spool
from tools.evaluation.values import Outcome, Part, Question, Table

LISTS = ("row", "probabilities", "bleu_counts", "chrf_counts")
"""Lists of numbers, of one length in all examples, that measures need."""
TEXTS = ("truth",)
Progress = Callable[[int], None]


class Found(NamedTuple):
    """An example that was asked about, and what was found."""

    number: int
    facts: dict[str, Any]
    outcome: Outcome


def ask(
    question: Question,
    model: Opened,
    examples: Iterable[list[Part]],
    spool: Spool,
    budget: Budget,
    world: World,
    progress: Progress,
) -> None:
    """Everything that is not in the spool yet; this rank's batches of it."""
    seen = 0
    with torch.inference_mode():
        for number, window in enumerate(windows(examples)):
            missing = [part for part in window if (part.example, part.number) not in spool.done]
            # dealt by the budget as it was asked for: what did not fit on one rank must not change another's share
            dealt = list(batches(missing, Budget(budget.tokens, budget.rows)))
            for batch in dealt[world.rank :: world.num_ranks]:
                found = scored(batch, lambda parts: _checked(question.score(model, parts), parts, model.name), budget)
                spool.put(number, batch, found)
                progress(seen + len({part.example for part in batch}))
            seen = window[-1].example + 1
            progress(seen)


def _checked(outcomes: list[Outcome], parts: list[Part], name: str) -> list[Outcome]:
    """A NaN would vanish in a mean, or be the likeliest token."""
    for outcome, part in zip(outcomes, parts, strict=True):
        if any(_is_bad(key, value) for key, value in outcome.items()):
            where = part.facts.get("where") or f"example {part.example}"
            rule = f"gives a score that is not a finite number (NaN or infinite logits) on {where}"
            raise ModelError("MODEL", name, rule, "look at the end of its training, or at its precision")
    return outcomes


def _is_bad(key: str, value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    if key == "nats":
        return not all(map(math.isfinite, numbers))
    return any(isinstance(number, float) and math.isnan(number) for number in numbers)


def wait_for_all(world: World) -> None:
    if world.num_ranks > 1:
        dist.barrier()


def merged(question: Question, spool: Spool) -> Iterator[Found]:
    """What was found about every example. DataError where one is missing, or there is none."""
    number = -1
    for expected, (number, facts, outcomes) in enumerate(spool.examples()):
        assert number == expected, f"example {expected} was lost"
        yield Found(number, facts, question.merged(facts, outcomes))


def tabulated(examples: Iterable[Found]) -> Table:
    """Columns of numbers, 8 bytes each; texts and lists of uneven length stay on disk."""
    numbers: dict[str, array[float]] = {}
    texts: dict[str, list[str]] = {}
    count = 0
    for example in examples:
        count += 1
        for name, value in {**example.facts, **example.outcome}.items():
            if name in texts or _is_text(name, value):
                texts.setdefault(name, [str(v) for v in numbers.pop(name, ())]).append(str(value))
            elif isinstance(value, int | float):
                numbers.setdefault(name, array("d")).append(value)
            elif name in LISTS:
                numbers.setdefault(name, array("d")).extend(value)
    columns: dict[str, Any] = {name: np.array(values) for name, values in texts.items()}
    for name, values in numbers.items():
        flat = np.frombuffer(values, dtype=np.float64)
        columns[name] = flat.reshape(count, -1) if name in LISTS else flat
    return Table({name: values for name, values in columns.items() if len(values) == count}, count)


def _is_text(name: str, value: Any) -> bool:
    return isinstance(value, str) and (name.startswith("slice:") or name in TEXTS)


def check_not_empty(table: Table, origin: str, named: str) -> None:
    if table.num_examples == 0:
        raise DataError(origin, named, "holds no sample to score", "give files with text in them")


def remove(folder: Path) -> None:
    """A spool whose examples have been written elsewhere."""
    for path in folder.glob("rank-*.jsonl"):
        path.unlink()
    with suppress(OSError):
        folder.rmdir()
