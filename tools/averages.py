"""Weights that are means: the moving average that a run kept, or that of its last checkpoints; and its best checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.read_dcp import read_dcp
from launcher.stored.state import State
from launcher.stored.values import Ledger, Values
from launcher.train.manifest import read_saved
from tools.formats.files import Part, read_as
from tools.formats.locate import Checkpoint, steps_of


@dataclass(frozen=True)
class Cast:
    """A tensor in another dtype."""

    of: tuple[Values]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of[0].shape

    def read(self, start: int, into: torch.Tensor, ledger: Ledger | None = None) -> None:
        read_as(Part(self.of[0], start, into.numel()), 0, into, ledger)


def moving_average(checkpoint: Checkpoint, state: State) -> State:
    """Each tensor replaced by its moving average where there is one. Raises `CheckpointError`."""
    averages = read_dcp(checkpoint.folder, root="ema").tensors if checkpoint.kind == "dcp" else {}
    if not averages:
        rule, way_out = "holds no moving average of the weights", "train with training.ema_decay, or leave --ema out"
        raise CheckpointError(str(checkpoint.folder), ABSENT, rule, way_out)
    known = {name: Cast((averages[name],), one.dtype) for name, one in state.tensors.items() if name in averages}
    return replace(state, tensors={**state.tensors, **known}, optimizer=None)


def newest_steps(path: Path, count: int) -> list[Path]:
    """The newest `count` complete checkpoints of a run. Raises `CheckpointError` when there are fewer."""
    steps = steps_of(path)
    if len(steps) < count:
        rule = f"has {len(steps)} complete checkpoints"
        raise CheckpointError(str(path), ABSENT, rule, f"average at most as many, or set checkpoint.keep_last: {count}")
    return steps[:count]


def best_step(path: Path) -> Path:
    """The checkpoint that the newest one of a run names as the best. Raises `CheckpointError`."""
    steps = steps_of(path)
    best = read_saved(steps[0]).manifest.best if steps else None
    if best is None or best["step"] is None:
        rule = "names no best checkpoint"
        raise CheckpointError(str(path), ABSENT, rule, "train with evaluation.metric, or leave --best out")
    return steps[0].with_name(f"step-{best['step']:08d}")
