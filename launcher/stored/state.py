"""A checkpoint as every format is read and written: named tensors, and the optimiser's state by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from launcher.errors import CheckpointError
from launcher.stored.records import StoredBytes
from launcher.stored.values import Values

STEP = "step"
"""The one state of an optimiser that is a number for each parameter; all others have the parameter's shape."""


@dataclass(frozen=True)
class Group:
    """Parameters that are updated with the same settings."""

    settings: Mapping[str, Any]
    """`lr`, `betas`, `weight_decay`, ... as the optimiser keeps them; without `params`."""
    names: tuple[str, ...]


@dataclass(frozen=True)
class Optimizer:
    groups: tuple[Group, ...]
    state: Mapping[str, Mapping[str, Values]]
    """Parameter -> `exp_avg`, `exp_avg_sq`, `step`, ... Empty when only the groups are known."""

    def moments(self) -> tuple[str, ...]:
        """The names of the states that have a parameter's shape, in their order."""
        names = (key for states in self.state.values() for key in states if key != STEP)
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class State:
    """Everything that a checkpoint says, described; nothing of it is read."""

    kind: str
    """zero, universal, dcp, hf, torch, peft."""
    path: Path
    tensors: Mapping[str, Values]
    """Weights and buffers. Weights are fp32 masters where the checkpoint has them."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names of tied tensors -> the name in `tensors`."""
    buffers: frozenset[str] | None = None
    """Which tensors are no parameters; None where the format does not tell."""
    optimizer: Optimizer | None = None
    step: int | None = None
    """Updates made."""
    num_ranks: int = 1
    """That wrote it."""
    stage: int | None = None
    """Of ZeRO."""
    compute_dtype: torch.dtype | None = None
    """In which the model computed, where that is another than the masters'."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """What only the same format can hold: loss scaler, DeepSpeed's configuration, ..."""
    records: tuple[StoredBytes, ...] = ()
    """Of the files' own, beside those of the tensors."""

    @property
    def where(self) -> str:
        return str(self.path)

    def trained(self) -> frozenset[str]:
        return frozenset(name for group in (self.optimizer.groups if self.optimizer else ()) for name in group.names)

    def every(self) -> Iterator[Values]:
        """All values that would be copied with the optimiser."""
        yield from self.tensors.values()
        if self.optimizer is not None:
            yield from (values for states in self.optimizer.state.values() for values in states.values())

    def without_optimizer(self) -> State:
        return replace(self, optimizer=None)

    def renamed(self, names: Mapping[str, str]) -> State:
        """With other names of tensors. Raises `CheckpointError` when two would have the same."""
        new = {name: names.get(name, name) for name in (*self.tensors, *self.aliases)}
        twice = [name for name, count in _counted(new.values()) if count > 1]
        if twice:
            raise CheckpointError("--rename", twice[0], "would name two tensors", "give each a name of its own")
        optimizer = self.optimizer and Optimizer(
            tuple(Group(group.settings, tuple(new[name] for name in group.names)) for group in self.optimizer.groups),
            {new[name]: states for name, states in self.optimizer.state.items()},
        )
        return replace(
            self,
            tensors={new[name]: values for name, values in self.tensors.items()},
            aliases={new[name]: new[kept] for name, kept in self.aliases.items()},
            buffers=None if self.buffers is None else frozenset(new[name] for name in self.buffers),
            optimizer=optimizer,
        )


def _counted(names: Iterable[str]) -> Iterator[tuple[str, int]]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    yield from counts.items()


def check_whole(state: State) -> None:
    """Every state of the optimiser has its parameter and that parameter's shape; each parameter has the same states."""
    if state.optimizer is None or not state.optimizer.state:
        return
    keys = set(state.optimizer.moments())
    for name in sorted(state.trained()):
        if name not in state.tensors:
            raise CheckpointError(state.where, name, "is in an optimiser group but not in the model", "--only-weights")
        missing = (keys | {STEP}) - set(state.optimizer.state.get(name, {}))
        if missing:
            rule = f"lacks the optimiser's {sorted(missing)[0]} (it was never updated)"
            raise CheckpointError(state.where, name, rule, "save after a step that reaches it, or use --only-weights")
        wrong = [key for key in keys if state.optimizer.state[name][key].shape != state.tensors[name].shape]
        if wrong:
            rule = f"has {wrong[0]} of shape {state.optimizer.state[name][wrong[0]].shape}, not its own"
            raise CheckpointError(state.where, name, rule, "convert to dcp: or torch:, or use --only-weights")
