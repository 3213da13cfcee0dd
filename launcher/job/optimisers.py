"""The optimisers of `training.optimizer`: whose they are, what they are told, and what they keep of each parameter.

Facts alone, for the planner and the checks; `launcher/train/optim.py` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 256
"""Elements that share a scale in 8-bit states: bitsandbytes' block."""
EIGHT_BIT = 1 + 4 / BLOCK
"""Bytes of an element in 8 bits: itself, and its share of a block's fp32 scale."""


@dataclass(frozen=True)
class Optimiser:
    """What is known of one without torch."""

    source: str
    """The class that computes."""
    settings: dict[str, float]
    """The keys of `training` that it reads, with its own defaults."""
    matrix_moments: int = 2
    """Tensors that it keeps of a matrix, each as large as the matrix."""
    vector_moments: int = 2
    """The same of biases and norms; for muon of all that AdamW updates in its place, embeddings and head among them."""
    moment_bytes: float | None = None
    """Of an element of these; None: those of an element of the parameter."""
    is_factored: bool = False
    """Of a matrix it keeps the sums of its rows and of its columns, in place of a moment."""
    is_paged: bool = False
    """Moments lie in memory that the driver moves to the host and back."""
    package: str | None = None
    """What has to be installed beside torch, by its name on PyPI."""
    extra: str | None = None
    """What brings it: `pip install 'fleetune[extra]'`."""


_ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
OPTIMISERS: dict[str, Optimiser] = {
    "adamw": Optimiser("torch.optim.AdamW", _ADAM),
    "paged_adamw": Optimiser(
        "bitsandbytes.optim.PagedAdamW32bit", _ADAM, is_paged=True, package="bitsandbytes", extra="bitsandbytes"
    ),
    "paged_adamw_8bit": Optimiser(
        "bitsandbytes.optim.PagedAdamW8bit",
        _ADAM,
        moment_bytes=EIGHT_BIT,
        is_paged=True,
        package="bitsandbytes",
        extra="bitsandbytes",
    ),
    "adafactor": Optimiser("torch.optim.Adafactor", {}, matrix_moments=0, vector_moments=1, is_factored=True),
    "lion": Optimiser(
        "lion_pytorch.Lion",
        {"beta1": 0.9, "beta2": 0.99},
        matrix_moments=1,
        vector_moments=1,
        package="lion-pytorch",
        extra="lion",
    ),
    "muon": Optimiser("torch.optim.Muon", {"momentum": 0.95, **_ADAM}, matrix_moments=1),
    "sgd": Optimiser("torch.optim.SGD", {"momentum": 0.9}, matrix_moments=1, vector_moments=1),
}
SETTINGS = ("beta1", "beta2", "eps", "momentum")
"""Keys of `training` that belong to some optimisers only."""
