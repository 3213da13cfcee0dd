"""What the two engines share when they take over a checkpoint of another engine, world or stage: all goes by name.

A `State` says where the values of every tensor lie, in row-major order. An engine asks for the stretches that it holds
itself, so a rank reads its own bytes only, whatever the cut of the ranks that saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.read_dcp import read_dcp
from launcher.stored.read_zero import read_zero
from launcher.stored.state import STEP, State
from launcher.stored.values import Values

EntryT = TypeVar("EntryT")
SETTINGS = ("betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "amsgrad")
"""Of a parameter group, what the update depends on. The learning rate is the step's; the rest (foreach, fused, ...) says
how it is computed here."""
OTHER_MODEL = "resume with the model, method and tokenizer that it was trained with, or name another output_dir"
SAME_LAYOUT = "resume it with the strategy and number of ranks that saved it, or set checkpoint.resume to weights_only"


def open_state(folder: Path, engine_folder: str) -> State:
    """What an engine wrote into a checkpoint folder, described; `engine_folder` is `zero` or `dcp`."""
    if engine_folder == "zero":
        return read_zero(folder / "zero" / "zero")
    return read_dcp(folder / "dcp")


def weight(state: State, name: str, shape: Iterable[int]) -> Values:
    """Raises `CheckpointError` where the checkpoint lacks the tensor or has it in another shape."""
    return _fitting(state, name, _found(state, state.tensors, name), shape, "values")


def moment(state: State, name: str, key: str, shape: Iterable[int]) -> Values:
    found = moments_of(state, name).get(key)
    return _fitting(state, name, found, shape, key)


def moment_names(state: State) -> tuple[str, ...]:
    """The optimiser's states that have their parameter's shape. Raises `CheckpointError` where others cannot be cut."""
    if state.optimizer is None or not state.optimizer.state:
        raise CheckpointError(state.where, ABSENT, "holds no optimiser state", "set checkpoint.resume to weights_only")
    for name, states in state.optimizer.state.items():
        for key, values in states.items():
            of = _found(state, state.tensors, name)
            if key != STEP and of is not None and values.shape != of.shape:
                rule = f"keeps the optimiser's {key} of {name} in a form that cannot be cut anew"
                raise CheckpointError(state.where, ABSENT, rule, SAME_LAYOUT)
    return state.optimizer.moments()


def updates(state: State, name: str) -> float:
    """How often a parameter has been updated."""
    found = moments_of(state, name).get(STEP)
    if found is None:
        raise CheckpointError(state.where, name, "has no count of updates in its optimiser", SAME_LAYOUT)
    return float(read_box(found, (), ()))


def settings_by_name(state: State) -> dict[str, Mapping[str, Any]]:
    groups = state.optimizer.groups if state.optimizer is not None else ()
    return {name: group.settings for group in groups for name in group.names}


def take_settings(state: State, group: dict[str, Any], names: Iterable[str]) -> None:
    """Gives a live parameter group the settings that its parameters were saved with.

    Raises `CheckpointError` where these were not the same for all of them.
    """
    saved = settings_by_name(state)
    found = [_found(state, saved, name) for name in names]
    for key in SETTINGS:
        values = [settings[key] for settings in found if settings is not None and key in settings]
        if key not in group or not values:
            continue
        if any(value != values[0] for value in values):
            rule = f"has several values of {key} where this run has one parameter group"
            raise CheckpointError(state.where, ABSENT, rule, SAME_LAYOUT)
        group[key] = tuple(values[0]) if isinstance(values[0], list) else values[0]


def read_box(values: Values, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    """The elements of a box, read in the longest stretches that are contiguous in the whole tensor."""
    box = torch.empty(sizes, dtype=values.dtype)
    for (start, numel), at in zip(
        _stretches(values.shape, offsets, sizes), _counting(values.shape, sizes), strict=True
    ):
        values.read(start, box.reshape(-1)[at : at + numel])
    return box


def read_run(values: Values, start: int, into: torch.Tensor) -> None:
    """Fills the 1-D `into`, of any dtype and device, with elements from `start` on."""
    if not into.numel():
        return
    if into.device.type == "cpu" and into.dtype == values.dtype and into.is_contiguous():
        values.read(start, into)
        return
    buffer = torch.empty(into.numel(), dtype=values.dtype)
    values.read(start, buffer)
    into.copy_(buffer)


def _stretches(shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first element, number) of each stretch of a box, in row-major order."""
    axis, length = _inner(shape, sizes)
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    starts = [sum(at * step for at, step in zip(offsets, strides, strict=True))]
    for size, step in zip(sizes[:axis], strides, strict=False):
        starts = [start + index * step for start in starts for index in range(size)]
    return ((start, length) for start in starts)


def _counting(shape: tuple[int, ...], sizes: tuple[int, ...]) -> range:
    _, length = _inner(shape, sizes)
    return range(0, max(prod(sizes), 1), max(length, 1))


def _inner(shape: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, int]:
    """(number of leading axes that are stepped through, elements of one stretch)."""
    axis = len(shape)
    while axis and sizes[axis - 1] == shape[axis - 1]:
        axis -= 1
    axis = max(axis - 1, 0)
    return axis, prod(sizes[axis:])


def moments_of(state: State, name: str) -> Mapping[str, Values]:
    return _found(state, state.optimizer.state if state.optimizer is not None else {}, name) or {}


def _found(state: State, table: Mapping[str, EntryT], name: str) -> EntryT | None:
    """A tied tensor is stored under one of its names, which need not be the one of this run."""
    kept = state.aliases.get(name, name)
    names = (name, kept, *(other for other, target in state.aliases.items() if target == kept))
    return next((table[one] for one in names if one in table), None)


def _fitting(state: State, name: str, found: Values | None, shape: Iterable[int], what: str) -> Values:
    if found is None:
        raise CheckpointError(state.where, name, f"is a parameter of this run whose {what} it lacks", OTHER_MODEL)
    if found.shape != tuple(shape):
        rule = f"has the shape {tuple(found.shape)} there and {tuple(shape)} in this run"
        raise CheckpointError(state.where, name, rule, OTHER_MODEL)
    return found
