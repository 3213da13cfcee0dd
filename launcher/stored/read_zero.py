"""A DeepSpeed folder (ZeRO 1, 2, 3; also a universal one) as a `State`: `launcher/stored/zero.py` says where all lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from launcher.errors import ABSENT, CheckpointError
from launcher.stored import torch_zip, zero
from launcher.stored.records import StoredTensor
from launcher.stored.safe_pickle import damage_named
from launcher.stored.state import STEP, Group, Optimizer, State
from launcher.stored.values import Literal, Run, Stored, Values, stored_tensor, whole

KNOWN_BELOW = Version("0.20")
"""DeepSpeed 0.19.8 is what was read; the layouts of later series are not known yet."""
NEWER = "convert it with the fleetune of that time, or with the zero_to_fp32.py that DeepSpeed put beside it"
BY_DEEPSPEED = "resume it with DeepSpeed itself and save it without that"


def read_zero(folder: Path) -> State:
    """`folder` is DeepSpeed's tag folder. Raises `CheckpointError`."""
    with damage_named(folder):
        return _read(folder)


def _read(folder: Path) -> State:
    files = zero._optim_files(folder)
    for file in files:
        loaded = torch_zip.load(file)
        _refuse_unknown(file, loaded if isinstance(loaded, dict) else {})
    states = [zero._optimizer_state(file) for file in files]
    stage = int(states[0]["zero_stage"])
    zero._check_world(folder, states, len(files))
    models = zero._model_states(folder, stage, len(files))
    _check_same_step(folder, models, "global_steps")
    masters = zero._parts_12(files, states, models) if stage < 3 else zero._parts_3(files, states, models)
    other = zero._whole_tensors(models[0], stage, masters)
    tensors = {name: _flat(part) for name, part in masters.items()} | {n: stored_tensor(t) for n, t in other.items()}
    module = models[0].get("module") or {}
    shared = models[0].get("shared_params") or {}
    return State(
        "zero",
        folder,
        _in_order(tensors, module),
        {name: kept for name, kept in shared.items() if kept in tensors and name not in tensors},
        frozenset(models[0].get("buffer_names") or ()) & frozenset(tensors),
        _optimizer(files, states, models, stage),
        _number(models[0].get("global_steps")),
        len(files),
        stage,
        _compute_dtype(models, module, tensors),
        {**_kept(models[0], states[0]), "module_names": tuple(module)},
    )


def _in_order(tensors: Mapping[str, Values], module: Mapping[str, Any]) -> dict[str, Values]:
    """By the module's own order, which is that of every other writer."""
    return {
        name: tensors[name] for name in (*(n for n in module if n in tensors), *(n for n in tensors if n not in module))
    }


def _refuse_unknown(file: Path, loaded: Mapping[str, Any]) -> None:
    """Layouts that would be read as something else, by their names."""
    version = str(loaded.get("ds_version") or "")
    try:
        known = not version or Version(Version(version).base_version) < KNOWN_BELOW
    except InvalidVersion:
        known = False
    if not known:
        raise CheckpointError(str(file), version, "is a DeepSpeed whose layout is not known here", NEWER)
    config = loaded.get("ds_config")
    config = config if isinstance(config, dict) else {}
    section = config.get("zero_optimization")
    section = section if isinstance(section, dict) else {}
    offload = section.get("offload_optimizer")
    if (isinstance(offload, dict) and offload.get("device") == "nvme") or (file.parent / "offloaded_tensors").is_dir():
        raise CheckpointError(
            str(file), ABSENT, "has its optimiser swapped to NVMe, outside of this file", BY_DEEPSPEED
        )
    if int(section.get("mics_shard_size") or 0) > 0:
        raise CheckpointError(str(file), ABSENT, "is sharded by MiCS, in groups smaller than the run", BY_DEEPSPEED)
    tensor_parallel = config.get("tensor_parallel")
    if isinstance(tensor_parallel, dict) and int(tensor_parallel.get("autotp_size") or 0) > 1:
        raise CheckpointError(
            str(file), ABSENT, "is cut by tensor parallelism (AutoTP)", "use DeepSpeed's ds_to_universal.py"
        )


def _check_same_step(folder: Path, states: list[dict[str, Any]], key: str) -> None:
    steps = [state.get(key) for state in states]
    if len({str(step) for step in steps}) > 1:
        rank = next(rank for rank, step in enumerate(steps) if step != steps[0])
        rule = f"mixes steps: rank 0 saved step {steps[0]}, rank {rank} step {steps[rank]}"
        raise CheckpointError(str(folder), ABSENT, rule, zero.ANOTHER_SAVE)


def _number(value: Any) -> int | None:
    return value if type(value) is int else None


def _flat(part: zero.Flat) -> Stored:
    size = part.dtype.itemsize
    runs = (Run(p.stored.record, (p.stored.offset + p.start) * size, p.numel) for p in part.pieces)
    return Stored(part.shape, part.dtype, tuple(runs))


