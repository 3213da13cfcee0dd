"""Opens a result as any reader would, and compares it with what it was made of: names, shapes, dtypes, every value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from launcher.errors import CheckpointError
from launcher.stored.state import State
from launcher.stored.tensors import Progress
from launcher.stored.values import CHUNK_BYTES, Values, num_bytes, numel
from tools.formats.files import Part, read_as

WAY_OUT = "report it: the result was removed"


@dataclass(frozen=True)
class Verified:
    num_tensors: int
    norm: float
    """Of all floating weights, as the root of the sum of squares."""


def verify_result(source: Mapping[str, Values], result: State, report: Progress) -> Verified:
    """`source` is what each of the result's tensors should hold, before the cast. Raises `CheckpointError`."""
    known = {*result.tensors, *result.aliases}
    missing = [name for name in source if "/" not in name and name not in known]
    if missing:
        raise CheckpointError(result.where, missing[0], "is missing after the conversion", WAY_OUT)
    total, done, squares = sum(num_bytes(values) for values in result.tensors.values()), 0, 0.0
    for name, values in result.tensors.items():
        if name not in source or source[name].shape != values.shape:
            raise CheckpointError(result.where, name, "is not what was converted (name or shape)", WAY_OUT)
        squares += _compare(name, source[name], values, result.where)
        done += num_bytes(values)
        report("verifying", done, total)
    _compare_optimizer(source, result)
    return Verified(len(result.tensors), squares**0.5)


def _compare(name: str, source: Values, written: Values, where: str) -> float:
    """The sum of squares of what was written, which must be the source's values after the cast."""
    squares = 0.0
    for start, size in stretches(written):
        want, have = (torch.empty(size, dtype=written.dtype) for _ in range(2))
        read_as(Part(source, start, size, name), 0, want, None)
        written.read(start, have)
        if not torch.equal(want.view(torch.uint8), have.view(torch.uint8)):
            raise CheckpointError(where, name, "holds other values than its source", WAY_OUT)
        squares += float(have.double().square().sum()) if have.is_floating_point() else 0.0
    return squares


def stretches(values: Values) -> Iterator[tuple[int, int]]:
    room = CHUNK_BYTES // values.dtype.itemsize
    for start in range(0, numel(values), room):
        yield start, min(room, numel(values) - start)


def _compare_optimizer(source: Mapping[str, Values], result: State) -> None:
    """The states that the source has, under `<parameter>/<state>`."""
    for name, states in (result.optimizer.state if result.optimizer else {}).items():
        for key, values in states.items():
            wanted = source.get(f"{name}/{key}")
            if wanted is not None:
                _compare(f"{name}/{key}", wanted, values, result.where)
