"""A `State` to a folder that plain transformers opens, its names held against the model of its config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.stored.state import State
from launcher.stored.tensors import TensorEntry
from launcher.stored.values import Values
from tools.conversion.altering import prune
from tools.conversion.options import Options
from tools.conversion.placing import Finish
from tools.conversion.quantizing import quantize
from tools.formats.files import Planned
from tools.formats.hf import read_config, write_json, write_side_files
from tools.formats.write_hf import checksums_of, index_of, plan_hf


@dataclass(frozen=True)
class ModelPlan:
    """What a folder will hold."""

    values: Mapping[str, Values]
    entries: Mapping[str, TensorEntry]
    files: list[Planned]
    finish: Finish
    architecture: str | None
    """None: weights alone."""

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries.values())


def plan_model(state: State, config_dir: Path, options: Options) -> ModelPlan:
    """Raises `CheckpointError` when `from_pretrained` would miss a tensor or meet one that it does not know."""
    from tools.formats.expected import (
        check_tied,
        choose,
        expected_tensors,
    )  # transformers, which weights alone need not

    config = read_config(config_dir)
    expected = expected_tensors(config_dir, config)
    if options.prune is not None:
        state = prune(state, options.prune, dict(expected.linears))
    chosen = choose(state.tensors, state.aliases, expected, state.where)
    check_tied(state.tensors, chosen, expected, state.where)
    values = {name: state.tensors[read] for name, read in chosen.items()}
    dtype = main_dtype(written_as(values, options.torch_dtype))
    if options.quantize is not None:
        values, told = quantize(values, expected.linears, options.quantize, expected.head)
        config = {**config, "quantization_config": told}
    entries = written_as(values, options.torch_dtype)
    files = plan_hf(values, entries, options.shard_bytes)

    def finish(folder: Path, crcs: Mapping[str, Sequence[int]]) -> None:
        _write_weights_files(folder, files, crcs)
        write_side_files(config_dir, config, dtype, folder)
        _write_generation(folder, expected.generation_config)

    return ModelPlan(values, entries, files, finish, expected.architecture)


def plan_weights(state: State, options: Options) -> ModelPlan:
    """By the checkpoint's own names; tied ones once."""
    entries = written_as(state.tensors, options.torch_dtype)
    files = plan_hf(state.tensors, entries, options.shard_bytes)

    def finish(folder: Path, crcs: Mapping[str, Sequence[int]]) -> None:
        _write_weights_files(folder, files, crcs)

    return ModelPlan(state.tensors, entries, files, finish, None)


def _write_weights_files(folder: Path, files: Sequence[Planned], crcs: Mapping[str, Sequence[int]]) -> None:
    for found in (index_of(files), checksums_of(files, crcs)):
        if found is not None:
            write_json(folder / found[0], found[1])


def _write_generation(folder: Path, generation: dict[str, Any] | None) -> None:
    if generation is not None and not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", generation)


def written_as(tensors: Mapping[str, Values], dtype: torch.dtype | None) -> dict[str, TensorEntry]:
    """After the cast, which is for floating tensors only: an index or a mask keeps its type."""
    found = {}
    for name, values in tensors.items():
        kept = values.dtype if dtype is None or not values.dtype.is_floating_point else dtype
        found[name] = TensorEntry(values.shape, kept)
    return found


def main_dtype(entries: Mapping[str, TensorEntry]) -> torch.dtype:
    """The floating dtype that most bytes are in."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in entries.values():
        sizes[entry.dtype] += entry.num_bytes * entry.dtype.is_floating_point
    return sizes.most_common(1)[0][0]
