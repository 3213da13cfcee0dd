"""The model of a spec, in fp32, with the task's head, dropout as its config says: whole on one rank, shapes on the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from transformers.utils import logging as transformers_logging

from launcher.cost.architecture import head_class, model_config
from launcher.cost.trainable import apply_method, new_head
from launcher.data.prepared import PreparedData
from launcher.errors import ModelError
from launcher.job.spec import ADAPTERS, JobSpec
from launcher.task import Task
from launcher.train import quantised
from launcher.train.agree import decide_on_first
from launcher.train.handout import Held, held_by, skeleton
from launcher.train.report import LOG


class Built(NamedTuple):
    model: Any
    frozen_from_base: bool
    """Adapters, and all that is frozen beside them was read from `model.path`: a checkpoint need not hold it."""


def build_model(spec: JobSpec, task: Task, data: PreparedData) -> Built:
    """A transformers model in training mode, a `PeftModel` around it for lora; `requires_grad` as `method` says.

    Whole on the source; on the other ranks its skeleton, whose values an engine is handed (`handout.py`).
    Raises `ModelError` when it does not fit the prepared data, `SpecError` when `method` does not fit it.
    """
    if spec.method.name == "qlora":  # its weights are quantised as they are read, and more than tensors
        model, lost = whole_model(spec, task, data)
        return Built(model, spec.model.path is not None and not lost)
    whole: list[Any] = []

    def build() -> tuple[set[str], list[Held]]:
        model, lost = whole_model(spec, task, data)
        whole.append(model)
        return lost, held_by(model)

    lost, held = decide_on_first(build)
    model = whole[0] if whole else skeleton(lambda: _unread(spec, task, data), held)
    return Built(model, spec.method.name in ADAPTERS and spec.model.path is not None and not lost)


def whole_model(spec: JobSpec, task: Task, data: PreparedData) -> tuple[Any, set[str]]:
    """The model with its values, and the names of frozen parameters that were drawn, not read. Needs no other rank."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(spec.seed)
    model, drawn = _opened(spec, task, data)
    _check_vocabulary(model, data)
    heads = tuple(f"{head}." for head in new_head(model))
    lost = {name for name in drawn if not name.startswith(heads)}  # frozen and drawn; heads are trained, and so saved
    return _adapted(model, spec), lost


def _adapted(model: Any, spec: JobSpec) -> Any:
    model.config.architectures = [type(model).__name__]
    return apply_method(model, spec.method).train()


def _unread(spec: JobSpec, task: Task, data: PreparedData) -> Any:
    """The same modules, without a look at the weights."""
    return _adapted(_from_config(_config(spec, task, data), task), spec)


def _opened(spec: JobSpec, task: Task, data: PreparedData) -> tuple[Any, set[str]]:
    """The model, and the names of the parameters that its weights did not have: drawn at random, such as a new head."""
    config, kind = _config(spec, task, data), head_class(task.auto_class)
    if spec.model.path is None:
        return _from_config(config, task), set()
    model, loaded = kind.from_pretrained(
        spec.model.path,
        config=config,
        dtype=torch.float32,
        trust_remote_code=False,
        output_loading_info=True,
        **quantised.opening(spec),
    )
    quantised.settle(model)
    _say_missing(loaded["missing_keys"])
    return model, set(loaded["missing_keys"])


def _config(spec: JobSpec, task: Task, data: PreparedData) -> Any:
    return model_config(spec, data.vocab_size, {**task.config_overrides, **_token_ids(spec, data)})


def _from_config(config: Any, task: Task) -> Any:
    return head_class(task.auto_class).from_config(config, dtype=torch.float32, trust_remote_code=False)


def _say_missing(names: Iterable[str]) -> None:
    """One line on rank 0's screen, in place of transformers' report on every rank."""
    if missing := sorted(names):
        LOG.warning("the weights have no %s: drawn at random", ", ".join(missing[:8]))


def _token_ids(spec: JobSpec, data: PreparedData) -> dict[str, int]:
    """The tokenizer's special ids; a model with weights keeps its own, but the padding must be the data's."""
    if spec.model.path is not None or data.eos_id is None:
        return {"pad_token_id": data.pad_id}
    return {"pad_token_id": data.pad_id, "bos_token_id": data.eos_id, "eos_token_id": data.eos_id}


def _check_vocabulary(model: Any, data: PreparedData) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if data.vocab_size > rows:
        raise ModelError(
            "data.tokenizer",
            data.vocab_size,
            f"tokens are more than the model's {rows} embeddings",
            "use the model's own tokenizer",
        )