def _compute_dtype(models: Any, module: Mapping[str, Any], tensors: Mapping[str, Values]) -> torch.dtype | None:
    """The 16-bit type of the weights, where the masters are wider."""
    names = [name for shapes in models[0]["param_shapes"] for name in shapes if name in module]
    found = {module[name].dtype for name in names if isinstance(module[name], StoredTensor)}
    wider = {tensors[name].dtype for name in names}
    return found.pop() if len(found) == 1 and found != wider else None


def _kept(model: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """What only DeepSpeed knows the meaning of."""
    names = ("skipped_steps", "global_samples", "ds_config", "lr_scheduler")
    kept = {name: model[name] for name in names if _is_plain(model.get(name)) and model.get(name) is not None}
    scaler = state.get("loss_scaler")
    if scaler is not None:
        plain = {name: value for name, value in vars(scaler).items() if name != "args"}
        kept["loss_scaler"] = {name: value for name, value in plain.items() if _is_plain(value)}
    for name in ("dynamic_loss_scale", "overflow", "clip_grad"):
        if name in state and _is_plain(state[name]):
            kept[name] = state[name]
    return kept


def _is_plain(value: Any) -> bool:
    """Numbers, words and containers of them: what may be written again into another file."""
    if isinstance(value, dict):
        return all(_is_plain(one) for pair in value.items() for one in pair)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _optimizer(
    files: list[Path], states: list[dict[str, Any]], models: list[dict[str, Any]], stage: int
) -> Optimizer | None:
    """The moments lie as the masters do; the step is one per flat vector."""
    bases = [state.get("base_optimizer_state" if stage < 3 else "optimizer_state_dict") for state in states]
    if any(not isinstance(base, dict) for base in bases):
        rule = "holds the optimiser in DeepSpeed's elastic layout"
        raise CheckpointError(str(files[0]), ABSENT, rule, "use --only-weights, or save without elastic_checkpoint")
    first = bases[0]
    if not first:
        return None
    groups = _groups(files[0], first, models[0]["param_shapes"])
    vectors = len(models[0]["param_shapes"])
    saved = [(base or {})["state"] for base in bases]
    if not any(saved):
        return Optimizer(groups, {})
    state: dict[str, dict[str, Values]] = {name: {} for group in groups for name in group.names}
    for key in _moment_names(saved[0]):
        flat = [
            {**_flat_states(files[rank], saved[rank], key, vectors), "zero_stage": stage} for rank in range(len(saved))
        ]
        for name, part in _parts(files, states, flat, models, stage).items():
            if name in state:
                state[name][key] = _flat(part)
    for index, shapes in enumerate(models[0]["param_shapes"]):
        step = _step(files[0].parent, saved, index)
        for name in shapes:
            state[name] = {STEP: Literal(step), **state[name]}
    return Optimizer(groups, state)


def _groups(file: Path, base: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]]) -> tuple[Group, ...]:
    """`params` of a saved group are the numbers of its flat vectors (stage 3 cuts a large group into several)."""
    saved = base.get("param_groups")
    if not isinstance(saved, list):
        raise CheckpointError(str(file), ABSENT, "holds no parameter groups", zero.ANOTHER_SAVE)
    found = []
    for group in saved:
        settings = {key: value for key, value in group.items() if key != "params" and _is_plain(value)}
        names = tuple(name for index in group.get("params", ()) for name in shapes[index])
        found.append(Group(settings, names))
    return tuple(found)


def _moment_names(saved: Mapping[int, Mapping[str, Any]]) -> list[str]:
    first = next(iter(saved.values()))
    return [key for key, value in first.items() if isinstance(value, StoredTensor) and value.shape]


def _flat_states(file: Path, saved: Mapping[int, Mapping[str, Any]], key: str, count: int) -> dict[str, Any]:
    vectors = [saved.get(index, {}).get(key) for index in range(count)]
    if not all(isinstance(vector, StoredTensor) for vector in vectors):
        raise CheckpointError(str(file), key, "is not kept for every parameter group", "use --only-weights")
    return {"single_partition_of_fp32_groups": vectors, "fp32_flat_groups": vectors}


def _parts(
    files: list[Path],
    states: list[dict[str, Any]],
    flat: list[dict[str, Any]],
    models: list[dict[str, Any]],
    stage: int,
) -> dict[str, zero.Flat]:
    if stage < 3:
        paddings = states[0].get("param_alignment_paddings")
        return zero._parts_12(files, [{**one, "param_alignment_paddings": paddings} for one in flat], models)
    bare = [{**model, "frozen_param_shapes": None} for model in models]
    return zero._parts_3(files, flat, bare)


def _step(folder: Path, saved: list[Mapping[int, Mapping[str, Any]]], index: int) -> torch.Tensor:
    """The updates that a flat vector has seen, the same on every rank."""
    steps = [_scalar(one.get(index, {}).get(STEP)) for one in saved]
    if len(set(steps)) > 1:
        rank = next(rank for rank, step in enumerate(steps) if step != steps[0])
        rule = f"mixes steps: rank 0 saved step {steps[0]:g}, rank {rank} step {steps[rank]:g}"
        raise CheckpointError(str(folder), ABSENT, rule, zero.ANOTHER_SAVE)
    return torch.tensor(steps[0], dtype=torch.float32)


