"""Which tensors plain transformers expects in a model's folder, asked of the model itself, built without memory."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.values import Values, same_values

# What configurations and constructors of transformers raise for values they cannot use.
BAD_CONFIG = (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError, StrictDataclassError)


@dataclass(frozen=True)
class Expected:
    """The names that `save_pretrained` would write, in its order."""

    architecture: str
    shapes: Mapping[str, tuple[int, ...]]
    other_names: Mapping[str, tuple[str, ...]]
    """A written name -> further names of the same (tied) tensor, which are not written."""
    ignored: tuple[str, ...]
    """Patterns of names that may be in a checkpoint and are left out."""
    generation_config: dict[str, Any] | None
    """What `generate` starts from, if the model can generate."""
    buffers: frozenset[str] = frozenset()
    """The written names that are no parameters."""
    head: str | None = None
    """The output layer's name."""
    linears: Mapping[str, bool] = field(default_factory=dict)
    """Matrices of linear layers but the output's -> whether inputs come first (Conv1D)."""


def expected_tensors(config_dir: Path, config: Mapping[str, Any]) -> Expected:
    """Builds the model of `config_dir` on the meta device (no memory, no weights, never code from the folder)."""
    architecture = config["architectures"][0]
    file = str(config_dir / "config.json")
    kind = getattr(transformers, architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{file}: architectures[0]", architecture, f"is no model class of transformers {transformers.__version__}",
            "name a folder with the right config.json: --config DIR",
        )  # fmt: skip
    try:
        settings = transformers.AutoConfig.from_pretrained(config_dir, trust_remote_code=False)
        with torch.device("meta"):
            model = kind(settings)
    except BAD_CONFIG as error:
        rule = f"cannot be opened by transformers {transformers.__version__} ({str(error).partition(chr(10))[0]})"
        raise CheckpointError(file, ABSENT, rule, "name a folder with the right config.json: --config DIR") from error
    model.tie_weights()
    return _describe(architecture, model)


def _describe(architecture: str, model: Any) -> Expected:
    groups: dict[int, list[str]] = defaultdict(list)
    live = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    state = model.state_dict()
    for name in state:
        groups[id(live[name])].append(name)
    tied = set(model.all_tied_weights_keys or ())
    dropped = set(model._keys_to_ignore_on_save or ())
    kept = {min(names, key=lambda name: name in tied): names for names in groups.values() if not dropped & {*names}}
    return Expected(
        architecture,
        {name: tuple(state[name].shape) for name in kept},
        {name: tuple(other for other in names if other != name) for name, names in kept.items()},
        (*(model._keys_to_ignore_on_load_unexpected or ()), *(f"^{re.escape(name)}$" for name in sorted(dropped))),
        model.generation_config.to_diff_dict() if model.can_generate() else None,
        frozenset(kept) & {name for name, _ in model.named_buffers(remove_duplicate=False)},
        next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None),
        {name: is_transposed for name, is_transposed in _linears(model) if name in kept},
    )


def _linears(model: Any) -> Iterator[tuple[str, bool]]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is not head and isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D):
            yield f"{name}.weight", not isinstance(module, torch.nn.Linear)


def choose(tensors: Mapping[str, Values], aliases: Mapping[str, str], expected: Expected, path: str) -> dict[str, str]:
    """Name to write -> name to read, so that `from_pretrained` misses nothing and meets nothing it does not know."""
    known = {**{name: name for name in tensors}, **aliases}
    chosen, missing = {}, []
    for name in expected.shapes:
        found = next((known[one] for one in (name, *expected.other_names[name]) if one in known), None)
        if found is None:
            missing.append(name)
        else:
            chosen[name] = found
    written = {*expected.shapes, *(other for names in expected.other_names.values() for other in names)}
    unknown = [name for name in known if name not in written and not _matches(name, expected.ignored)]
    _refuse(path, expected.architecture, "lacks", missing)
    _refuse(path, expected.architecture, "holds, unknown to the model,", unknown)
    _check_shapes(path, tensors, chosen, expected)
    return chosen


def check_tied(tensors: Mapping[str, Values], chosen: Mapping[str, str], expected: Expected, path: str) -> None:
    """Tied names that the checkpoint stores twice must hold the same values, since only one of them is written."""
    for name, read in chosen.items():
        for other in expected.other_names[name]:
            if other in tensors and other != read and not same_values(tensors[read], tensors[other]):
                rule = f"does not fit: the config ties {other} to {name}, their values differ"
                raise CheckpointError(path, expected.architecture, rule, 'set "tie_word_embeddings": false')


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


WAY_OUT = "name the config of the model that was trained: --config DIR"


def _refuse(path: str, architecture: str, verb: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise CheckpointError(path, architecture, f"does not fit: the checkpoint {verb} {shown}", WAY_OUT)


def _check_shapes(path: str, tensors: Mapping[str, Values], chosen: Mapping[str, str], expected: Expected) -> None:
    for name, source in chosen.items():
        if tensors[source].shape != expected.shapes[name]:
            rule = f"does not fit: {name} is {tensors[source].shape}, the config asks for {expected.shapes[name]}"
            raise CheckpointError(path, expected.architecture, rule, WAY_OUT)
