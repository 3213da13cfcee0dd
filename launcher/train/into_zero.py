"""Any checkpoint into DeepSpeed ZeRO-1, -2 and -3: what DeepSpeed would find in this rank's own file is made in memory.

DeepSpeed loads a file of the stage and number of ranks that wrote it. So its optimiser is asked for its own state, whose
vectors are filled by name with what this rank holds of each parameter, and is given it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.state import STEP, State
from launcher.stored.values import Values
from launcher.train.by_name import SAME_LAYOUT, moment, moment_names, read_run, take_settings, updates, weight


class Fragment(NamedTuple):
    """What a rank holds of one parameter."""

    name: str
    shape: tuple[int, ...]
    vector: int
    """Index of the flat vector that holds it."""
    at: int
    """First element in that vector."""
    start: int
    """First element in the parameter, in row-major order."""
    numel: int


def fill_engine(engine: Any, state: State, with_frozen: bool, with_optimizer: bool) -> None:
    """All ranks together. Raises `CheckpointError` where something does not fit."""
    optimizer = engine.optimizer
    if engine.zero_nvme_offload_optimizer():
        rule = "cannot be taken over: this run keeps its optimiser on NVMe"
        raise CheckpointError(state.where, ABSENT, rule, SAME_LAYOUT)
    stage = engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    _fill_whole(engine, state, stage, with_frozen)
    mine = optimizer.state_dict()
    if stage == 3:
        _fill_stage_3(optimizer, mine, engine.param_names, state, with_optimizer)
        optimizer.load_state_dict([mine] * engine.dp_world_size, load_optimizer_states=with_optimizer)
        optimizer.checkpoint_event_epilogue()
        return
    _fill_stage_12(optimizer, mine, engine.param_names, state, with_optimizer)
    copies = [mine] * engine.dp_world_size
    optimizer.load_state_dict(copies, load_optimizer_states=with_optimizer, load_from_fp32_weights=True)
    optimizer.update_lp_params()


def _fill_stage_12(optimizer: Any, mine: dict[str, Any], names: Mapping[Any, str], state: State, moments: bool) -> None:
    fragments, vectors = list(_fragments_12(optimizer, names)), optimizer.single_partition_of_fp32_groups
    _fill(vectors, fragments, _weights(state, fragments))
    mine["single_partition_of_fp32_groups"] = vectors
    if moments:
        groups = [[names[p] for p in group] for group in optimizer.round_robin_bit16_groups]
        _fill_moments(optimizer.optimizer, mine["base_optimizer_state"], vectors, fragments, groups, state)
        _take_loss_scale(mine, state)


def _fill_stage_3(optimizer: Any, mine: dict[str, Any], names: Mapping[Any, str], state: State, moments: bool) -> None:
    fragments, vectors = list(_fragments_3(optimizer, names)), optimizer.fp32_partitioned_groups_flat
    _fill(vectors, fragments, _weights(state, fragments))
    if moments:
        groups = [[names[p] for p in group] for group in optimizer.fp16_groups]
        _fill_moments(optimizer.optimizer, mine["optimizer_state_dict"], vectors, fragments, groups, state)
        _take_loss_scale(mine, state)


def _fragments_12(optimizer: Any, names: Mapping[Any, str]) -> Iterator[Fragment]:
    """DeepSpeed links each parameter with the stretch of this rank's vector that is its own."""
    for vector, group in enumerate(optimizer.round_robin_bit16_groups):
        for parameter in group:
            link = getattr(parameter, "_hp_mapping", None)
            if link is None:  # other ranks hold all of it
                continue
            inside, here = link.lp_fragment_address, link.get_hp_fragment_address()
            yield Fragment(names[parameter], tuple(parameter.shape), vector, here.start, inside.start, inside.numel)


def _fragments_3(optimizer: Any, names: Mapping[Any, str]) -> Iterator[Fragment]:
    """Every parameter is cut over all ranks into equal pieces, the last ones padded."""
    for group in optimizer.fp16_groups:
        for parameter in group:
            vector, at, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = optimizer._get_param_partition_rank(parameter) * numel
            real = max(0, min(numel, parameter.ds_numel - start))
            yield Fragment(names[parameter], tuple(parameter.ds_shape), vector, at, start, real)


def _weights(state: State, fragments: list[Fragment]) -> list[Values]:
    return [weight(state, fragment.name, fragment.shape) for fragment in fragments]


def _fill(vectors: list[torch.Tensor], fragments: list[Fragment], values: list[Values]) -> None:
    """The fragments' values into flat vectors; what lies between them is padding."""
    for fragment, found in zip(fragments, values, strict=True):
        read_run(found, fragment.start, vectors[fragment.vector].data.narrow(0, fragment.at, fragment.numel))


def _fill_moments(
    base: torch.optim.Optimizer,
    saved: dict[str, Any],
    vectors: list[torch.Tensor],
    fragments: list[Fragment],
    names: list[list[str]],
    state: State,
) -> None:
    """`saved` is the state dict of DeepSpeed's inner optimiser: one entry per flat vector, settings per group."""
    steps = [_one_step(state, group) for group in names]
    counts_in_python = type(base).__module__.startswith("deepspeed")  # its host optimiser's step is a plain number
    filled: list[dict[str, Any]] = [
        {STEP: int(step) if counts_in_python else torch.tensor(step, dtype=torch.float32)} for step in steps
    ]
    for key in moment_names(state):
        values = [moment(state, fragment.name, key, fragment.shape) for fragment in fragments]
        empty = [torch.zeros_like(vector.data) for vector in vectors]
        _fill(empty, fragments, values)
        for states, vector in zip(filled, empty, strict=True):
            states[key] = vector
    saved["state"] = dict(enumerate(filled))
    for group in saved["param_groups"]:
        take_settings(state, group, [name for vector in group["params"] for name in names[vector]])


def _one_step(state: State, names: list[str]) -> float:
    """A flat vector has one count of updates for all of its parameters."""
    counts = {updates(state, name) for name in names}
    if len(counts) > 1:
        rule = (
            f"has parameters that were updated {min(counts):g} and {max(counts):g} times, which ZeRO cannot tell apart"
        )
        raise CheckpointError(state.where, ABSENT, rule, SAME_LAYOUT)
    return counts.pop()


def _take_loss_scale(mine: dict[str, Any], state: State) -> None:
    """fp16: the scale that was found goes on, where both sides look for one."""
    if mine["dynamic_loss_scale"] and state.kept.get("dynamic_loss_scale"):
        for name, value in state.kept.get("loss_scaler", {}).items():
            setattr(mine["loss_scaler"], name, value)


def _fill_whole(engine: Any, state: State, stage: int, with_frozen: bool) -> None:
    """Buffers, and frozen parameters: what no optimiser holds."""
    kept = engine.module.state_dict().keys()
    for name, buffer in engine.module.named_buffers():
        if name in kept:
            read_run(weight(state, name, buffer.shape), 0, buffer.view(-1))
    if not with_frozen:
        return
    for parameter, name in engine.param_names.items():
        if parameter.requires_grad:
            continue
        if stage < 3:
            read_run(weight(state, name, parameter.shape), 0, parameter.data.view(-1))
            continue
        piece, start = parameter.ds_tensor, engine.optimizer._get_param_partition_rank(parameter)
        numel = max(0, min(piece.numel(), parameter.ds_numel - start * piece.numel()))
        read_run(weight(state, name, parameter.ds_shape), start * piece.numel(), piece.data.view(-1)[:numel])
