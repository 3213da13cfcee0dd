"""An exponential moving average of the trained weights (Polyak averaging), kept beside them, sharded as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Average:
    """`average = decay x average + (1 - decay) x weight` after every update; it starts as the weights do."""

    def __init__(self, weights: Mapping[str, torch.Tensor], decay: float) -> None:
        self._weights = dict(weights)
        """By every name that they have: tied ones have several, and one average."""
        self._share = 1.0 - decay
        self.tensors: dict[str, Any] = {}
        """By the parameter's name in the model; fp32."""
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """From the weights as they are now."""
        copies = {weight: weight.detach().float().clone() for weight in self._weights.values()}
        self.tensors = {name: copies[weight] for name, weight in self._weights.items()}

    @torch.no_grad()
    def follow(self) -> None:
        for weight, name in {weight: name for name, weight in self._weights.items()}.items():
            self.tensors[name].lerp_(weight.detach().float(), self._share)
