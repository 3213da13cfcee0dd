"""AdamW's parameter groups and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch

from launcher.job.spec import TrainingSection


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and embeddings, none on biases and norms (vectors). Empty groups are left out."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict[str, Any]], training: TrainingSection, device: torch.device) -> torch.optim.AdamW:
    """torch's AdamW, its fused kernel on CUDA."""
    return torch.optim.AdamW(
        groups,
        lr=training.lr,
        betas=(training.beta1, training.beta2),
        eps=training.eps,
        fused=device.type == "cuda",
    )


def learning_rate(training: TrainingSection, step: int, num_steps: int) -> float:
    """Rate of optimiser step `step` (from 0) of `num_steps`: linear warm-up from 0, then down to the minimum.

    The same numbers as `transformers.get_scheduler` gives for linear, cosine and constant_with_warmup.
    """
    if step < training.warmup_steps:
        return training.lr * step / training.warmup_steps
    if training.schedule == "constant":
        return training.lr
    progress = min(1.0, (step - training.warmup_steps) / max(1, num_steps - training.warmup_steps))
    share = 1.0 - progress if training.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return training.lr * (training.min_lr_ratio + (1.0 - training.min_lr_ratio) * share)
