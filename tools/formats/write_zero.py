"""A `State` as a DeepSpeed folder that DeepSpeed itself loads: ZeRO 1, 2 or 3, any number of ranks; or universal.

The layout is that of 0.19.8, without pipeline, tensor or expert parallelism. Sources: deepspeed/runtime/engine.py
(`_common_checkpoint_state`), zero/stage_1_and_2.py and zero/stage3.py (`state_dict`), checkpoint/ds_to_universal.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from launcher.stored.state import STEP, Group, State
from launcher.stored.values import Values, numel, whole
from tools.formats.archive import (
    DynamicLossScaler,
    Foreign,
    FragmentAddress,
    LossScaler,
    PlannedTensor,
    archive_file,
)
from tools.formats.files import Part, Planned, literal_file

DS_VERSION = "0.19.8"
NCCL_ALIGNMENT = 2
"""Elements per rank that a group's vector is padded to in stages 1 and 2 (`nccl_start_alignment_factor`)."""
SUB_GROUP_ELEMENTS = 10**9
"""Stage 3 cuts a rank's share of a group here: DeepSpeed's default `sub_group_size`."""


@dataclass(frozen=True)
class ZeroTarget:
    stage: int
    ranks: int
    compute_dtype: torch.dtype
    """Of the module's weights; masters stay fp32."""

    @property
    def prefix(self) -> str:
        return "bf16_" if self.compute_dtype == torch.bfloat16 else ""


def plan_zero(state: State, target: ZeroTarget) -> list[Planned]:
    """Every file of the folder that holds the tag's folder. The optimiser's groups decide what is trained."""
    tag = f"global_step{state.step or 0}"
    plan = _Plan(state, target)
    files = []
    for rank in range(target.ranks):
        name = f"{tag}/{target.prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        content = plan.optim_12(rank) if target.stage < 3 else plan.optim_3(rank)
        files.append(archive_file(name, {"optimizer_state_dict": content, **plan.versions()}))
    for rank in range(target.ranks if target.stage == 3 else 1):
        name = f"zero_pp_rank_{rank}_mp_rank_00" if target.stage == 3 else "mp_rank_00"
        files.append(archive_file(f"{tag}/{name}_model_states.pt", plan.model(rank)))
    return [*files, literal_file("latest", tag.encode())]


