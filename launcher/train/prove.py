"""What was written is read again: every tensor is there, has its size, and holds finite numbers.

ZeRO-3 saves empty weights when it is asked wrongly, and a shard that was cut has a manifest as good as any other: sizes
and checksums prove that the files are what was written, this proves that what was written is the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from launcher.errors import CheckpointError
from launcher.stored.state import State
from launcher.stored.values import Values
from launcher.train.by_name import moments_of, weight

READ_AT_ONCE = 2**20  # elements: bounds what a background thread holds
WAY_OUT = "the checkpoint before stays the newest; look for the cause in the logs before going on"


def prove(state: State, trained: Mapping[str, tuple[int, ...]], share: slice) -> None:
    """Parameters by name with their whole shapes; this rank reads those of its `share`, all ranks together read all.

    Raises `CheckpointError` for the first tensor that is missing, of another size, or not finite.
    """
    for name, shape in trained.items():
        weight(state, name, shape)
    for name in sorted(trained)[share]:
        _check_finite(state.where, name, weight(state, name, trained[name]))
        for key, values in moments_of(state, name).items():
            _check_finite(state.where, f"{name} ({key})", values)


def is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether each state of the optimiser is a number or has its parameter's form: others only torch itself reads."""
    return all(
        value.numel() in (1, parameter.numel()) and type(value).__module__.startswith("torch.")
        for parameter, states in optimizer.state.items()
        for value in states.values()
        if isinstance(value, torch.Tensor)
    )


def _check_finite(where: str, name: str, values: Values) -> None:
    numel = prod(values.shape)
    for start in range(0, numel, READ_AT_ONCE):
        piece = torch.empty(min(READ_AT_ONCE, numel - start), dtype=values.dtype)
        values.read(start, piece)
        if piece.is_floating_point() and not bool(torch.isfinite(piece).all()):
            raise CheckpointError(where, name, "was saved with values that are not finite", WAY_OUT)
