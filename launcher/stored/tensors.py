"""What every format speaks: named tensors that are described first and read one at a time.

A `TensorSource` knows all shapes and dtypes after reading metadata alone, so that a sink can plan its files, headers
and sizes before the first value is read. Neither side ever holds more than one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch

from launcher.errors import CheckpointError
from launcher.stored.records import StoredBytes

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in total)."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Where tensors come from."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Every tensor that is stored, once."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of stored tensors (tied weights): name -> the name in `tensors`."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The values of one tensor: contiguous, on the CPU, shaped and typed as its entry says."""
        ...

    def records(self) -> list[StoredBytes]:
        """Every stored record that the tensors need, once."""
        ...


class TensorSink(Protocol):
    """Where tensors go. Files are planned when the sink is made; `write` is then called in the order of the plan."""

    def write(self, name: str, tensor: torch.Tensor) -> None: ...

    def finish(self) -> None:
        """Everything is on disk when this returns."""
        ...

    def close(self) -> None:
        """Lets go of open files, finished or not."""
        ...


def safe_relative(path: Path, relative: str) -> Path:
    """`path / relative`, refused when it would leave `path`: file names inside a checkpoint are input, not code."""
    parts = PurePosixPath(relative).parts
    if not parts or PurePosixPath(relative).is_absolute() or ".." in parts or "\\" in relative or "\0" in relative:
        raise CheckpointError(
            str(path),
            relative,
            "names a file outside its own folder",
            "do not use this checkpoint: its metadata was tampered with",
        )
    return path / relative
