"""What the loop asks of an engine. Two implementations: `torch_engine.py` (DDP, FSDP2) and `zero.py` (DeepSpeed)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from launcher.job.spec import JobSpec
from launcher.plan.values import Plan
from launcher.task import MODEL_INPUTS, Batch, Task, TokenScores
from launcher.task.packed import DOCUMENT_IDS
from launcher.train.chunked import StepLoss
from launcher.train.isolation import Attention


class Engine(Protocol):
    folder_name: str
    """Folder of a checkpoint that holds this engine's native format: `dcp` or `zero`."""
    loss: StepLoss
    """How the loss of a batch is made of the model."""

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

    def score(self, batch: Batch) -> Tensor | TokenScores:
        """What metrics are made of: `evaluate`, or where the loss is made in chunks what is left of its logits."""

    def save(self, folder: Path, with_frozen: bool = True) -> None:
        """Write model and optimiser into `folder`, all ranks together; without frozen parameters where asked."""

    def load(self, folder: Path, with_frozen: bool = True) -> None:
        """Read what `save` wrote, all ranks together."""

    def close(self) -> None:
        """Give back what the engine holds beside memory."""


def make_engine(plan: Plan, spec: JobSpec, model: Any, task: Task, device: Any) -> Engine:
    """The engine of the plan; DeepSpeed is imported only here and only for ZeRO."""
    if plan.engine == "deepspeed":
        from launcher.train.zero import ZeroEngine

        return ZeroEngine(plan, spec, model, task, device)
    from launcher.train.torch_engine import TorchEngine

    return TorchEngine(plan, spec, model, task, device)


COMPUTED_IN = {
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
        self._dtype = COMPUTED_IN[plan.chosen.layout.precision]

    def __call__(self, batch: Batch) -> dict[str, Any]:
        inputs = model_inputs(batch, self._config)
        if self._attention is None or DOCUMENT_IDS not in batch:
            return inputs
        return {**inputs, **self._attention.inputs(batch, self._dtype)}
