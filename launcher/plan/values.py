"""A plan is a decision with its argument: what was chosen, what it costs, what lost and why."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

Engine = Literal["torch", "deepspeed"]
ENGINE_OF: dict[str, Engine] = {
    "ddp": "torch",
    "fsdp": "torch",
    "zero1": "deepspeed",
    "zero2": "deepspeed",
    "zero3": "deepspeed",
}


@dataclass(frozen=True)
class Item:
    """One line of the memory account."""

    name: str
    num_bytes: int
    formula: str
    """How the bytes come about, in words and letters: P parameters, N ranks, B micro-batch, T sequence length."""


@dataclass(frozen=True)
class Memory:
    """Bytes per rank at the peak of a step."""

    items: tuple[Item, ...]
    usable_bytes: int
    """What the cluster gives one rank."""

    @property
    def total_bytes(self) -> int:
        return sum(item.num_bytes for item in self.items)

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.usable_bytes


@dataclass(frozen=True)
class Candidate:
    """One way to lay the job over the ranks."""

    strategy: str
    micro_batch_size: int
    """Samples per rank in one forward and backward pass."""
    accumulation_steps: int
    """Forward and backward passes per optimiser step."""
    recompute: str
    precision: str
    memory: Memory
    communication_bytes: int
    """What one rank sends per optimiser step, in bytes (ring collectives)."""

    @property
    def label(self) -> str:
        recompute = ", recompute" if self.recompute == "full" else ""
        return f"{self.strategy}, micro-batch {self.micro_batch_size} x {self.accumulation_steps}{recompute}"


@dataclass(frozen=True)
class Rejected:
    candidate: Candidate
    reason: str


@dataclass(frozen=True)
class Plan:
    """The decision that every rank obeys."""

    chosen: Candidate
    nodes: int
    gpus_per_node: int
    device: str
    """`cuda` or `cpu`."""
    global_batch_size: int
    seq_len: int
    num_params: int
    reason: str
    alternatives: tuple[Candidate, ...]
    """What fits as well, best first."""
    rejected: tuple[Rejected, ...]

    @property
    def engine(self) -> Engine:
        return ENGINE_OF[self.chosen.strategy]

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def decision(self) -> dict[str, Any]:
        """What the ranks must agree on, and nothing else."""
        chosen = self.chosen
        return {
            "strategy": chosen.strategy,
            "micro_batch_size": chosen.micro_batch_size,
            "accumulation_steps": chosen.accumulation_steps,
            "recompute": chosen.recompute,
            "precision": chosen.precision,
            "nodes": self.nodes,
            "gpus_per_node": self.gpus_per_node,
            "device": self.device,
            "global_batch_size": self.global_batch_size,
            "seq_len": self.seq_len,
        }

    def digest(self) -> str:
        """Twelve hexadecimal digits that name the decision."""
        text = json.dumps(self.decision(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "plan": {**self.decision(), "engine": self.engine, "digest": self.digest(), "reason": self.reason},
            "memory": _memory_json(self.chosen.memory),
            "alternatives": [_candidate_json(candidate) for candidate in self.alternatives],
            "rejected": [{**_candidate_json(lost.candidate), "reason": lost.reason} for lost in self.rejected],
        }


def _memory_json(memory: Memory) -> dict[str, Any]:
    return {**asdict(memory), "total_bytes": memory.total_bytes}


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    raw = asdict(candidate)
    raw.pop("memory")
    return {**raw, "memory_bytes": candidate.memory.total_bytes}
