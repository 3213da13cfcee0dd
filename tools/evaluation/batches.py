"""Which parts are computed together, on which rank: by length within a window, under a budget of tokens.

A window holds whole examples. Its batches depend on the data and the budget alone and are dealt to the ranks in turns, so
every rank count computes the same batches. Where one does not fit into memory, it is halved, and so is the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from launcher.errors import ModelError
from tools.evaluation.values import Part

WINDOW_PARTS = 4096  # sorted together: a share of padding of about 1%, at 4096 short lists of numbers in memory
LOGITS_BYTES = (
    1 << 29
)  # of fp32 logits that the default budget allows for: half a GiB, and as much again for its softmax
MOST_TOKENS = 16384
MOST_TOKENS_CPU = 1024  # more leave the caches: stories15M took 1.4 times as long at 8192

FoundT = TypeVar("FoundT")


@dataclass
class Budget:
    tokens: int
    """Of a batch, padding included."""
    rows: int | None = None

    @classmethod
    def of(cls, vocab_size: int, tokens: int | None, rows: int | None) -> Budget:
        most = MOST_TOKENS if torch.cuda.is_available() else MOST_TOKENS_CPU
        return cls(tokens or max(256, min(most, LOGITS_BYTES // (4 * vocab_size))), rows)

    def fits(self, num_rows: int, longest: int) -> bool:
        """One row always fits: it may be as long as the model takes."""
        return num_rows == 1 or (num_rows <= (self.rows or num_rows) and num_rows * longest <= self.tokens)


def windows(examples: Iterable[list[Part]]) -> Iterator[list[Part]]:
    """Whole examples, `WINDOW_PARTS` parts or a little more at once."""
    held: list[Part] = []
    for parts in examples:
        held.extend(parts)
        if len(held) >= WINDOW_PARTS:
            yield held
            held = []
    if held:
        yield held


def batches(parts: Iterable[Part], budget: Budget) -> Iterator[list[Part]]:
    """Longest first: what does not fit is found out at once."""
    batch: list[Part] = []
    for part in sorted(parts, key=lambda part: (-part.num_tokens, part.example, part.number)):
        if batch and not budget.fits(len(batch) + 1, batch[0].num_tokens):
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def scored(parts: list[Part], score: Callable[[list[Part]], list[FoundT]], budget: Budget) -> list[FoundT]:
    """`score(parts)`, in as many pieces as memory asks for. ModelError where not even one row fits."""
    if not budget.fits(len(parts), parts[0].num_tokens):
        return _halves(parts, score, budget)
    try:
        return score(parts)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
    if len(parts) == 1:
        rule = f"does not fit into memory beside one row of {parts[0].num_tokens} tokens"
        raise ModelError("MODEL", parts[0].num_tokens, rule, "give a smaller --seq-len, or --device-map auto")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    budget.tokens = max(1, min(budget.tokens, len(parts) * parts[0].num_tokens) // 2)
    return _halves(parts, score, budget)


def _halves(parts: list[Part], score: Callable[[list[Part]], list[FoundT]], budget: Budget) -> list[FoundT]:
    middle = len(parts) // 2
    return [*scored(parts[:middle], score, budget), *scored(parts[middle:], score, budget)]


def _is_memory(error: BaseException) -> bool:
    """The CPU's allocator says it only in words."""
    is_word = "not enough memory" in str(error) or "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or is_word
