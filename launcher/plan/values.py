"""A plan is a decision with its argument: what was chosen, what it costs, what lost and why."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from launcher.plan.layout import Engine, Layout


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


Bound = Literal["arithmetic", "memory bandwidth", "network", "kernel launches", "host memory", "host link", "disk"]


@dataclass(frozen=True)
class TimeItem:
    """One line of the account of a step's time."""

    name: str
    seconds: float
    formula: str
    """How the seconds come about; letters as in `Item`, A accumulation steps, L blocks."""
    kind: Bound
    """What would have to be faster for this to shrink."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step."""

    items: tuple[TimeItem, ...]
    num_tokens: int
    """Tokens of a step, over all ranks, padding counted."""
    num_ranks: int
    seconds_at_peak: float
    """What the step would take if every rank computed at the data sheet's peak: 6 P + 12 L h T FLOPs per token."""

    @property
    def seconds(self) -> float:
        return sum(item.seconds for item in self.items)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def tokens_per_second_per_rank(self) -> float:
        return self.tokens_per_second / self.num_ranks

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, a fraction; recompute not counted."""
        return self.seconds_at_peak / self.seconds

    @property
    def bound_by(self) -> Bound:
        """The kind with most seconds."""
        kinds = dict.fromkeys(item.kind for item in self.items)
        return max(kinds, key=lambda kind: sum(item.seconds for item in self.items if item.kind == kind))


@dataclass(frozen=True)
class Candidate:
    """One way to lay the job over the ranks."""

    layout: Layout
    memory: Memory
    communication_bytes: int
    """What one rank sends per optimiser step, in bytes (ring collectives)."""
    step_time: StepTime

    @property
    def label(self) -> str:
        return self.layout.label

    @property
    def strategy(self) -> str:
        return self.layout.strategy


@dataclass(frozen=True)
class Rejected:
    candidate: Candidate
    reason: str


_YOUNGER = {"shard_group_size": 0, "reshard_after_forward": True, "offload_optimizer": "none", "offload_params": "none"}


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
    num_steps: int | None
    """Optimiser steps of the job; None when its length is given in epochs."""
    reason: str
    alternatives: tuple[Candidate, ...]
    """What fits as well, best first."""
    rejected: tuple[Rejected, ...]

    @property
    def engine(self) -> Engine:
        return self.chosen.layout.engine

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def job_seconds(self) -> float | None:
        """Time of all optimiser steps, when their number is known."""
        return None if self.num_steps is None else self.num_steps * self.chosen.step_time.seconds

    def decision(self) -> dict[str, Any]:
        """What the ranks must agree on, and nothing else. What younger keys leave as it was is left out: digests last."""
        decided = self.chosen.layout.decided().items()
        return {
            **{key: value for key, value in decided if key not in _YOUNGER or value != _YOUNGER[key]},
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
            "plan": {
                **self.chosen.layout.decided(),
                **self.decision(),
                "engine": self.engine,
                "digest": self.digest(),
                "reason": self.reason,
            },
            "memory": _memory_json(self.chosen.memory),
            "step_time": {**_time_json(self.chosen.step_time), "job_seconds": self.job_seconds},
            "alternatives": [_candidate_json(candidate) for candidate in self.alternatives],
            "rejected": [{**_candidate_json(lost.candidate), "reason": lost.reason} for lost in self.rejected],
        }


def _memory_json(memory: Memory) -> dict[str, Any]:
    return {**asdict(memory), "total_bytes": memory.total_bytes}


def _time_json(time: StepTime) -> dict[str, Any]:
    return {
        "items": [asdict(item) for item in time.items],
        "seconds": time.seconds,
        "tokens_per_second": time.tokens_per_second,
        "tokens_per_second_per_rank": time.tokens_per_second_per_rank,
        "mfu": time.mfu,
        "bound_by": time.bound_by,
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        **candidate.layout.decided(),
        "communication_bytes": candidate.communication_bytes,
        "memory_bytes": candidate.memory.total_bytes,
        "step_seconds": candidate.step_time.seconds,
    }
