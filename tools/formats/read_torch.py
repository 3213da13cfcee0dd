"""A single file of `torch.save` as a `State`: a state dict, or a dict of one with the optimiser's state by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.errors import ABSENT, CheckpointError
from launcher.stored import torch_zip
from launcher.stored.dcp import OPTIMIZER_ROOTS
from launcher.stored.records import StoredTensor
from launcher.stored.safe_pickle import damage_named
from launcher.stored.state import STEP, Group, Optimizer, State
from launcher.stored.values import Literal, Values, stored_tensor

MODEL_ROOTS = ("model", "state_dict", "model_state_dict", "module")
STEPS = ("step", "global_step", "global_steps")


def read_torch(file: Path) -> State:
    """Raises `CheckpointError`."""
    loaded = torch_zip.load(file)
    with damage_named(file):
        return _read(file, loaded)


def _read(file: Path, loaded: Any) -> State:
    if not isinstance(loaded, dict):
        raise CheckpointError(str(file), ABSENT, "holds no state dict", "save model.state_dict()")
    model = next((loaded[root] for root in MODEL_ROOTS if isinstance(loaded.get(root), dict)), loaded)
    named = {str(name): value for name, value in model.items() if isinstance(value, StoredTensor)}
    if not named:
        raise CheckpointError(str(file), ABSENT, "holds no named tensors", "save model.state_dict()")
    kept, aliases = _untied(named)
    roots = (*OPTIMIZER_ROOTS, "optimizer_state_dict")
    saved = next((loaded[root] for root in roots if model is not loaded and isinstance(loaded.get(root), dict)), None)
    step = next((loaded[name] for name in STEPS if type(loaded.get(name)) is int), None)
    tensors = {name: stored_tensor(value) for name, value in kept.items()}
    return State("torch", file, tensors, aliases, optimizer=saved and _optimizer(file, saved), step=step)


def _untied(named: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Names of the very same elements are one tensor."""
    first: dict[StoredTensor, str] = {}
    aliases: dict[str, str] = {}
    for name, value in named.items():
        if first.setdefault(value, name) != name and value.numel:
            aliases[name] = first[value]
    return {name: value for name, value in named.items() if name not in aliases}, aliases


def _optimizer(file: Path, saved: Mapping[str, Any]) -> Optimizer | None:
    """By name, as DCP and `get_optimizer_state_dict` have it; or numbered, if the groups name their parameters."""
    groups, states = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or not isinstance(states, dict):
        raise CheckpointError(str(file), ABSENT, "holds an optimiser of an unknown form", "use --only-weights")
    names = _names(file, groups, states)
    found: dict[str, dict[str, Values]] = {}
    for key, one in states.items():
        values = {str(state): _values(value) for state, value in one.items() if _is_number(value)}
        found[names[key]] = dict(sorted(values.items(), key=lambda item: item[0] != STEP))
    parts = []
    for group in groups:
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        parts.append(Group(settings, tuple(names[key] for key in group["params"])))
    return Optimizer(tuple(parts), found)


def _names(file: Path, groups: list[Any], states: Mapping[Any, Any]) -> dict[Any, str]:
    pairs = (zip(group["params"], group.get("param_names", group["params"]), strict=True) for group in groups)
    names: dict[Any, str] = {key: name for pair in pairs for key, name in pair}
    if unnamed := [
        key for key in (*names.values(), *(key for key in states if key not in names)) if not isinstance(key, str)
    ]:
        rule = f"numbers the optimiser's parameters ({unnamed[0]}, ...) without naming them"
        way_out = "give the optimiser model.named_parameters(), or use --only-weights"
        raise CheckpointError(str(file), ABSENT, rule, way_out)
    return names


def _is_number(value: Any) -> bool:
    return isinstance(value, StoredTensor | int | float)


def _values(value: Any) -> Values:
    import torch

    return stored_tensor(value) if isinstance(value, StoredTensor) else Literal(torch.tensor(float(value)))
