"""From a spec to the transformers config and class of its model; used to measure it and to build it.

Imports transformers. Model code from a folder or a hub is never run.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from launcher.errors import ABSENT, ModelError
from launcher.job.spec import JobSpec, ModelSection


def model_config(spec: JobSpec, vocab_size: int | None = None, overrides: dict[str, Any] | None = None) -> Any:
    """The `PretrainedConfig` of the spec's model.

    vocab_size: rows of the embedding of a model with random weights that does not state its own.
    overrides: the task's (`num_labels`, `id2label`).
    Raises `ModelError`: no config, unknown architecture, a key that the architecture does not know.
    """
    if spec.model.path is not None:
        return _with_dropout(config_of_folder(spec.model.path, overrides or {}), spec.model.dropout)
    is_file = isinstance(spec.model.from_config, str)
    config = _config_from_dict(dict(_raw_config(spec.model)), vocab_size, overrides or {}, strict=not is_file)
    return _with_dropout(config, spec.model.dropout)


def _with_dropout(config: Any, dropout: float | None) -> Any:
    """Every key that is one (`hidden_dropout_prob`, `attn_pdrop`, ...) set to this; whole layers are not dropped."""
    if dropout is None:
        return config
    names = [
        name for name in config.to_dict() if "drop" in name and "layerdrop" not in name and "layer_drop" not in name
    ]
    names = [name for name in names if isinstance(getattr(config, name), int | float | None)]
    if not names:
        raise ModelError(
            "model.dropout", dropout, f"has no effect on {config.model_type}, which has none", "leave it out"
        )
    for name in names:
        setattr(config, name, dropout)
    return config


def config_of_folder(path: str, overrides: dict[str, Any], where: str = "model.path") -> Any:
    """Config of a local folder or hub id."""
    from transformers import AutoConfig

    if _looks_local(path) and not Path(path, "config.json").is_file():
        raise ModelError(where, path, "has no config.json", "give a folder that `save_pretrained` wrote, or a hub id")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, **overrides)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            where, path, f"cannot be opened ({in_short(error)})", "give a model folder or hub id"
        ) from None


def _looks_local(path: str) -> bool:
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") != 1


def _raw_config(model: ModelSection) -> dict[str, Any]:
    source = model.from_config
    if isinstance(source, dict):
        return source
    assert source is not None, "ModelSection holds exactly one source"
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        rule = "has no config.json" if Path(source).is_dir() else "is not there"
        raise ModelError("model.from_config", source, rule, "give a config.json, or the keys") from None
    except (OSError, ValueError) as error:
        raise ModelError("model.from_config", source, f"cannot be read ({in_short(error)})", "mend it") from None
    if not isinstance(raw, dict):
        raise ModelError("model.from_config", source, "is not a JSON object", "give a model's config.json")
    return raw


def _config_from_dict(raw: dict[str, Any], vocab_size: int | None, overrides: dict[str, Any], strict: bool) -> Any:
    """strict: refuse keys that the architecture does not know. Published files have keys of other releases."""
    from transformers import AutoConfig

    model_type = raw.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ModelError("model.from_config.model_type", ABSENT, "is missing", "add e.g. `model_type: gpt2`")
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError:
        raise ModelError(
            "model.from_config.model_type",
            model_type,
            "is no architecture of the installed transformers",
            _nearest(model_type),
        ) from None
    if strict:
        _refuse_unknown_keys(raw, default)
    if vocab_size is not None:
        if not hasattr(default, "vocab_size"):
            rule, way_out = (
                "is an architecture without a vocabulary",
                "choose one for text, such as gpt2, llama or bert",
            )
            raise ModelError("model.from_config.model_type", model_type, rule, way_out)
        raw.setdefault("vocab_size", vocab_size)
    try:
        return AutoConfig.for_model(model_type, **{**raw, **overrides})
    except Exception as error:  # noqa: BLE001 - each architecture checks its values with exceptions of its own
        raise ModelError(
            "model.from_config", ABSENT, f"is refused by {model_type} ({in_short(error)})", "mend it"
        ) from None


def _nearest(model_type: str) -> str:
    from transformers import CONFIG_MAPPING

    close = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=1)
    return f"did you mean {close[0]}?" if close else "try gpt2, llama or bert"


def _refuse_unknown_keys(raw: dict[str, Any], default: Any) -> None:
    """A config class takes any key and ignores what it does not know, so a misspelt size would be a silence."""
    known = (
        set(default.to_dict())
        | set(default.attribute_map)
        | {"architectures", "transformers_version", "dtype", "torch_dtype"}
        | {"head_dim"}  # which some modules read though their config does not declare it
    )
    for key in raw:
        if key not in known and not hasattr(default, key):
            close = difflib.get_close_matches(key, sorted(known), n=1)
            way_out = f"did you mean `{close[0]}`?" if close else "leave it out"
            raise ModelError(f"model.from_config.{key}", raw[key], f"is not a key of {default.model_type}", way_out)


def in_short(error: Exception) -> str:
    """The first sentence of what transformers says, on one line; some of its errors are a page."""
    sentence = " ".join(str(error).split()).partition(". ")[0].removesuffix(".") or type(error).__name__
    return sentence if len(sentence) <= 200 else sentence[:197] + "..."


def head_class(name: str) -> Any:
    """`AutoModelForCausalLM` and the like, by name."""
    import transformers

    return getattr(transformers, name)


def blocks_of(model: Any) -> list[Any]:
    """The repeated transformer blocks: the members of the ModuleList that holds most parameters."""
    return list(block_list(model) or ())


def block_list(model: Any) -> Any:
    """The ModuleList of the blocks; None for a model without one."""
    import torch

    lists: list[Any] = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    return max(lists, key=_num_elements, default=None)


def _num_elements(module: Any) -> int:
    """Of its whole parameters, also where ZeRO-3 has cut them up."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def enable_recompute(model: Any) -> None:
    """Keep only the inputs of the blocks for backward (non-reentrant checkpointing, which every engine supports)."""
    model.config.use_cache = False
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its newer name: the old one warns
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
