"""A folder of torch DCP as a `State`: model and optimiser by name, whatever the number of ranks that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from launcher.errors import ABSENT, CheckpointError
from launcher.stored import torch_zip
from launcher.stored.dcp import OPTIMIZER_ROOTS, Chunk, _chunks, _entry, _model_keys, _places
from launcher.stored.records import DAMAGED, USE_ANOTHER, StoredTensor
from launcher.stored.safe_pickle import damage_named, unpickle
from launcher.stored.state import STEP, Group, Optimizer, State
from launcher.stored.values import Stored, Values, box_runs, stored_tensor, whole

Keys = dict[tuple[str, ...], str]
"""Path in the saved state dict -> key in the checkpoint."""


def read_dcp(folder: Path, root: str = "model") -> State:
    """root: what the weights were saved under; `ema` for their moving average. Raises `CheckpointError`."""
    file = folder / ".metadata"
    with file.open("rb") as stream:
        metadata = unpickle(stream, file)
    with damage_named(file):
        return _Reader(folder, metadata).state(root)


class _Reader:
    def __init__(self, folder: Path, metadata: Any) -> None:
        self.folder, self.metadata = folder, metadata
        self.places = _places(folder, metadata.storage_data)
        self.entries: Mapping[str, Any] = metadata.state_dict_metadata
        saved = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
        self.paths = {key: tuple(map(str, saved.get(key, (key,)))) for key in self.entries}

    def state(self, root: str) -> State:
        keys = _model_keys(
            {key for key, entry in self.entries.items() if hasattr(entry, "chunks")}, self.metadata, root
        )
        tensors = {name: self.values(key) for name, key in keys.items()}
        files = {str(place[0]) for place in self.places.values()}
        return State("dcp", self.folder, tensors, optimizer=self.optimizer(), step=self.step(), num_ranks=len(files))

    def values(self, key: str) -> Values:
        entry, file = self.entries[key], self.folder / ".metadata"
        boxes = [(c.offsets, c.sizes, _stored(c)) for c in _chunks(file, key, entry, self.places)]
        found = _entry(entry)
        if len(boxes) == 1 and boxes[0][1] == found.shape:
            return boxes[0][2]
        return Stored(found.shape, found.dtype, box_runs(found.shape, boxes))

    def plain(self, key: str) -> Any:
        """Something that is no tensor: an archive of its own, opened as safely as all others."""
        if key not in self.entries or (key, ()) not in self.places:
            return None
        found = torch_zip.load_part(*self.places[key, ()])
        return whole(stored_tensor(found)) if isinstance(found, StoredTensor) else found

    def optimizer(self) -> Optimizer | None:
        inside = {path: key for key, path in self.paths.items() if path[0] in OPTIMIZER_ROOTS}
        if not inside:
            return None
        state: dict[str, dict[str, Values]] = {}
        for path, key in inside.items():
            if (found := _state_path(path)) and hasattr(self.entries[key], "chunks"):
                state.setdefault(found[0], {})[found[1]] = self.values(key)
        ordered = {name: dict(sorted(one.items(), key=lambda item: item[0] != STEP)) for name, one in state.items()}
        return Optimizer(self.groups(inside), ordered) if ordered else None

    def groups(self, inside: Keys) -> tuple[Group, ...]:
        """`param_groups` as a list of settings, or flattened: one entry per parameter and setting."""
        listed: dict[int, dict[str, Any]] = {}
        flat: dict[str, dict[str, Any]] = {}
        for path, key in inside.items():
            if len(path) > 3 and path[1] == "param_groups" and path[2].isdigit():
                value = self.plain(key)
                listed.setdefault(int(path[2]), {})[path[3]] = value if len(path) == 4 else None
            elif len(path) == 2 and path[1].startswith("param_groups."):
                name, _, setting = path[1].removeprefix("param_groups.").rpartition(".")
                flat.setdefault(name, {})[setting] = self.plain(key)
        if flat:
            return _grouped(flat)
        found = []
        for _, settings in sorted(listed.items()):
            names = settings.pop("params", ())
            found.append(Group(settings, tuple(map(str, names))))
        return tuple(found)

    def step(self) -> int | None:
        for key, path in self.paths.items():
            if path in (("step",), ("global_step",), ("train_state", "step")):
                value = self.plain(key) if not hasattr(self.entries[key], "chunks") else whole(self.values(key))
                value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
                return value if type(value) is int else None
        return None


def _state_path(path: tuple[str, ...]) -> tuple[str, str] | None:
    """(parameter, state) of an optimiser's entry, nested or flattened."""
    if len(path) == 4 and path[1] == "state":
        return path[2], path[3]
    if len(path) == 2 and path[1].startswith("state."):
        name, _, key = path[1].removeprefix("state.").rpartition(".")
        return name, key
    return None


def _grouped(flat: Mapping[str, dict[str, Any]]) -> tuple[Group, ...]:
    """Parameters with the same settings, together, in the order of their names' first appearance."""
    groups: dict[str, list[str]] = {}
    for name, settings in flat.items():
        groups.setdefault(repr(sorted(settings.items())), []).append(name)
    return tuple(Group(flat[names[0]], tuple(names)) for names in groups.values())


def _stored(chunk: Chunk) -> Stored:
    values = stored_tensor(chunk.stored())
    if not isinstance(values, Stored):
        raise CheckpointError(str(chunk.file), ABSENT, DAMAGED, USE_ANOTHER)
    return values
