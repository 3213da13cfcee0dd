"""Reads DeepSpeed's own checkpoint folder, ZeRO stages 1, 2 and 3, without DeepSpeed.

The weights are the fp32 masters that the optimizer keeps, laid out as measured with DeepSpeed 0.19.8:

stages 1, 2   each optimizer group is one flat vector cut over the ranks, one parameter after another; `param_shapes`
              (in the model file) gives names and order, `param_alignment_paddings` the gap after each parameter
stage 3       each parameter is cut over the ranks into pieces of ceil(numel / ranks), the last one padded; a rank's
              pieces follow each other through all of its flat groups

What no optimizer holds (frozen parameters, buffers) lies in the model files; tied names are in `shared_params`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from launcher.errors import ABSENT, CheckpointError
from launcher.stored import torch_zip
from launcher.stored.records import StoredBytes, StoredTensor
from launcher.stored.safe_pickle import damage_named
from launcher.stored.tensors import TensorEntry

OPTIM_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILE_3 = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
MODEL_FILE_12 = "mp_rank_00_model_states.pt"
OTHER_LAYOUT = re.compile(r"expp_rank_\d+_.*_optim_states\.pt|layer_\d+.*model_states\.pt|.*expert_\d+_.*\.pt")
ANOTHER_SAVE = "take a checkpoint that every rank finished, or copy the missing files from where it was written"
NOT_ELSEWHERE = "save without NVMe offload and without MiCS or hpZ"


@dataclass(frozen=True)
class Piece:
    """A run of elements of one stored flat vector."""

    stored: StoredTensor
    start: int
    numel: int


@dataclass(frozen=True)
class Flat:
    """A parameter as pieces, to be laid one after another."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def read(self) -> torch.Tensor:
        flat, at = torch.empty(prod(self.shape), dtype=self.dtype), 0
        for piece in self.pieces:
            piece.stored.read_run(flat[at : at + piece.numel], piece.start)
            at += piece.numel
        return flat.reshape(self.shape)


class ZeroSource:
    """The weights in one tag folder, e.g. `global_step10/`; a `TensorSource`."""

    def __init__(self, folder: Path) -> None:
        with damage_named(folder):
            self._open(folder)

    def _open(self, folder: Path) -> None:
        files = _optim_files(folder)
        states = [_optimizer_state(file) for file in files]
        self.stage = int(states[0]["zero_stage"])
        _check_world(folder, states, len(files))
        self.models = _model_states(folder, self.stage, len(files))
        parts = _parts_12(files, states, self.models) if self.stage < 3 else _parts_3(files, states, self.models)
        model = self.models[0]
        self.parts: dict[str, Flat | StoredTensor] = {**parts, **_whole_tensors(model, self.stage, parts)}
        self.tensors = {name: TensorEntry(tuple(part.shape), part.dtype) for name, part in self.parts.items()}
        shared: dict[str, str] = model.get("shared_params") or {}
        self.aliases = {name: kept for name, kept in shared.items() if kept in self.parts and name not in self.parts}

    def read(self, name: str) -> torch.Tensor:
        return self.parts[name].read()

    def records(self) -> list[StoredBytes]:
        """Every stored record that the weights need, once."""
        return list(dict.fromkeys(record for part in self.parts.values() for record in _records(part)))


def _optim_files(folder: Path) -> list[Path]:
    """The optimizer files in the order of the ranks."""
    names = sorted(path.name for path in folder.iterdir())
    if strange := [name for name in names if OTHER_LAYOUT.fullmatch(name)]:
        raise CheckpointError(
            str(folder), strange[0], "belongs to pipeline or expert parallelism", "use DeepSpeed's ds_to_universal.py"
        )
    ranks = {match: folder / match[0] for name in names if (match := OPTIM_FILE.fullmatch(name))}
    if tensor_parallel := [match[0] for match in ranks if int(match[2])]:
        raise CheckpointError(
            str(folder), tensor_parallel[0], "belongs to tensor parallelism", "use DeepSpeed's ds_to_universal.py"
        )
    if not ranks:
        raise CheckpointError(str(folder), ABSENT, "holds no *_optim_states.pt file", ANOTHER_SAVE)
    return [ranks[match] for match in sorted(ranks, key=lambda match: int(match[1]))]


