"""Runs with adapters: the checkpoint's tensors as peft's own folder, or merged into the weights they belong to.

Names, shapes and arithmetic are peft's: the adapted model is built as training built it, and asked. `MergedSource`
holds the whole model in memory, in fp32; `tools/conversion/merging.py` needs it only where names differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.state import State
from launcher.stored.tensors import TensorEntry
from launcher.stored.values import whole
from launcher.train.base import ADAPTER, check_base_files

OPENERS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
}
"""peft's name of a task -> its class that opens base and adapter together."""
ANOTHER_SAVE = "take a checkpoint that every rank finished"


@dataclass(frozen=True)
class Adapted:
    """The tensors of a checkpoint with adapters, and the model they belong to, built without memory."""

    model: Any
    tensors: dict[str, torch.Tensor]
    """What was trained, by peft's names in the model."""

    def folder_tensors(self) -> dict[str, torch.Tensor]:
        """By the names of an `adapter_model.safetensors`."""
        from peft import get_peft_model_state_dict

        named = get_peft_model_state_dict(self.model, state_dict=dict(self.tensors), save_embedding_layers=False)
        return {name: tensor.contiguous() for name, tensor in named.items()}


def read_adapted(source: State, config_dir: Path, where: str) -> Adapted:
    """Raises `CheckpointError` when a tensor that was trained is missing or has another shape."""
    with torch.device("meta"):
        model = adapted_model(model_class(config_dir)(model_settings(config_dir)), config_dir / ADAPTER)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    return Adapted(model, _read(source, trained, where))


def write_adapter(
    adapted: Adapted, base: Mapping[str, Any], folder: Path, dtype: torch.dtype | None
) -> tuple[int, int]:
    """`adapter_config.json` and `adapter_model.safetensors`; how many tensors, and their bytes."""
    tensors = {name: tensor.to(dtype) if dtype else tensor for name, tensor in adapted.folder_tensors().items()}
    config = adapted.model.peft_config["default"]
    config.inference_mode = True
    config.base_model_name_or_path = str(base["path"] if not Path(str(base["path"])).exists() else base["folder"])
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class MergedSource:
    """The tensors of the model with its adapters merged into it; a `TensorSource` in memory."""

    def __init__(self, source: State, config_dir: Path, base: Mapping[str, Any] | None, where: str) -> None:
        kind, settings = model_class(config_dir), model_settings(config_dir)
        if base is None:
            model = adapted_model(kind(settings), config_dir / ADAPTER)
            needed = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        else:
            model = adapted_model(_base_model(kind, settings, check_base_files(dict(base))), config_dir / ADAPTER)
            needed = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        model.load_state_dict(_read(source, needed, where), strict=False)
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except ValueError as error:  # peft's word on adapters that are not finite
            raise CheckpointError(where, ABSENT, f"cannot be merged ({error})", "take an earlier step") from None
        self._state = dict(merged.state_dict())
        self.tensors = {name: TensorEntry(tuple(value.shape), value.dtype) for name, value in self._state.items()}
        self.aliases: dict[str, str] = {}

    def read(self, name: str) -> torch.Tensor:
        return self._state[name]


def _base_model(kind: Any, settings: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, config=settings, dtype=torch.float32, trust_remote_code=False)


def model_settings(config_dir: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(config_dir, trust_remote_code=False)


def model_class(config_dir: Path) -> Any:
    return getattr(transformers, model_settings(config_dir).architectures[0])


def adapted_model(model: Any, adapter_dir: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():  # peft tells what it settles by itself
        warnings.simplefilter("ignore")
        config = LoraConfig.from_pretrained(str(adapter_dir))
        return get_peft_model(model, config, autocast_adapter_dtype=False)


def file_names(model: Any) -> dict[str, str]:
    """Name in an `adapter_model.safetensors` -> name in the adapted model."""
    from peft import get_peft_model_state_dict

    parameters = dict(model.named_parameters())
    named = get_peft_model_state_dict(model, state_dict=dict(parameters), save_embedding_layers=False)
    by_identity = {id(parameter): name for name, parameter in parameters.items()}
    return {name: by_identity[id(parameter)] for name, parameter in named.items()}


def _read(source: State, needed: Mapping[str, tuple[int, ...]], where: str) -> dict[str, torch.Tensor]:
    """No tensor may be missing, or shorter than the model's: an engine that gathered too little would lose rows."""
    for name, shape in needed.items():
        entry = source.tensors.get(name) or source.tensors.get(source.aliases.get(name, name))
        if entry is None or entry.shape != shape:
            found = "is missing" if entry is None else f"has shape {entry.shape} where {shape} was trained"
            raise CheckpointError(where, name, found, ANOTHER_SAVE)
    return {name: whole(source.tensors[source.aliases.get(name, name)]) for name in needed}