def _scalar(value: Any) -> float:
    if isinstance(value, StoredTensor):
        return float(whole(stored_tensor(value)))
    return float(value or 0)


def read_universal(folder: Path) -> State:
    """A folder of `ds_to_universal.py` or ours: one file per parameter and state under `zero/`."""
    with damage_named(folder):
        return _read_universal(folder)


def _read_universal(folder: Path) -> State:
    model_files = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    if len({file.name.split("mp_rank_")[-1] for file in folder.glob("*_model_states.pt")}) > 1:
        raise CheckpointError(str(folder), ABSENT, "is cut by tensor parallelism", BY_DEEPSPEED)
    if not model_files:
        raise CheckpointError(str(folder), ABSENT, "lacks mp_rank_00_model_states.pt", zero.ANOTHER_SAVE)
    model = torch_zip.load(model_files[0])
    _refuse_unknown(model_files[0], model)
    common = torch_zip.load(folder / "zero" / "optimizer_state.pt")
    shapes = [dict(group) for group in model["param_shapes"]]
    names = {name: tuple(shape) for group in shapes for name, shape in group.items()}
    base = common.get("optimizer_state_dict") or common
    groups = _universal_groups(folder, base, shapes)
    step = _universal_step(folder, base, next(iter(names)))
    found = {name: _universal_states(folder, name, shape) for name, shape in names.items()}
    state = {
        name: {STEP: Literal(step), **{k: v for k, v in one.items() if k != "fp32"}} for name, one in found.items()
    }
    module, shared = model.get("module") or {}, model.get("shared_params") or {}
    tensors: dict[str, Values] = {name: one["fp32"] for name, one in found.items()}
    buffers = frozenset(model.get("buffer_names") or ())
    stage = 3 if model_files[0].name.startswith("zero_pp_rank") else int(common.get("zero_stage", 1))
    for name, value in module.items():
        whole_here = isinstance(value, StoredTensor) and (stage < 3 or name in buffers)
        if name not in tensors and name not in shared and whole_here:
            tensors[name] = stored_tensor(value)
    if stage == 3:
        models = [torch_zip.load(file) for file in model_files]
        tensors |= {name: _flat(part) for name, part in _frozen(model_files[0], models).items()}
    return State(
        "universal", folder, _in_order(tensors, module),
        {name: kept for name, kept in shared.items() if kept in tensors and name not in tensors},
        buffers & frozenset(tensors), Optimizer(groups, state), _number(model.get("global_steps")),
        len(model_files) if stage == 3 else int(model.get("dp_world_size") or 1), stage,
        _compute_dtype([model], module, tensors), {**_kept(model, common), "module_names": tuple(module)},
    )  # fmt: skip


def _frozen(file: Path, models: list[dict[str, Any]]) -> dict[str, zero.Flat]:
    """Stage 3 cuts what is not trained over the model files."""
    found = {}
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        fragments = [model["frozen_param_fragments"][name] for model in models]
        found[name] = zero._checked(file, name, shape, tuple(zero._cut(fragments, 0, torch.Size(shape).numel())))
    return found


def _universal_groups(folder: Path, base: Mapping[str, Any], shapes: list[dict[str, Any]]) -> tuple[Group, ...]:
    """Stage 3's `params` are numbers of flat vectors as in its own folder; 1 and 2 have one vector a group."""
    saved = base.get("param_groups")
    file = folder / "zero" / "optimizer_state.pt"
    if not isinstance(saved, list):
        raise CheckpointError(str(file), ABSENT, "holds no parameter groups", zero.ANOTHER_SAVE)
    return _groups(file, {"param_groups": saved}, shapes)


def _universal_step(folder: Path, base: Mapping[str, Any], name: str) -> torch.Tensor:
    file = folder / "zero" / name / "step.pt"
    found = torch_zip.load(file) if file.is_file() else (base.get("state") or {}).get(0, {}).get(STEP)
    return torch.tensor(_scalar(found), dtype=torch.float32)


def _universal_states(folder: Path, name: str, shape: tuple[int, ...]) -> dict[str, Values]:
    found: dict[str, Values] = {}
    for file in sorted((folder / "zero" / name).glob("*.pt")):
        loaded = torch_zip.load(file)
        tensor = loaded.get("param") if isinstance(loaded, dict) else loaded
        if file.stem == STEP or not isinstance(tensor, StoredTensor):
            continue
        if isinstance(loaded, dict) and loaded.get("ep_is_expert_param"):
            raise CheckpointError(str(file), ABSENT, "belongs to expert parallelism", BY_DEEPSPEED)
        values = stored_tensor(tensor)
        if tensor.numel != torch.Size(shape).numel():
            raise CheckpointError(
                str(file), ABSENT, f"holds {tensor.shape} where {shape} was trained", zero.ANOTHER_SAVE
            )
        found[file.stem] = replace(values, shape=shape) if isinstance(values, Stored) else values
    if "fp32" not in found:
        raise CheckpointError(str(folder / "zero" / name), ABSENT, "lacks fp32.pt", zero.ANOTHER_SAVE)
    return found