def _optimizer_state(file: Path) -> dict[str, Any]:
    loaded = torch_zip.load(file)
    state = loaded.get("optimizer_state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or "zero_stage" not in state:
        raise CheckpointError(
            str(file), ABSENT, "holds no ZeRO optimizer state", "name a folder saved with ZeRO 1 to 3"
        )
    if "ds_zero_partition_groups" in state:
        raise CheckpointError(
            str(file), ABSENT, "is cut over several groups of ranks (experts)", "use DeepSpeed's ds_to_universal.py"
        )
    return state


def _check_world(folder: Path, states: list[dict[str, Any]], found: int) -> None:
    """A rank that never wrote its file, or files left by a larger run, would shift every parameter."""
    count = states[0]["partition_count"]
    expected = max(count) if isinstance(count, list) else count
    present = {int(match[1]) for path in folder.iterdir() if (match := OPTIM_FILE.fullmatch(path.name))}
    absent = sorted(set(range(expected)) - present)
    if absent:
        rule = f"was saved by {expected} ranks, but the optimizer file of rank {absent[0]} is missing"
        raise CheckpointError(str(folder), ABSENT, rule, ANOTHER_SAVE)
    if found != expected:
        rule = f"was saved by {expected} ranks, but holds {found} optimizer files"
        raise CheckpointError(str(folder), ABSENT, rule, "remove the files of the other run")
    if len({int(state["zero_stage"]) for state in states}) > 1:
        raise CheckpointError(str(folder), ABSENT, "mixes files of several ZeRO stages", "remove the files of one run")


def _model_states(folder: Path, stage: int, ranks: int) -> list[dict[str, Any]]:
    """The model files: one for stages 1 and 2, one per rank for stage 3 (each with its piece of the frozen ones)."""
    names = [MODEL_FILE_12] if stage < 3 else [MODEL_FILE_3.format(rank) for rank in range(ranks)]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(str(folder), ABSENT, f"lacks {missing[0]}", ANOTHER_SAVE)
    states = [torch_zip.load(folder / name) for name in names]
    if any(not isinstance(state, dict) or "param_shapes" not in state for state in states):
        raise CheckpointError(
            str(folder / names[0]), ABSENT, "holds no parameter shapes", "save it with DeepSpeed >= 0.5"
        )
    if states[0].get("ds_autoep_layers") or states[0].get("autoep_layers"):
        raise CheckpointError(
            str(folder), ABSENT, "holds expert-parallel layers (AutoEP)", "use DeepSpeed's ds_to_universal.py"
        )
    return states


def _masters(files: list[Path], states: list[dict[str, Any]], key: str, count: int) -> list[list[StoredTensor]]:
    """Each rank's flat fp32 vectors; every rank has as many as the first, and none is kept elsewhere (NVMe)."""
    for file, state in zip(files, states, strict=True):
        vectors = state.get(key)
        if (
            not isinstance(vectors, list)
            or len(vectors) != count
            or not all(isinstance(v, StoredTensor) for v in vectors)
        ):
            raise CheckpointError(str(file), key, f"does not hold {count} flat fp32 vectors", NOT_ELSEWHERE)
    return [state[key] for state in states]


def _parts_12(files: list[Path], states: list[dict[str, Any]], models: list[dict[str, Any]]) -> dict[str, Flat]:
    """Stages 1 and 2: walk each group's vector, which runs from the first rank's piece through the last one's."""
    parts: dict[str, Flat] = {}
    groups = _masters(files, states, "single_partition_of_fp32_groups", len(models[0]["param_shapes"]))
    paddings = states[0].get("param_alignment_paddings")
    for group, shapes in enumerate(models[0]["param_shapes"]):
        vectors = [masters[group] for masters in groups]
        gaps = paddings[group] if paddings else [0] * len(shapes)
        at = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            pieces = tuple(_cut(vectors, at, prod(shape)))
            parts[name] = _checked(files[0], name, shape, pieces)
            at += prod(shape) + gap
        # Trailing padding is below 2 x ranks elements (DeepSpeed aligns a group to that), or was cut off at saving.
        _check_consumed(files[0], at, sum(vector.numel for vector in vectors), 2 * len(states))
    return parts


def _parts_3(files: list[Path], states: list[dict[str, Any]], models: list[dict[str, Any]]) -> dict[str, Flat]:
    """Stage 3: every parameter takes the same range of each rank's vectors; the last ranks' ends are padding."""
    parts: dict[str, Flat] = {}
    groups = _masters(files, states, "fp32_flat_groups", len(states[0].get("fp32_flat_groups") or ()))
    at, ranks = 0, len(states)
    for name, shape in ((name, shape) for shapes in models[0]["param_shapes"] for name, shape in shapes.items()):
        step, left = -(-prod(shape) // ranks), prod(shape)
        pieces: list[Piece] = []
        for masters in groups:
            pieces += _cut(masters, at, min(step, left))
            left -= min(step, left)
        parts[name] = _checked(files[0], name, shape, tuple(pieces))
        at += step
    _check_consumed(files[0], at, sum(vector.numel for vector in groups[0]), 1)
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        fragments = [model["frozen_param_fragments"][name] for model in models]
        parts[name] = _checked(files[0], name, shape, tuple(_cut(fragments, 0, prod(shape))))
    return parts


def _cut(vectors: list[StoredTensor], start: int, numel: int) -> Iterator[Piece]:
    """Elements `start` to `start + numel` of the vectors laid end to end."""
    for vector in vectors:
        here = min(numel, vector.numel - start)
        if start < vector.numel and here > 0:
            yield Piece(vector, start, here)
            start, numel = start + here, numel - here
        start = max(0, start - vector.numel)


def _checked(file: Path, name: str, shape: Any, pieces: tuple[Piece, ...]) -> Flat:
    if sum(piece.numel for piece in pieces) != prod(shape):
        rule = f"ends before parameter {name} {tuple(shape)} does"
        raise CheckpointError(str(file), ABSENT, rule, NOT_ELSEWHERE)
    dtype = pieces[0].stored.dtype if pieces else torch.float32
    return Flat(tuple(shape), dtype, pieces)


def _check_consumed(file: Path, consumed: int, available: int, align: int) -> None:
    if -(-consumed // align) != -(-available // align):
        rule = f"holds {available} elements where the parameter shapes ask for {consumed}"
        raise CheckpointError(str(file), ABSENT, rule, NOT_ELSEWHERE)


def _whole_tensors(model: dict[str, Any], stage: int, parts: dict[str, Flat]) -> dict[str, StoredTensor]:
    """Tensors that the model file holds whole: buffers; and in stages 1 and 2 everything that is not trained.

    (Stage 1 lists no frozen parameters at all: they are only found as what is left over in `module`.)
    """
    module, shared = model.get("module") or {}, model.get("shared_params") or {}
    buffers = set(model.get("buffer_names") or ())
    names = module if stage < 3 else [name for name in module if name in buffers]
    return {name: module[name] for name in names if name not in parts and name not in shared}


def _records(part: Flat | StoredTensor) -> list[StoredBytes]:
    return [part.record] if isinstance(part, StoredTensor) else [piece.stored.record for piece in part.pieces]
