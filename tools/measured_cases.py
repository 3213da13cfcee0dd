"""The grid of small real jobs that `tools.calibrate measure` runs: GPT and BERT, three sizes, and what changes memory.

Every choice of the planner's is fixed in a case, so that what is compared is the prediction of a layout and not the
choice between layouts. Dropout is off: a CPU has no fused attention with it, and the trace would be another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

STRATEGIES = ("zero1", "zero2", "zero3", "fsdp", "ddp")


@dataclass(frozen=True)
class Size:
    name: str
    blocks: int
    width: int
    heads: int
    vocabulary: int


@dataclass(frozen=True)
class Grid:
    """What varies, and the arithmetic of every case."""

    sizes: tuple[Size, ...]
    lengths: tuple[tuple[int, int], ...]
    """(sequence length, micro-batch) pairs: short sequences in larger batches."""
    precision: str
    steps: int


GRIDS = {
    "cuda": Grid(
        (
            Size("124m", 12, 768, 12, 50257),
            Size("355m", 24, 1024, 16, 50257),
            Size("774m", 36, 1280, 20, 50257),
        ),
        ((512, 16), (2048, 4), (8192, 1)),
        "bf16",
        8,
    ),
    "cpu": Grid((Size("1m", 2, 128, 4, 2048), Size("5m", 4, 256, 4, 4096)), ((64, 4), (256, 2)), "fp32", 8),
}
"""The CPU's is for the code path and the step time: bf16 is emulated there, and memory is not accounted for."""


@dataclass(frozen=True)
class GridCase:
    """One job of the grid."""

    family: str
    """`gpt` or `bert`."""
    size: Size
    seq_len: int
    micro_batch_size: int
    accumulation_steps: int
    recompute: str
    method: str
    strategy: str
    precision: str
    steps: int

    @property
    def name(self) -> str:
        recompute = "-recompute" if self.recompute == "full" else ""
        method = "-lora" if self.method == "lora" else ""
        return f"{self.family}-{self.size.name}-{self.seq_len}-{self.strategy}{method}{recompute}"

    def spec(self, folder: Path, data: Path, cluster: str, num_ranks: int) -> dict[str, Any]:
        """The job spec; the data are prepared once for all cases of a task and a length."""
        gpt = self.family == "gpt"
        batch = self.micro_batch_size * self.accumulation_steps * num_ranks
        return {
            "output_dir": str(folder),
            "model": {"from_config": _gpt(self) if gpt else _bert(self)},
            "task": "causal_lm" if gpt else {"name": "sequence_classification", "labels": ["even", "odd"]},
            "data": {
                "train": str(data / "texts.jsonl"),
                "validation_fraction": 0,
                "train_tokenizer": {"vocab_size": 400},
                "prepared": str(data / f"{self.family}-{self.seq_len}"),
            },
            "method": self.method,
            "training": {"seq_len": self.seq_len, "global_batch_size": batch, "max_steps": self.steps, "lr": 1e-5},
            "parallel": {
                "strategy": self.strategy,
                "micro_batch_size": self.micro_batch_size,
                "recompute": self.recompute,
                "precision": self.precision,
            },
            "cluster": {"name": cluster, "nodes": 1, "gpus_per_node": num_ranks},
            "tracking": {"log_every_steps": 1},
            "checkpoint": {"resume": False},
        }


def _gpt(case: GridCase) -> dict[str, Any]:
    sizes = {"n_layer": case.size.blocks, "n_embd": case.size.width, "n_head": case.size.heads}
    sizes |= {"vocab_size": case.size.vocabulary, "n_positions": case.seq_len}
    return {"model_type": "gpt2", **sizes, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _bert(case: GridCase) -> dict[str, Any]:
    sizes = {"num_hidden_layers": case.size.blocks, "hidden_size": case.size.width}
    sizes |= {"num_attention_heads": case.size.heads, "intermediate_size": 4 * case.size.width}
    sizes |= {"vocab_size": case.size.vocabulary, "max_position_embeddings": case.seq_len}
    return {"model_type": "bert", **sizes, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def cases_of(kind: str) -> list[GridCase]:
    """Family x size x length x recompute, the strategies taken in turn; then adapters with and without sharding."""
    grid = GRIDS[kind]
    full = [
        (family, size, length, recompute, "full")
        for family in ("gpt", "bert")
        for size in grid.sizes
        for length in grid.lengths
        for recompute in ("none", "full")
    ]
    lora = [
        (family, size, grid.lengths[-2], recompute, "lora")
        for family in ("gpt", "bert")
        for size in grid.sizes
        for recompute in ("none", "full")
    ]
    cases = []
    for number, (family, size, (seq_len, micro_batch_size), recompute, method) in enumerate([*full, *lora]):
        turn = number // 2 if method == "full" else 3 + number // 2 % 2  # adapters: fsdp and ddp
        strategy = STRATEGIES[turn % len(STRATEGIES)]
        accumulation = 1 + number % 2
        cases.append(
            GridCase(
                family,
                size,
                seq_len,
                micro_batch_size,
                accumulation,
                recompute,
                method,
                strategy,
                grid.precision,
                grid.steps,
            )
        )
    return cases
