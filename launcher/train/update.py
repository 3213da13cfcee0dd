"""What torch's engines do once per step: penalty, clipping, the optimisers' update, the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

from launcher.job.spec import JobSpec
from launcher.train.averages import Average
from launcher.train.optim import decays, depths, make_optimizers


class Update:
    """Of the trained parameters of a model, whole or sharded: everything here is elementwise or torch's own."""

    def __init__(self, model: Any, spec: JobSpec, device: torch.device) -> None:
        training = spec.training
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizers, self._shares = make_optimizers(model, training, device)
        named = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        self.average = Average(named, training.ema_decay) if training.ema_decay else None
        self.num_skipped = 0
        self.first_nonfinite: str | None = None
        """After a step that was left out: the parameter nearest the loss whose gradient is not finite on this rank."""
        self._trained = trained
        self._penalised = [p for name, p in trained.items() if decays(name, p, training)] if training.l1 else []
        self._unfreeze_every = spec.method.unfreeze_every_steps
        self._depths = depths(model) if self._unfreeze_every is not None else {}
        self._l1, self._max_norm = training.l1, training.max_grad_norm

    def step(self, lr: float, number: int) -> float:
        """The update after `number` others. Returns the global norm before clipping; where it is not finite nothing is
        updated."""
        self._hold(number)
        for parameter in self._penalised:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach().sign(), alpha=self._l1)
        norm = self._clipped()
        if math.isfinite(norm):
            self._apply(lr)
        else:
            self.num_skipped += 1
            self.first_nonfinite = next(self._nonfinite(), None)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return norm

    def _apply(self, lr: float) -> None:
        for group, share in zip(self._groups(), self._shares, strict=True):
            group["lr"] = lr * share
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            self.average.follow()

    def _hold(self, number: int) -> None:
        """What is still frozen gets no gradient; moments begin with its first update, also after a resume."""
        for name in self.still_frozen(number):
            self._trained[name].grad = None
        for name in self.still_frozen(number - 1):
            for optimizer in self.optimizers:
                optimizer.state.pop(self._trained[name], None)

    def still_frozen(self, number: int) -> list[str]:
        """Gradual unfreezing: the parameters that are not yet trained after `number` updates."""
        if self._unfreeze_every is None:
            return []
        return [name for name in self._trained if self._depths[name] > number // self._unfreeze_every]

    def _clipped(self) -> float:
        norm: Any = torch.nn.utils.clip_grad_norm_(self._trained.values(), self._max_norm or float("inf"))
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # a DTensor holds this rank's share

    def _groups(self) -> Iterator[dict[str, Any]]:
        return chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers)

    def _nonfinite(self) -> Iterator[str]:
        for name, parameter in reversed(self._trained.items()):
            gradient: Any = parameter.grad
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            if local is not None and not torch.isfinite(local).all():
                yield name
