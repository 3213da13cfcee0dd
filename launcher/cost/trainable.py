"""Which parameters of a model are trained: frozen ones by kind or name, or low-rank adapters beside frozen weights.

Used to measure a model, under fake tensors, and to train it, so that both see the same parameters. Adapters are peft's
(Hu et al. 2021, LoRA; Kalajdzievski 2023, rsLoRA; Liu et al. 2024, DoRA).
"""

from __future__ import annotations

import warnings
from fnmatch import fnmatchcase
from typing import Any

from launcher.cost.architecture import blocks_of, in_short
from launcher.errors import ABSENT, SpecError
from launcher.job.spec import ADAPTERS, MethodSection

ALL_LINEAR = "all-linear"
# What peft calls the tasks; it decides which class opens the saved adapter. None of them: a plain `PeftModel`.
_PEFT_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def apply_method(model: Any, method: MethodSection) -> Any:
    """The model with `requires_grad` as the method asks; for adapters a `PeftModel` around it, adapters in its own dtype.

    Raises `SpecError`: what is to be frozen or adapted is not there, or nothing is left to train.
    """
    if method.name in ADAPTERS:
        return _with_adapters(model, method)
    if method.freeze_all_but_head:
        _freeze_all_but_head(model)
    if method.freeze_embeddings:
        _freeze_embeddings(model)
    _freeze_blocks(model, method.freeze_blocks)
    for pattern in method.freeze:
        _freeze_named(model, pattern)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SpecError("method", ABSENT, "freezes every parameter", "leave something to train")
    return model


def _freeze_all_but_head(model: Any) -> None:
    heads: list[Any] = [getattr(model, name) for name in new_head(model)] or [model.get_output_embeddings()]
    inside = {id(parameter) for head in heads if head is not None for parameter in head.parameters()}
    if inside & {id(parameter) for parameter in model.get_input_embeddings().parameters()}:
        rule = f"has no head of its own to train: that of {type(model).__name__} is tied to the embeddings"
        way_out = "leave it out, or set tie_word_embeddings to false in a model of your own"
        raise SpecError("method.freeze_all_but_head", True, rule, way_out)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in inside)


def _freeze_embeddings(model: Any) -> None:
    """Every table outside the blocks: of tokens, positions and token types."""
    import torch

    in_blocks = {module for block in blocks_of(model) for module in block.modules()}
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module not in in_blocks:
            module.requires_grad_(False)


def _freeze_blocks(model: Any, count: int) -> None:
    blocks = blocks_of(model)
    if count > len(blocks):
        rule = f"is more than the {len(blocks)} blocks of {type(model).__name__}"
        raise SpecError("method.freeze_blocks", count, rule, f"give at most {len(blocks)}")
    for block in blocks[:count]:
        block.requires_grad_(False)


def _freeze_named(model: Any, pattern: str) -> None:
    named = dict(model.named_parameters())
    matches = [parameter for name, parameter in named.items() if fnmatchcase(name, pattern)]
    if not matches:
        rule = f"matches no parameter of {type(model).__name__}"
        raise SpecError("method.freeze", pattern, rule, f"names are like {_typical(list(named))}")
    for parameter in matches:
        parameter.requires_grad_(False)


def _with_adapters(model: Any, method: MethodSection) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=method.r,
        lora_alpha=method.lora_alpha,  # type: ignore[arg-type]  # it divides only
        lora_dropout=method.lora_dropout,
        target_modules=_targets(model, method.target_modules),
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
        task_type=next((task for end, task in _PEFT_TASKS.items() if type(model).__name__.endswith(end)), None),
        modules_to_save=new_head(model) or None,
    )
    try:
        with warnings.catch_warnings():  # peft tells what it settles by itself
            warnings.simplefilter("ignore")
            return get_peft_model(model, config, autocast_adapter_dtype=False)
    except (ValueError, TypeError, NotImplementedError) as error:
        rule, way_out = f"is refused by peft ({in_short(error)})", "change what it names, or method.target_modules"
        raise SpecError("method", ABSENT, rule, way_out) from None


def _targets(model: Any, wanted: str | tuple[str, ...]) -> str | list[str]:
    """Names, whole or their last parts, each of which some layer has; peft would pass over one that fits nothing."""
    if wanted == ALL_LINEAR:
        return ALL_LINEAR
    targets = [wanted] if isinstance(wanted, str) else list(wanted)
    names = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            rule = f"is no layer of {type(model).__name__}"
            raise SpecError("method.target_modules", target, rule, f"names are like {_typical(names)}, or {ALL_LINEAR}")
    return targets


def new_head(model: Any) -> list[str]:
    """Names of the modules that are trained whole beside adapters: a head that pretraining did not make.

    A head that predicts tokens came with the weights, so it is frozen with them.
    """
    if model.get_output_embeddings() is not None:
        return []
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def _typical(names: list[str]) -> str:
    """One from the middle of the model says how its names are built."""
    return names[len(names) // 2]
