"""A `State` to the formats that trainers resume from: DeepSpeed's, DCP, one file of torch; with the optimiser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.state import STEP, Group, Optimizer, State, check_whole
from launcher.stored.values import numel, same_values, whole
from tools.conversion.options import Options
from tools.formats.files import Planned
from tools.formats.write_zero import ZeroTarget, plan_universal, plan_zero, same_steps

DEFAULT_STAGE = 3


def plan_sharded(state: State, kind: str, name: str, options: Options, config_dir: Path | None) -> list[Planned]:
    """The files of `kind`; `name` is that of the file for torch:. Raises `CheckpointError`."""
    from tools.formats.write_dcp import plan_dcp, plan_torch  # torch.distributed costs 100 MB, which zero: saves

    check_whole(state)
    state = name_tied(state, config_dir)
    if kind == "dcp":
        return plan_dcp(state, options.ranks or state.num_ranks, options.torch_dtype)
    if kind == "torch":
        return plan_torch(state, name, options.torch_dtype)
    if state.optimizer is None and kind == "universal":
        rule = "holds no optimiser, which is what a universal checkpoint is for"
        raise CheckpointError(state.where, ABSENT, rule, "write zero:, hf: or dcp:")
    compute = options.torch_dtype or state.compute_dtype or torch.float32
    stage = options.stage or state.stage or DEFAULT_STAGE
    target = ZeroTarget(stage, options.ranks or state.num_ranks, compute)
    ready = _for_zero(state)
    return plan_zero(ready, target) if kind == "zero" else plan_universal(ready, target)


def name_tied(state: State, config_dir: Path | None) -> State:
    """With the names and buffers that the model of the config has and the format leaves out."""
    if state.kind != "hf" or config_dir is None:
        return state
    from tools.formats.expected import expected_tensors  # transformers, for this alone
    from tools.formats.hf import read_config

    expected = expected_tensors(config_dir, read_config(config_dir))
    aliases = dict(state.aliases)
    for name, others in expected.other_names.items():
        found = next((one for one in (name, *others) if one in state.tensors), None)
        if found is not None:
            aliases |= {one: found for one in (name, *others) if one not in state.tensors}
    return replace(state, aliases=aliases, buffers=frozenset(state.tensors) & expected.buffers)


def _for_zero(state: State) -> State:
    """What DeepSpeed must be told: groups, which tensors are buffers, which are tied."""
    if state.buffers is None:
        integers = (name for name, values in state.tensors.items() if not values.dtype.is_floating_point)
        state = replace(state, buffers=frozenset(integers))
    if state.optimizer is None:
        return replace(state, optimizer=Optimizer(_own_groups(state), {}))
    if steps := same_steps(state):
        name, step = steps[0]
        rule = f"was updated {step:g} times, others of its group another number, and ZeRO keeps one for all of them"
        raise CheckpointError(state.where, name, rule, "write dcp: or torch:, or use --only-weights")
    if state.step is None and state.optimizer.state:  # DeepSpeed counts; a plain script's checkpoint may not say
        state = replace(state, step=max(int(whole(one[STEP])) for one in state.optimizer.state.values()))
    return _tied_by_value(state)


def _own_groups(state: State) -> tuple[Group, ...]:
    """Weights alone have no groups; ours, so that a fresh optimiser finds its order: matrices, then vectors."""
    weights = {name: len(v.shape) for name, v in state.tensors.items() if name not in (state.buffers or ())}
    matrices = tuple(name for name, dims in weights.items() if dims >= 2)
    vectors = tuple(name for name, dims in weights.items() if dims < 2)
    return tuple(Group({}, names) for names in (matrices, vectors) if names)


def _tied_by_value(state: State) -> State:
    """DCP stores tied tensors under each name; the one that no group trains is an alias if its bits are the same."""
    if state.kind not in ("dcp", "torch"):
        return state
    trained, aliases = state.trained(), dict(state.aliases)
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name in trained:
        if numel(state.tensors[name]):
            shapes.setdefault(state.tensors[name].shape, []).append(name)
    for name, values in state.tensors.items():
        if name not in trained and name not in (state.buffers or ()) and len(values.shape) > 1:
            same = (kept for kept in shapes.get(values.shape, ()) if same_values(values, state.tensors[kept]))
            kept = next(same, None)
            if kept is not None:
                aliases[name] = kept
    tensors = {name: values for name, values in state.tensors.items() if name not in aliases}
    return replace(state, tensors=tensors, aliases=aliases)