def plan_universal(state: State, target: ZeroTarget) -> list[Planned]:
    """One file per parameter and state; `latest_universal` names the folder to DeepSpeed."""
    tag = f"global_step{state.step or 0}_universal"
    plan = _Plan(state, target)
    files = [archive_file(f"{tag}/zero/{name}.pt", value) for name, value in plan.universal_states()]
    files.append(archive_file(f"{tag}/zero/optimizer_state.pt", plan.universal_common()))
    for rank in range(target.ranks if target.stage == 3 else 1):
        name = f"zero_pp_rank_{rank}_mp_rank_00" if target.stage == 3 else "mp_rank_00"
        content = {**plan.model(rank), "universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        files.append(archive_file(f"{tag}/{name}_model_states.pt", content))
    return [*files, literal_file("latest_universal", tag.encode())]


class _Plan:
    """One conversion's common parts."""

    def __init__(self, state: State, target: ZeroTarget) -> None:
        assert state.optimizer is not None, "groups are given by whoever plans"
        self.state, self.target, self.optimizer = state, target, state.optimizer
        self.groups = [group for group in self.optimizer.groups if group.names]
        self.vectors = self.groups if target.stage < 3 else [one for group in self.groups for one in self._cut(group)]
        self.moments = self.optimizer.moments()
        self.whole: dict[str, PlannedTensor] = {}

    def _cut(self, group: Group) -> Iterator[Group]:
        """Stage 3's sub-groups, as `_create_fp16_sub_groups` cuts them: each ends once it is long enough."""
        names: list[str] = []
        size = 0
        for name in group.names:
            names.append(name)
            size += self._share(name)
            if size >= SUB_GROUP_ELEMENTS:
                yield Group(group.settings, tuple(names))
                names, size = [], 0
        if names:
            yield Group(group.settings, tuple(names))

    def _share(self, name: str) -> int:
        """Elements of a parameter on each rank in stage 3."""
        return -(-numel(self.state.tensors[name]) // self.target.ranks)

    def _shape(self, name: str) -> torch.Size:
        return torch.Size(self.state.tensors[name].shape)

    def versions(self) -> dict[str, Any]:
        return {"ds_config": self.state.kept.get("ds_config", {}), "ds_version": DS_VERSION}

    def _scaling(self) -> dict[str, Any]:
        kept = self.state.kept
        dynamic = self.target.compute_dtype == torch.float16 and bool(kept.get("dynamic_loss_scale", True))
        return {
            "loss_scaler": _loss_scaler(kept.get("loss_scaler"), dynamic),
            "dynamic_loss_scale": dynamic,
            "overflow": bool(kept.get("overflow", False)),
        }

    def _clipping(self) -> dict[str, Any]:
        """Only where the source says it: DeepSpeed would take it over its own configuration."""
        return {"clip_grad": self.state.kept["clip_grad"]} if "clip_grad" in self.state.kept else {}

    def _values(self, name: str, key: str | None) -> Values:
        return self.state.tensors[name] if key is None else self.optimizer.state[name][key]

    def _dtype(self, group: Group, key: str | None) -> torch.dtype:
        """Masters are fp32, whatever the source; moments stay as they are."""
        return torch.float32 if key is None else self._values(group.names[0], key).dtype

    def _group_state(self, group: Group, vector: Any) -> dict[str, Any]:
        """`vector(key)` is this rank's share of a moment; the step is the group's."""
        if not self.optimizer.state:
            return {}
        step = self.optimizer.state[group.names[0]][STEP]
        found = {STEP: PlannedTensor((), step.dtype, [Part(step, 0, 1)])}
        return found | {key: vector(key) for key in self.moments}

    def _param_groups(self) -> list[dict[str, Any]]:
        """Every group of the optimiser with the numbers of its vectors."""
        found, at = [], 0
        for group in self.groups:
            count = 1 if self.target.stage < 3 else sum(1 for _ in self._cut(group))
            found.append({**group.settings, "params": list(range(at, at + count))})
            at += count
        return found

    # stages 1 and 2

    def optim_12(self, rank: int) -> dict[str, Any]:
        ranks = self.target.ranks
        sizes = [_partition(sum(numel(self.state.tensors[n]) for n in group.names), ranks) for group in self.groups]
        lengths = [sum(numel(self.state.tensors[n]) for n in group.names) for group in self.groups]
        lean = [max(0, min(size, length - rank * size)) for size, length in zip(sizes, lengths, strict=True)]
        state = {}
        for index, (group, size) in enumerate(zip(self.groups, sizes, strict=True)):
            share = self._group_state(group, lambda key, g=group, s=size: self._flat(g, key, rank * s, s, s))
            if share:
                state[index] = share
        masters = [
            self._flat(group, None, rank * size, length, length)
            for group, size, length in zip(self.groups, sizes, lean, strict=True)
        ]
        return {
            **self._scaling(),
            **self._clipping(),
            "base_optimizer_state": {"state": state, "param_groups": self._param_groups()},
            "single_partition_of_fp32_groups": masters,
            "zero_stage": self.target.stage,
            "group_paddings": [size - length for size, length in zip(sizes, lean, strict=True)],
            "param_alignment_paddings": [[0] * len(group.names) for group in self.groups],
            "partition_count": [ranks] * len(self.groups),
            "ds_version": DS_VERSION,
            "param_slice_mappings": [self._mapping(g, rank * s, s) for g, s in zip(self.groups, sizes, strict=True)],
        }

    def _flat(self, group: Group, key: str | None, start: int, count: int, length: int) -> PlannedTensor:
        """Elements `start` to `start + count` of the group's vector, with zeros behind its end, `length` in all."""
        parts = [
            Part(self._values(name, key), first, size, name) for name, first, size in self._pieces(group, start, count)
        ]
        padding = length - sum(part.numel for part in parts)
        return PlannedTensor((length,), self._dtype(group, key), [*parts, Part(None, 0, padding)])

    def _pieces(self, group: Group, start: int, count: int) -> Iterator[tuple[str, int, int]]:
        """(parameter, first element of it, elements) of a stretch of the group's vector."""
        at = 0
        for name in group.names:
            size = numel(self.state.tensors[name])
            first, last = max(start, at), min(start + count, at + size)
            if first < last:
                yield name, first - at, last - first
            at += size

    def _mapping(self, group: Group, start: int, count: int) -> OrderedDict[str, Foreign]:
        """Where each parameter lies in this rank's vector, for DeepSpeed's universal conversion."""
        found: OrderedDict[str, Foreign] = OrderedDict()
        at = 0
        for name, _, size in self._pieces(group, start, count):
            found[name] = FragmentAddress(numel=size, start=at)
            at += size
        return found

    # stage 3

    def optim_3(self, rank: int) -> dict[str, Any]:
        state = {}
        for index, group in enumerate(self.vectors):
            share = self._group_state(group, lambda key, g=group: self._shares(g, key, rank))
            if share:
                state[index] = share
        return {
            "zero_stage": 3,
            **self._scaling(),
            "partition_count": self.target.ranks,
            "optimizer_state_dict": {"state": state, "param_groups": self._param_groups()},
            "fp32_flat_groups": [self._shares(group, None, rank) for group in self.vectors],
        }

    def _shares(self, group: Group, key: str | None, rank: int) -> PlannedTensor:
        """This rank's piece of every parameter, one after another, each padded to the same length on all ranks."""
        parts = [part for name in group.names for part in self._piece(name, self._values(name, key), rank)]
        return PlannedTensor((sum(part.numel for part in parts),), self._dtype(group, key), parts)

    def _piece(self, name: str, values: Values, rank: int) -> list[Part]:
        share = self._share(name)
        first = min(rank * share, numel(values))
        size = min(share, numel(values) - first)
        return [Part(values, first, size, name), Part(None, 0, share - size)]

    # the model's file

    def model(self, rank: int) -> dict[str, Any]:
        stage, frozen = self.target.stage, self._frozen()
        shapes = [OrderedDict((name, self._shape(name)) for name in group.names) for group in self.vectors]
        return {
            "module": self._module(),
            "buffer_names": sorted(self.state.buffers or ()),
            "optimizer": None,
            "param_shapes": shapes,
            "frozen_param_shapes": OrderedDict((n, self._shape(n)) for n in frozen) if stage > 1 else None,
            "shared_params": dict(self.state.aliases),
            "frozen_param_fragments": self._fragments(frozen, rank) if stage > 1 else None,
            "lr_scheduler": self.state.kept.get("lr_scheduler"),
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": self.state.kept.get("skipped_steps", 0),
            "global_steps": self.state.step or 0,
            **({"global_samples": self.state.kept["global_samples"]} if "global_samples" in self.state.kept else {}),
            "dp_world_size": self.target.ranks,
            "mp_world_size": 1,
            **self.versions(),
        }

    def _frozen(self) -> list[str]:
        """Parameters that no group trains."""
        others = self.state.trained() | (self.state.buffers or frozenset())
        return [name for name in self.state.tensors if name not in others]

    def _module(self) -> OrderedDict[str, PlannedTensor]:
        """Whole in stages 1 and 2; in stage 3 only buffers are, the rest is named alone."""
        found: OrderedDict[str, PlannedTensor] = OrderedDict()
        for name in self._module_names():
            kept = self.state.aliases.get(name, name)
            held = self.target.stage < 3 or kept in (self.state.buffers or ())
            found[name] = self._whole(kept) if held else PlannedTensor((0,), self._stored_dtype(kept), [])
        return found

    def _module_names(self) -> Sequence[str]:
        known = {*self.state.tensors, *self.state.aliases}
        before = [name for name in self.state.kept.get("module_names", ()) if name in known]
        return list(dict.fromkeys((*before, *self.state.tensors, *self.state.aliases)))

    def _stored_dtype(self, name: str) -> torch.dtype:
        """Floating parameters are kept as the model computes; buffers and integers as they are."""
        dtype = self.state.tensors[name].dtype
        is_weight = dtype.is_floating_point and name not in (self.state.buffers or ())
        return self.target.compute_dtype if is_weight else dtype

    def _whole(self, name: str) -> PlannedTensor:
        values = self.state.tensors[name]
        if name not in self.whole:
            parts = [Part(values, 0, numel(values), name)]
            self.whole[name] = PlannedTensor(values.shape, self._stored_dtype(name), parts)
        return self.whole[name]

    def _fragments(self, frozen: Sequence[str], rank: int) -> OrderedDict[str, PlannedTensor]:
        if self.target.stage < 3:
            return OrderedDict((name, self._whole(name)) for name in frozen)
        found: OrderedDict[str, PlannedTensor] = OrderedDict()
        for name in frozen:
            parts = self._piece(name, self.state.tensors[name], rank)
            found[name] = PlannedTensor((self._share(name),), self._stored_dtype(name), parts)
        return found

    # universal

    def universal_states(self) -> Iterator[tuple[str, Any]]:
        """`<parameter>/<state>` and its content: stage 3 reads flat tensors, 1 and 2 a dict that says how to cut it."""
        flat = self.target.stage == 3
        for group in self.groups:
            for name in group.names:
                for key in (None, *self.moments):
                    values = self._values(name, key)
                    shape = (numel(values),) if flat else values.shape
                    tensor = PlannedTensor(shape, self._dtype(group, key), [Part(values, 0, numel(values), name)])
                    yield f"{name}/{key or 'fp32'}", tensor if flat else {"cat_dim": 0, "param": tensor}
                if self.optimizer.state and not flat:
                    step = self.optimizer.state[name][STEP]
                    yield f"{name}/step", PlannedTensor((), step.dtype, [Part(step, 0, 1)])

    def universal_common(self) -> dict[str, Any]:
        common = {**self._scaling(), "zero_stage": self.target.stage, "ds_version": DS_VERSION}
        common |= self._clipping()
        groups = self._param_groups()
        if self.target.stage < 3:
            return {**common, "param_groups": groups}
        step = self.optimizer.state[self.groups[0].names[0]][STEP] if self.optimizer.state else None
        state = {} if step is None else {0: {STEP: PlannedTensor((), step.dtype, [Part(step, 0, 1)])}}
        return {**common, "param_groups": groups, "optimizer_state_dict": {"state": state, "param_groups": groups}}


def _partition(total: int, ranks: int) -> int:
    """Elements of a group's vector on each rank."""
    unit = NCCL_ALIGNMENT * ranks
    return -(-total // unit) * NCCL_ALIGNMENT


def _loss_scaler(kept: Mapping[str, Any] | None, dynamic: bool) -> Foreign:
    """As it was, where the source had one; else as DeepSpeed's defaults are (fp16/loss_scaler.py)."""
    if not dynamic:
        return LossScaler(**{"cur_scale": 1.0, "dynamic": False, **(kept or {})})
    if kept and kept.get("dynamic"):
        return DynamicLossScaler(**kept)
    return DynamicLossScaler(
        cur_scale=2.0**16, dynamic=True, cur_iter=0, last_overflow_iter=-1, scale_factor=2.0, scale_window=1000,
        min_scale=1.0, delayed_shift=2, cur_hysteresis=2, consecutive_hysteresis=False, raise_error_at_min_scale=True,
        dtype=torch.float16,
    )  # fmt: skip


def same_steps(state: State) -> list[tuple[str, float]]:
    """(parameter, its step) of the parameters whose step differs from the first of their group."""
    found: list[tuple[str, float]] = []
    if state.optimizer is None or not state.optimizer.state:
        return found
    for group in state.optimizer.groups:
        steps = {name: float(whole(state.optimizer.state[name][STEP])) for name in group.names}
        first = next(iter(steps.values()), 0.0)
        found += [(name, step) for name, step in steps.items() if step != first]
    return found
