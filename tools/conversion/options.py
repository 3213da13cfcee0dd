"""What may be asked of a conversion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from launcher.errors import ABSENT, CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_SHARD_BYTES = 5 * 10**9  # the 5GB of save_pretrained before transformers 5; small enough for any file system
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
TARGETS = ("zero", "universal", "dcp", "hf", "torch", "peft", "gguf", "onnx")


@dataclass(frozen=True)
class Options:
    """Of one conversion; None leaves the choice to the source."""

    dtype: str | None = None
    """fp32, bf16, fp16: cast of floating weights; for zero: of the module's, beside fp32 masters."""
    shard_bytes: int = DEFAULT_SHARD_BYTES
    config_dir: Path | None = None
    no_config: bool = False
    """hf: weights and index alone, by the checkpoint's own names."""
    merge: bool = False
    base_dir: Path | None = None
    ranks: int | None = None
    stage: int | None = None
    only_weights: bool = False
    rename: Mapping[str, str] = field(default_factory=dict)
    verify: bool = False
    prune: str | None = None
    """`0.5` (magnitude, of each matrix) or `2:4`."""
    quantize: str | None = None
    """int8 or int4, weights only."""
    best: bool = False
    """The checkpoint that the run names as the best."""
    ema: bool = False
    """The moving average of the weights that the run kept."""
    average: int = 1
    """The mean of so many of the run's newest checkpoints."""
    soup: tuple[str, ...] = ()
    """Further sources, whose mean with the first is written."""
    soup_weights: tuple[float, ...] | None = None
    check: str | None = None
    """A prompt that source and result are both given."""

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return DTYPES[self.dtype] if self.dtype else None

    def told(self) -> tuple[str, ...]:
        """What decides the bytes of a result, beside its source."""
        return tuple(map(repr, (self.dtype, self.shard_bytes, self.merge, self.ranks, self.stage, self.prune,
                                self.only_weights, sorted(self.rename.items()), self.quantize, self.best, self.ema, self.average, self.soup, self.soup_weights)))  # fmt: skip


def check_options(options: Options, target: str) -> None:
    """Raises `CheckpointError` for a value that means nothing, or an option that this target cannot obey."""
    if options.dtype is not None and options.dtype not in DTYPES:
        known = f"use one of {', '.join(DTYPES)}"
        raise CheckpointError("--dtype", options.dtype, "is not a dtype that is written", known)
    if options.shard_bytes < 1:
        raise CheckpointError("--shard-size", options.shard_bytes, "is not a positive size", "e.g. 5GB")
    if options.ranks is not None and options.ranks < 1:
        raise CheckpointError("--ranks", options.ranks, "is not a number of ranks", "e.g. --ranks 8")
    if options.stage is not None and options.stage not in (1, 2, 3):
        raise CheckpointError("--stage", options.stage, "is no stage of ZeRO", "use 1, 2 or 3")
    if sum((options.best, options.ema, options.average > 1)) > 1 and not (options.best and options.ema):
        rule = "is a choice of checkpoints of its own"
        raise CheckpointError("--average", options.average, rule, "give it without the others")
    sharded, zero = ("zero", "universal", "dcp"), ("zero", "universal")
    for name, value, targets in (
        ("--ranks", options.ranks, sharded),
        ("--stage", options.stage, zero),
        ("--no-config", options.no_config or None, ("hf",)),
        ("--prune", options.prune, ("hf",)),
        ("--quantize", options.quantize, ("hf",)),
        ("--check", options.check, ("hf",)),
    ):
        if value is not None and target not in targets:
            rule = f"has no meaning for {target}"
            raise CheckpointError(name, ABSENT, rule, f"leave it out, or write {' or '.join(t + ':' for t in targets)}")


def parse_size(text: str) -> int:
    """`5GB`, `200 MiB`, `1000` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise CheckpointError("--shard-size", text, "is not a size", "e.g. 5GB, 500MB or 2GiB")
    return int(float(match[1]) * unit)
