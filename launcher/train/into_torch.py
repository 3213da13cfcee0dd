"""Any checkpoint into DDP, FSDP2 or HSDP: DCP's own planner says which rank needs which box of which tensor.

It sees every tensor as one chunk, and `StateReader` cuts the box out of wherever its values lie.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from launcher.stored.state import STEP, State
from launcher.stored.values import Values
from launcher.train.by_name import moment, moment_names, read_box, take_settings, updates, weight


class StateReader(dcp.StorageReader):
    """A storage of DCP whose tensors are `Values`, wherever they lie."""

    def __init__(self, values: Mapping[str, Values]) -> None:
        self._values = values

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return Metadata({name: _one_chunk(values) for name, values in self._values.items()})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            values = self._values[item.storage_index.fqn]
            target = planner.resolve_tensor(item).detach()
            target.copy_(read_box(values, tuple(item.storage_offsets), tuple(item.lengths)))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _one_chunk(values: Values) -> TensorStorageMetadata:
    size = torch.Size(values.shape)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return TensorStorageMetadata(TensorProperties(values.dtype), size, [chunk])


def fill_model(model: Mapping[str, Any], state: State) -> None:
    """Fills the tensors (whole or sharded) of a model's state dict. All ranks together."""
    _load(dict(model), {name: weight(state, name, tensor.shape) for name, tensor in model.items()})


def fill_optimizer(optim: dict[str, Any], state: State) -> None:
    """Fills the moments and steps of an optimiser's state dict by name, and its groups' settings. All together."""
    keys = moment_names(state)
    live: dict[str, Any] = {}
    values: dict[str, Values] = {}
    for name, states in optim["state"].items():
        states[STEP] = torch.full_like(torch.as_tensor(states[STEP]), updates(state, name))
        for key in keys:
            live[f"{name}/{key}"] = states[key]
            values[f"{name}/{key}"] = moment(state, name, key, states[key].shape)
    for group in optim["param_groups"]:
        take_settings(state, group, group["params"])
    _load(live, values)


def _load(tensors: dict[str, Any], values: Mapping[str, Values]) -> None:
    dcp.load(tensors, storage_reader=StateReader(values))
