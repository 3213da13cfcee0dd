"""The model of a spec, built the same on every rank: in fp32, with the task's head, dropout as its config says."""

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
from launcher.train.report import LOG


class Built(NamedTuple):
    model: Any
    frozen_from_base: bool
    """Adapters, and all that is frozen beside them was read from `model.path`: a checkpoint need not hold it."""


def build_model(spec: JobSpec, task: Task, data: PreparedData) -> Built:
    """A transformers model in training mode, a `PeftModel` around it for lora; `requires_grad` as `method` says.

    Raises `ModelError` when it does not fit the prepared data, `SpecError` when `method` does not fit it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(spec.seed)
    model, drawn = _opened(spec, task, data)
    _check_vocabulary(model, data)
    model.config.architectures = [type(model).__name__]
    heads = tuple(f"{head}." for head in new_head(model))
    adapted = apply_method(model, spec.method).train()
    lost = {name for name in drawn if not name.startswith(heads)}  # frozen and drawn; heads are trained, and so saved
    return Built(adapted, spec.method.name in ADAPTERS and spec.model.path is not None and not lost)


def _opened(spec: JobSpec, task: Task, data: PreparedData) -> tuple[Any, set[str]]:
    """The model, and the names of the parameters that its weights did not have: drawn at random, such as a new head."""
    config = model_config(spec, data.vocab_size, {**task.config_overrides, **_token_ids(spec, data)})
    kind = head_class(task.auto_class)
    if spec.model.path is None:
        return kind.from_config(config, dtype=torch.float32, trust_remote_code=False), set()
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
