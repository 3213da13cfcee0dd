"""What the loop asks of an engine. Two implementations: `torch_engine.py` (DDP, FSDP2) and `zero.py` (DeepSpeed)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from launcher.job.spec import JobSpec
from launcher.plan.values import Plan
from launcher.stored.state import State
from launcher.task import MODEL_INPUTS, Batch, Task
from launcher.task.packed import DOCUMENT_IDS
from launcher.train.isolation import Attention


class Engine(Protocol):
    folder_name: str
    """Folder of a checkpoint that holds this engine's native format: `dcp` or `zero`."""

    def accumulate(self, batch: Batch, scale: float, is_last: bool) -> Tensor:
        """Forward and backward of `scale * sum of losses`; returns the unscaled sum, detached.

        Engines average gradients over ranks, so the caller's scale holds the number of ranks. is_last: the optimiser
        steps after this micro-batch.
        """

    @property
    def num_skipped(self) -> int:
        """Steps so far, before a resume too, that updated nothing because a scaled fp16 gradient overflowed."""

    @property
    def first_nonfinite(self) -> str | None:
        """After a step whose gradient was not finite: a parameter of this rank in whose gradient it was seen, if known."""

    def step(self, lr: float, number: int) -> float | None:
        """Clip, update, clear, after `number` such steps; returns the global gradient norm before clipping, None when the step was skipped."""

    def evaluate(self, batch: Batch) -> Tensor:
        """Logits without dropout or gradient."""

    @property
    def can_copy(self) -> bool:
        """Whether all state lies in memory, so that a save can be written from a copy of it."""

    def staged(self, folder: Path, with_frozen: bool, copy: bool) -> Callable[[Any], None]:
        """What writes model and optimiser, as they are now, into `folder`: all ranks call it, with a process group.

        copy: the state is copied to host memory first, so that the call may come while training goes on; otherwise it
        must come at once. Without frozen parameters where asked.
        """

    def save(self, folder: Path, with_frozen: bool = True) -> None:
        """`staged`, without a copy, and written."""

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each parameter that is updated, by name, whole."""

    def has_plain_optimizer(self) -> bool:
        """Whether every other engine could read the optimiser's state."""

    def load(self, folder: Path, with_frozen: bool = True) -> None:
        """Read what `save` wrote, all ranks together."""

    def adopt(self, state: State, step: int, with_frozen: bool = True, with_optimizer: bool = True) -> None:
        """Take over what any engine saved on any number of ranks, by name, all ranks together; `step` is the run's.

        Raises `CheckpointError` where something does not fit.
        """

    def close(self) -> None:
        """Give back what the engine holds beside memory."""


def make_engine(plan: Plan, spec: JobSpec, model: Any, task: Task, device: Any) -> Engine:
    """The engine of the plan; DeepSpeed is imported only here and only for ZeRO."""
    if plan.engine == "deepspeed":
        from launcher.train.zero import ZeroEngine

        return ZeroEngine(plan, spec, model, task, device)
    from launcher.train.torch_engine import TorchEngine

    return TorchEngine(plan, spec, model, task, device)


_COMPUTED_IN = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "pure_bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def model_inputs(batch: Batch, config: Any) -> dict[str, Any]:
    """What the forward of a model with this config gets: the loss is the task's, so no targets.

    Which text of a pair a token is from is said only to a model that learns it, as BERT does: RoBERTa and ModernBERT have
    no embedding for it, Llama no such argument, and GPT-2 would take it for a token.
    """
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    if not has_segments(config):
        inputs.pop("token_type_ids", None)
    return inputs


def has_segments(config: Any) -> bool:
    return (getattr(config, "type_vocab_size", 0) or 0) > 1


class ModelInputs:
    """`model_inputs` of one run: packed rows get a mask that keeps their documents apart."""

    def __init__(self, plan: Plan, spec: JobSpec, model: Any) -> None:
        self._config = model.config
        self._attention = Attention.of(model) if spec.data.packing == "best_fit" else None
        self._dtype = _COMPUTED_IN[plan.chosen.layout.precision]

    def __call__(self, batch: Batch) -> dict[str, Any]:
        inputs = model_inputs(batch, self._config)
        if self._attention is None or DOCUMENT_IDS not in batch:
            return inputs
        return {**inputs, **self._attention.inputs(batch, self._dtype)}
