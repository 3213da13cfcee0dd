"""The learning rate as a function of the step: transformers' numbers, without its objects or their state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.job.spec import TrainingSection

INVERSE_SQRT_STEPS = 10_000
"""Timescale of `inverse_sqrt` without a warm-up, as transformers has it."""


@dataclass(frozen=True)
class Schedule:
    """The rates of a run of `num_steps` optimiser steps."""

    training: TrainingSection
    num_steps: int
    warmup_steps: int

    @classmethod
    def of(cls, training: TrainingSection, num_steps: int, tokens_per_sample: float) -> Schedule:
        """tokens_per_sample: mean length of what a step counts, for a warm-up that is given in tokens."""
        per_step = tokens_per_sample * training.global_batch_size
        warmup = training.warmup_steps or math.ceil(training.warmup_ratio * num_steps)
        if training.warmup_tokens:
            warmup = math.ceil(training.warmup_tokens / per_step)
        return cls(training, num_steps, warmup)

    def rate(self, step: int) -> float:
        """Of optimiser step `step`, from 0: linear warm-up from 0 to the peak, then what the schedule says."""
        training = self.training
        least = training.min_lr_ratio
        if step < self.warmup_steps:
            start = least if training.schedule == "wsd" else 0.0  # transformers' wsd begins where it ends
            return training.lr * (start + (1.0 - start) * step / self.warmup_steps)
        if training.schedule == "constant":
            return training.lr
        if training.schedule == "inverse_sqrt":
            timescale = self.warmup_steps or INVERSE_SQRT_STEPS
            return training.lr * max(least, 1.0 / math.sqrt((step + timescale - self.warmup_steps) / timescale))
        done = min(1.0, (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps))
        if training.schedule == "lr_range":
            last = max(1, self.num_steps - 1 - self.warmup_steps)
            return training.lr * max(least, 1e-8) ** (1.0 - min(1.0, (step - self.warmup_steps) / last))
        return training.lr * (least + (1.0 - least) * self._left(step, done))

    def _left(self, step: int, done: float) -> float:
        """Share of the way from the peak to the least that is left, `done` of the steps after the warm-up taken."""
        training = self.training
        if training.schedule == "linear":
            return 1.0 - done
        if training.schedule == "polynomial":
            return (1.0 - done) ** training.lr_power
        if training.schedule == "cosine_with_restarts":
            return 0.0 if done >= 1.0 else _cosine((training.lr_cycles * done) % 1.0)
        if training.schedule == "wsd":
            num_decay = math.ceil(training.decay_share * self.num_steps)
            return _fallen(training.decay_shape, (step - (self.num_steps - num_decay)) / max(1, num_decay))
        return _cosine(done)


def _cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _fallen(shape: str, done: float) -> float:
    done = min(1.0, max(0.0, done))
    return {"linear": 1.0 - done, "1-sqrt": 1.0 - math.sqrt(done), "cosine": _cosine(done)}[shape]
