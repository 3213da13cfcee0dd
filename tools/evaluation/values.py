"""The values that the rooms of evaluation hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from launcher.task import Record, Row

if TYPE_CHECKING:
    from tools.evaluation.opened import Opened

Floats = NDArray[np.float64]
Outcome = dict[str, Any]
"""What was found about a part, or about a whole example: numbers, lists of numbers and texts that JSON can hold."""

Measure = Callable[[Floats], dict[str, Floats]]
"""Weights (R, N) on the examples -> each score by name, (R,). Weights of 1 give the scores, draws with replacement their
spread, and weights of 0 leave out what is not in a slice."""

LARGER, SMALLER = 1, -1
"""Which direction of a score is better."""
SMALLER_IS_BETTER = ("loss", "perplexity", "mae", "brier", "ece", "bits", "nll")


class Part(NamedTuple):
    """One row of the model, of an example that may have several: choices, windows, hidden words."""

    example: int
    """The place of the example in the data, from 0: the same on every rank."""
    number: int
    row: Row
    facts: dict[str, Any]
    """Of the example, carried by its first part: `where` it stands, its `length` in tokens, its slices."""

    @property
    def num_tokens(self) -> int:
        return len(self.row["input_ids"])


@dataclass(frozen=True)
class Table:
    """All examples, one row each, in the order of the data."""

    columns: dict[str, NDArray[Any]]
    """Numbers (N,) or (N, k) that the question's measures need, and under `slice:NAME` what an example belongs to."""
    num_examples: int

    def has(self, name: str) -> bool:
        return name in self.columns


class Question(Protocol):
    name: str
    auto_class: str
    """Class of `transformers` that opens the model with the right head."""

    def parts(self, records: Iterable[Record]) -> Iterator[list[Part]]:
        """The parts of each example."""

    def score(self, model: Opened, parts: list[Part]) -> list[Outcome]:
        """What is found about each part; it does not depend on the others or on the padding."""

    def merged(self, facts: Mapping[str, Any], outcomes: list[Outcome]) -> Outcome:
        """What is found about an example, from its parts in their order."""

    def measure(self, table: Table) -> Measure:
        """The scores."""

    headline: str
    """The score that slices are compared by."""


def direction(name: str) -> int:
    """Whether more of the score of this name is better."""
    return SMALLER if any(word in name for word in SMALLER_IS_BETTER) else LARGER
