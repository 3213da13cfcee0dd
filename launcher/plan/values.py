"""A plan is a decision with its argument: what was chosen, what it costs, what lost and why."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from launcher.plan.layout import Engine, Layout
from launcher.units import show_bytes

Basis = Literal["counted", "traced", "bound", "assumed", "margin"]
SPREAD: dict[str, tuple[float, float]] = {
    "counted": (1.0, 1.0),
    "traced": (0.95, 1.05),
    "bound": (0.25, 1.0),
    "assumed": (0.5, 1.5),
    "margin": (0.0, 2.0),
}
"""Lowest and highest value of an item as a share of the expected one: counted from tensors that the engine's source
allocates; traced from the model's modules; a limit that the engine need not reach; a working value; left free on purpose."""


@dataclass(frozen=True)
class Item:
    """One line of a memory account."""

    name: str
    num_bytes: int
    """Expected."""
    formula: str
    """How the bytes come about, in words and letters: P parameters, N ranks, B micro-batch, T sequence length."""
    source: str = ""
    """Where the formula was read: the engine's file and name, or how it was measured."""
    basis: Basis = "counted"
    """What the figure rests on; `assumed` was measured nowhere."""

    @property
    def low_bytes(self) -> int:
        return round(SPREAD[self.basis][0] * self.num_bytes)

    @property
    def high_bytes(self) -> int:
        return round(SPREAD[self.basis][1] * self.num_bytes)


Place = Literal["rank", "host", "nvme", "disk"]


@dataclass(frozen=True)
class Memory:
    """Bytes that one place must hold at its peak."""

    items: tuple[Item, ...]
    usable_bytes: int | None
    """What the cluster gives; None where no file says it (disk)."""
    place: Place = "rank"
    """`rank`: an accelerator (on a CPU cluster, the rank's share of the RAM); `host`: RAM of a node; `nvme`: local disks of a node; `disk`: the run's folder."""
    moment: str = ""
    """When in the step the peak is; for a rank."""

    @property
    def total_bytes(self) -> int:
        """Expected."""
        return sum(item.num_bytes for item in self.items)

    @property
    def low_bytes(self) -> int:
        return sum(item.low_bytes for item in self.items)

    @property
    def high_bytes(self) -> int:
        return sum(item.high_bytes for item in self.items)

    @property
    def fits(self) -> bool:
        """The rule: what is expected, margin included, is at most what is usable."""
        return self.usable_bytes is None or self.total_bytes <= self.usable_bytes

    @property
    def is_tight(self) -> bool:
        """Whether the highest estimate is more than is usable."""
        return self.usable_bytes is not None and self.high_bytes > self.usable_bytes


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
    """Of one rank's accelerator."""
    communication_bytes: int
    """What one rank sends per optimiser step, in bytes (ring collectives)."""
    step_time: StepTime
    host: Memory = Memory((), None, "host")
    """RAM of one node."""
    nvme: Memory = Memory((), None, "nvme")
    """Local NVMe disks of one node; without items unless something is offloaded there."""
    disk: Memory = Memory((), None, "disk")
    """Checkpoints in the run's folder, all ranks together."""

    @property
    def fits(self) -> bool:
        return not self.too_small

    @property
    def too_small(self) -> tuple[Memory, ...]:
        """The places that cannot hold it."""
        return tuple(place for place in (self.memory, self.host, self.nvme, self.disk) if not place.fits)

    @property
    def label(self) -> str:
        return self.layout.label

    @property
    def strategy(self) -> str:
        return self.layout.strategy

    @property
    def shortfall(self) -> str:
        """In words: what is needed of the first place that is too small; of the accelerator where none is."""
        memory = next(iter(self.too_small), self.memory)
        assert memory.usable_bytes is not None, "what has no limit is never too small"
        largest = sorted(memory.items, key=lambda item: -item.num_bytes)[:3]
        parts = ", ".join(f"{item.name} {show_bytes(item.num_bytes)}" for item in largest)
        return f"{show_bytes(memory.total_bytes)} needed{_WHERE[memory.place]}, {show_bytes(memory.usable_bytes)} usable ({parts})"


_WHERE: dict[Place, str] = {
    "rank": "",
    "host": " in the RAM of a node",
    "nvme": " on the NVMe disks of a node",
    "disk": " on the disk",
}


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
    """Optimiser steps of the job; None when its length is given in epochs of data that are not prepared yet."""
    reason: str
    alternatives: tuple[Candidate, ...]
    """What fits as well, best first: of each kind of layout, the largest micro-batch that fits."""
    rejected: tuple[Rejected, ...]
    """What does not, best first: of each kind of layout, the smallest micro-batch that does not fit."""
    notes: tuple[str, ...] = ()
    """What the reader must know of the figures: what is extrapolated, what the hardware lacks."""
    price_per_gpu_hour: float | None = None
    currency: str = "USD"

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

    @property
    def gpu_hours(self) -> float | None:
        """Accelerator hours of all optimiser steps, when their number is known."""
        return None if self.job_seconds is None else self.job_seconds * self.num_ranks / 3600

    @property
    def price(self) -> float | None:
        """In `currency`, where the cluster file has a price and the number of steps is known."""
        if self.gpu_hours is None or self.price_per_gpu_hour is None:
            return None
        return self.gpu_hours * self.price_per_gpu_hour

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
                "notes": list(self.notes),
            },
            "memory": _memory_json(self.chosen.memory),
            "host_memory": _memory_json(self.chosen.host),
            "nvme": _memory_json(self.chosen.nvme),
            "disk": _memory_json(self.chosen.disk),
            "step_time": {**_time_json(self.chosen.step_time), **self._job_json()},
            "alternatives": [_candidate_json(candidate) for candidate in self.alternatives],
            "rejected": [{**_candidate_json(lost.candidate), "reason": lost.reason} for lost in self.rejected],
        }

    def _job_json(self) -> dict[str, Any]:
        keys = ("num_steps", "job_seconds", "gpu_hours", "price", "currency")
        return {key: getattr(self, key) for key in keys}


def _memory_json(memory: Memory) -> dict[str, Any]:
    """`items usable_bytes total_bytes low_bytes high_bytes fits`; the total is what is expected."""
    bounds = ("low_bytes", "high_bytes")
    return {
        "items": [{**asdict(item), **{key: getattr(item, key) for key in bounds}} for item in memory.items],
        "usable_bytes": memory.usable_bytes,
        "total_bytes": memory.total_bytes,
        **{key: getattr(memory, key) for key in bounds},
        "fits": memory.fits,
        "moment": memory.moment,
    }


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
        "memory_high_bytes": candidate.memory.high_bytes,
        "step_seconds": candidate.step_time.seconds,
    }
