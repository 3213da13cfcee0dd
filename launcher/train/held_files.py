"""A checkpoint engine of DeepSpeed's that holds each file's content until it is told to write.

DeepSpeed's own asynchronous engines write another format, or from another process that shares the tensors; this one
copies what DeepSpeed would give to torch.save, so that its folder is the same, written behind the next steps.
"""

from __future__ import annotations

import copy as copying
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine


class HeldFiles(CheckpointEngine):
    def __init__(self, copies: bool) -> None:
        self._copies = copies
        self._held: list[tuple[Any, Path]] = []
        self._known: dict[Any, torch.Tensor] = {}

    def create(self, info: CheckpointCommitInfo) -> None: ...

    def save(self, state_dict: Any, path: str) -> None:
        self._held.append((self._copy(state_dict) if self._copies else state_dict, Path(path)))
        self._known.clear()  # the next file's tensors may lie where this one's temporary ones lay

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError("this engine is for one save")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True

    def write(self) -> None:
        """Every file is on disk when this returns."""
        while self._held:
            state, path = self._held.pop(0)  # given back as soon as it is written
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())

    def _copy(self, value: Any) -> Any:
        """Tensors to host memory, shared ones once; containers anew; all else as it is now."""
        if isinstance(value, torch.Tensor):
            key = (value.data_ptr(), value.dtype, tuple(value.shape), tuple(value.stride()), value.device)
            if not value.numel() or key not in self._known:
                self._known[key] = value.detach().to("cpu", copy=True)
            return self._known[key]
        if isinstance(value, dict):
            kind = OrderedDict if isinstance(value, OrderedDict) else dict
            return kind((key, self._copy(item)) for key, item in value.items())
        if isinstance(value, list):
            return [self._copy(item) for item in value]
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(self._copy(item) for item in value)
        return copying.deepcopy(value)
