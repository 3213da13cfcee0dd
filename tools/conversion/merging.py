"""Adapters merged into the weights they belong to, one layer in memory at a time; the arithmetic is peft's.

Where a base model's file names its tensors otherwise than the model does (checkpoints older than their library), it is
opened by transformers and merged whole, in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.state import State
from launcher.stored.values import Computed, Ledger, Literal, Values, whole
from launcher.train.base import ADAPTER, check_base_files
from tools.adapter import MergedSource, adapted_model, file_names, model_class, model_settings
from tools.formats.expected import Expected, expected_tensors
from tools.formats.hf import read_config
from tools.formats.read_hf import read_hf

ROOT = "base_model.model"
"""Where peft puts the model that it adapts."""


def merged(state: State, config_dir: Path, base: Mapping[str, Any] | None) -> State:
    """The model's tensors, by its own names. Raises `CheckpointError`."""
    folder = None if base is None else check_base_files(dict(base))
    try:
        return _streamed(state, config_dir, config_dir / ADAPTER, folder)
    except KeyError:  # a name that the base's file does not have
        source = MergedSource(state, config_dir, base, state.where)
        tensors = {name: Literal(source.read(name)) for name in source.tensors}
        return replace(state, tensors=tensors, aliases={}, optimizer=None, buffers=None)


def peft_base(state: State, given: Path | None) -> Path:
    """The folder of the model that a PEFT folder adapts. Raises `CheckpointError`."""
    file = state.path / "adapter_config.json"
    try:
        told = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        rule = "names no base_model_name_or_path"
        raise CheckpointError(str(file), ABSENT, rule, "name the base model's folder: --base DIR") from None
    folder = given or Path(str(told))
    if not (folder / "config.json").is_file():
        rule = "is not the folder of a model, and the adapters' base is needed"
        raise CheckpointError(str(file), str(folder), rule, "name the base model's folder: --base DIR")
    return folder


def merged_peft(state: State, base_folder: Path) -> State:
    """The same for a PEFT folder and the folder of its base model."""
    with torch.device("meta"):
        model = adapted_model(model_class(base_folder)(model_settings(base_folder)), state.path)
    named = {kept: state.tensors[name] for name, kept in file_names(model).items() if name in state.tensors}
    if len(named) != len(state.tensors):
        unknown = next(name for name in state.tensors if state.tensors[name] not in named.values())
        rule = f"does not fit: the model has no adapter {unknown}"
        raise CheckpointError(state.where, str(base_folder), rule, "name the base that it was trained on: --base DIR")
    try:
        return _streamed(replace(state, tensors=named), base_folder, state.path, base_folder)
    except KeyError as error:
        rule = f"lacks {error.args[0]}"
        raise CheckpointError(str(base_folder), ABSENT, rule, "open and save it once with transformers") from None


def _streamed(state: State, config_dir: Path, adapter_dir: Path, base_folder: Path | None) -> State:
    """Raises `KeyError` with the name of a tensor that neither the checkpoint nor the base's files have."""
    expected = expected_tensors(config_dir, read_config(config_dir))
    with torch.device("meta"):
        model = adapted_model(model_class(config_dir)(model_settings(config_dir)), adapter_dir)
    base = None if base_folder is None else read_hf(base_folder)
    find = _Finder(state, base, expected, str(getattr(model.base_model.model, "base_model_prefix", "")))
    tensors = {name: _tensor(model, name, find, state.where) for name in expected.shapes}
    return replace(state, tensors=tensors, aliases={}, optimizer=None, buffers=None)


class _Finder:
    """Where a tensor of the adapted model lies: in the checkpoint, or in the base's files."""

    def __init__(self, state: State, base: State | None, expected: Expected, prefix: str) -> None:
        self.state, self.base, self.expected, self.prefix = state, base, expected, prefix

    def __call__(self, name: str) -> Values:
        found = self.state.tensors.get(self.state.aliases.get(name, name))
        return found if found is not None else self._in_base(name.removeprefix(f"{ROOT}."))

    def _in_base(self, name: str) -> Values:
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        for one in (plain, *self.expected.other_names.get(plain, ())):
            for known in (one, one.removeprefix(f"{self.prefix}.")):
                if self.base is not None and known in self.base.tensors:
                    return self.base.tensors[known]
        raise KeyError(plain)


def _tensor(model: Any, name: str, find: Callable[[str], Values], where: str) -> Values:
    module_name, _, attribute = name.rpartition(".")
    inner, module = _inside(model.base_model.model, module_name)
    if isinstance(module, BaseTunerLayer):
        shape = getattr(module.get_base_layer(), attribute).shape
        parts = {part: find(f"{inner}.{part}") for part, _ in module.named_parameters()}  # type: ignore[attr-defined]
        return Computed(
            shape, torch.float32, lambda ledger: _merge(module, parts, attribute, where, ledger), parts.values()
        )
    return find(f"{inner}.{attribute}")


def _inside(model: Any, module_name: str) -> tuple[str, Any]:
    """(name in the adapted model, module), through the wrappers of modules that were trained whole."""
    name, module = ROOT, model
    for part in module_name.split("."):
        module, name = getattr(module, part), f"{name}.{part}"
        if isinstance(module, ModulesToSaveWrapper):
            module, name = module.modules_to_save["default"], f"{name}.modules_to_save.default"
    return name, module


def _merge(layer: Any, parts: Mapping[str, Values], attribute: str, where: str, ledger: Ledger | None) -> torch.Tensor:
    """peft's own merge of one layer, whose tensors are there only while it takes."""
    bare = dict(layer.named_parameters())
    try:
        for part, values in parts.items():
            _put(layer, part, torch.nn.Parameter(whole(values, ledger).float(), requires_grad=False))
        layer.merge(safe_merge=True)
        result: torch.Tensor = getattr(layer.get_base_layer(), attribute).data
    except ValueError as error:  # peft's word on adapters that are not finite
        raise CheckpointError(where, ABSENT, f"cannot be merged ({error})", "take an earlier step") from None
    finally:
        layer.merged_adapters.clear()
        for part, empty in bare.items():
            _put(layer, part, empty)
    return result


def _put(layer: Any, part: str, parameter: torch.nn.Parameter) -> None:
    owner_name, _, attribute = part.rpartition(".")
    owner = layer.get_submodule(owner_name)
    if isinstance(owner, torch.nn.ParameterDict):
        owner[attribute] = parameter
    else:
        setattr(owner, attribute, parameter)
