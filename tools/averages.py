"""Weights that are means: the moving average that a run kept, or that of its last checkpoints. One tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.dcp import DcpSource
from launcher.stored.records import StoredBytes
from launcher.stored.tensors import TensorSource
from launcher.train.manifest import read_saved
from tools.formats.locate import Checkpoint, locate, steps_of


class MovingAverage:
    """A checkpoint's tensors, each replaced by its moving average where there is one; a `TensorSource`."""

    def __init__(self, checkpoint: Checkpoint, source: TensorSource) -> None:
        self._averages = DcpSource(checkpoint.folder, root="ema") if checkpoint.kind == "dcp" else None
        if self._averages is None or not self._averages.tensors:
            rule, way_out = (
                "holds no moving average of the weights",
                "train with training.ema_decay, or leave --ema out",
            )
            raise CheckpointError(str(checkpoint.folder), ABSENT, rule, way_out)
        self._source = source
        self.tensors = source.tensors
        self.aliases = source.aliases

    def read(self, name: str) -> torch.Tensor:
        assert self._averages is not None
        if name not in self._averages.tensors:
            return self._source.read(name)
        return self._averages.read(name).to(self.tensors[name].dtype)

    def records(self) -> list[StoredBytes]:
        return self._source.records()


class Mean:
    """The mean of the same tensors of several checkpoints; a `TensorSource`."""

    def __init__(self, sources: list[TensorSource]) -> None:
        self._sources = sources
        self.tensors = sources[0].tensors
        self.aliases = sources[0].aliases

    def read(self, name: str) -> torch.Tensor:
        first = self._sources[0].read(name)
        if not first.is_floating_point():
            return first
        total = first.double()
        for source in self._sources[1:]:
            total += source.read(name)
        return (total / len(self._sources)).to(first.dtype)

    def records(self) -> list[StoredBytes]:
        return [record for source in self._sources for record in source.records()]


def mean_of_last(path: Path, count: int, opened: Callable[[Checkpoint], TensorSource]) -> Mean:
    """Of the newest `count` complete checkpoints of a run. Raises `CheckpointError` when there are fewer."""
    steps = steps_of(path)
    if len(steps) < count:
        rule = f"has {len(steps)} complete checkpoints"
        raise CheckpointError(str(path), ABSENT, rule, f"average at most as many, or set checkpoint.keep_last: {count}")
    return Mean([opened(locate(step, None)) for step in steps[:count]])


def best_step(path: Path) -> Path:
    """The checkpoint that the newest one of a run names as the best. Raises `CheckpointError`."""
    steps = steps_of(path)
    best = read_saved(steps[0]).manifest.best if steps else None
    if best is None or best["step"] is None:
        rule = "names no best checkpoint"
        raise CheckpointError(str(path), ABSENT, rule, "train with evaluation.metric, or leave --best out")
    return steps[0].with_name(f"step-{best['step']:08d}")
