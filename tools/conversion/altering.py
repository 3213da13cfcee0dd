"""Weights changed on their way: the mean of several checkpoints, and pruning. Neither keeps an optimiser."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.state import State
from launcher.stored.values import Computed, Ledger, Values, whole

SHARES = re.compile(r"0?\.\d+|[1-9]\d*:[1-9]\d*")


@dataclass(frozen=True)
class Mean:
    """The weighted mean of tensors of one shape and dtype, summed in fp64."""

    of: tuple[Values, ...]
    weights: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.of[0].dtype

    def read(self, start: int, into: torch.Tensor, ledger: Ledger | None = None) -> None:
        total, one = torch.zeros(into.numel(), dtype=torch.float64), torch.empty_like(into)
        for values, weight in zip(self.of, self.weights, strict=True):
            values.read(start, one, ledger)
            total += one.double() * weight
        into.copy_(total)


def average(states: Sequence[State], weights: Sequence[float] | None) -> State:
    """A soup: every floating tensor is the mean over the checkpoints; others are the first's.

    Raises `CheckpointError` when they are not of one model.
    """
    given = list(weights or [1.0] * len(states))
    if len(given) != len(states) or sum(given) <= 0 or min(given) < 0:
        rule = f"are not {len(states)} numbers of at least 0, of which one is more"
        raise CheckpointError("--weights", str(given), rule, "give one for SRC and one for each of --soup")
    shares = tuple(weight / sum(given) for weight in given)
    first = states[0]
    for other in states[1:]:
        _check_same_model(first, other)
    tensors = {
        name: Mean(tuple(state.tensors[name] for state in states), shares) if values.dtype.is_floating_point else values
        for name, values in first.tensors.items()
    }
    return replace(first, tensors=tensors, optimizer=None)


def _check_same_model(first: State, other: State) -> None:
    for name in (*first.tensors, *other.tensors):
        one, two = first.tensors.get(name), other.tensors.get(name)
        if one is None or two is None or (one.shape, one.dtype) != (two.shape, two.dtype):
            rule = f"is not of the same model as {first.where}: {name} differs in name, shape or dtype"
            raise CheckpointError(other.where, ABSENT, rule, "average checkpoints of one run")


def prune(state: State, how: str, linears: dict[str, bool]) -> State:
    """Zeros in the matrices of linear layers: a share of the smallest, or the smallest of every few along the inputs.

    `linears` names them, and whether they lie transposed (inputs first, as GPT-2's do).
    """
    if not SHARES.fullmatch(how):
        raise CheckpointError("--prune", how, "is neither a share nor a pattern", "e.g. 0.5 or 2:4")
    pruned: dict[str, Values] = {}
    for name, is_transposed in linears.items():
        values = state.tensors.get(name)
        if values is not None and values.dtype.is_floating_point:
            pruned[name] = Computed(values.shape, values.dtype, _pruner(values, name, how, is_transposed), (values,))
    return replace(state, tensors={**state.tensors, **pruned}, optimizer=None)


def _pruner(values: Values, name: str, how: str, is_transposed: bool) -> Callable[[Ledger | None], torch.Tensor]:
    def make(ledger: Ledger | None) -> torch.Tensor:
        matrix = whole(values, ledger)
        rows = matrix.t() if is_transposed else matrix
        if ":" in how:
            kept, of = map(int, how.split(":"))
            result = rows * _mask_of_every(rows, kept, of, name)
        else:
            result = rows * _mask_of_share(rows, float(how))
        return result.t().contiguous() if is_transposed else result

    return make


def _mask_of_share(matrix: torch.Tensor, share: float) -> torch.Tensor:
    """False for exactly the `share` of elements that are smallest."""
    flat = matrix.abs().reshape(-1)
    mask = torch.ones(flat.numel(), dtype=torch.bool)
    mask[flat.argsort(stable=True)[: round(share * flat.numel())]] = False
    return mask.reshape(matrix.shape)


def _mask_of_every(matrix: torch.Tensor, kept: int, of: int, name: str) -> torch.Tensor:
    """True for the `kept` largest of every `of` elements of a row."""
    if kept >= of or matrix.shape[1] % of:
        rule = f"cannot be cut into {of}s: {name} has {matrix.shape[1]} inputs"
        raise CheckpointError("--prune", f"{kept}:{of}", rule, "use a share, e.g. 0.5")
    pieces = matrix.abs().reshape(matrix.shape[0], -1, of)
    order = pieces.argsort(dim=-1, descending=True, stable=True)[..., :kept]
    return torch.zeros_like(pieces, dtype=torch.bool).scatter_(-1, order, True).reshape(matrix.shape)


def parse_weights(text: str | None) -> tuple[float, ...] | None:
    """`1,2,1`."""
    if text is None:
        return None
    try:
        return tuple(float(one) for one in text.split(","))
    except ValueError:
        raise CheckpointError("--weights", text, "is not a list of numbers", "e.g. 1,2,1") from None
