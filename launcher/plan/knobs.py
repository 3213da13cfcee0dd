"""Which knobs mean something for which strategy, and so every layout that a spec leaves open.

What means nothing is not tried, and where the user asked for it, it is refused by name. Sources: DeepSpeed 0.19
`runtime/zero/config.py`, `stage_1_and_2.py` (optimiser to the CPU alone), `stage3.py`, `offload_config.py`; torch 2.13
`distributed/fsdp` (`CPUOffloadPolicy` moves parameters, gradients and optimiser together).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from launcher.errors import SpecError
from launcher.job.cluster import Cluster
from launcher.job.spec import JobSpec, ParallelSection
from launcher.job.together import check_device, permits
from launcher.plan.layout import ENGINE_OF, GROUPED, Layout

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "zero3", "hsdp", "hpz")
"""Least machinery first."""

Pair = tuple[str, str]
ON_DEVICE: Pair = ("none", "none")


@dataclass(frozen=True)
class Can:
    """What a strategy can honour."""

    precisions: tuple[str, ...]
    offloads: tuple[Pair, ...] = (ON_DEVICE,)
    """Where the optimiser's state lies, and where the parameters do."""
    reshards: tuple[bool, ...] = (True,)


_TORCH, _DEEPSPEED = ("fp32", "bf16", "pure_bf16"), ("fp32", "bf16", "fp16")
_TO_CPU: Pair = ("cpu", "none")
_INFINITY: tuple[Pair, ...] = (("cpu", "cpu"), ("nvme", "none"), ("nvme", "cpu"), ("nvme", "nvme"))
CAN = {
    "ddp": Can(_TORCH),
    "zero1": Can(_DEEPSPEED, (ON_DEVICE, _TO_CPU)),
    "zero2": Can(_DEEPSPEED, (ON_DEVICE, _TO_CPU)),
    "zero3": Can(_DEEPSPEED, (ON_DEVICE, _TO_CPU, *_INFINITY)),
    "hpz": Can(_DEEPSPEED, (ON_DEVICE, _TO_CPU)),
    "fsdp": Can(_TORCH, (ON_DEVICE, ("cpu", "cpu")), (True, False)),
    "hsdp": Can(_TORCH, (ON_DEVICE, ("cpu", "cpu")), (True, False)),
}


def families(spec: JobSpec, cluster: Cluster) -> list[Layout]:
    """Every layout that the spec leaves open, each with micro-batches of one sample. Raises `SpecError` if none is."""
    _check_machine(spec, cluster)
    found = [layout for strategy in _strategies(spec) for layout in _of_strategy(strategy, spec, cluster)]
    if not found:
        raise _impossible(spec, cluster)
    return found


def micro_batches(spec: JobSpec) -> list[int]:
    """Divisors of a rank's share of the batch, or the one that the spec asks for; rising."""
    asked = spec.parallel.micro_batch_size
    if asked != "auto":
        return [asked]
    return divisors(spec.training.global_batch_size // spec.num_ranks)


def divisors(number: int) -> list[int]:
    """Rising."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def precision_of(spec: JobSpec, cluster: Cluster) -> str:
    """`auto` is bf16 where the hardware has it; fp16 needs a scaled loss and is taken only when asked for."""
    asked = spec.parallel.precision
    return asked if asked != "auto" else "bf16" if cluster.gpu.bf16 else "fp32"


def _strategies(spec: JobSpec) -> tuple[str, ...]:
    asked = spec.parallel.strategy
    return STRATEGIES if asked == "auto" else (asked,)


def _of_strategy(strategy: str, spec: JobSpec, cluster: Cluster) -> Iterator[Layout]:
    """Nothing where a fixed key means nothing for this strategy."""
    parallel, can, precision = spec.parallel, CAN[strategy], precision_of(spec, cluster)
    if precision not in can.precisions:
        return
    plain = Layout(
        strategy=strategy,
        nodes=spec.cluster.nodes,
        ranks_per_node=spec.cluster.gpus_per_node,
        micro_batch_size=1,
        accumulation_steps=max(1, spec.training.global_batch_size // spec.num_ranks),
        seq_len=spec.training.seq_len,
        recompute="none",
        precision=precision,
    )
    for group in _groups(strategy, spec):
        for reshard in _allowed(parallel.reshard_after_forward, can.reshards if spec.num_ranks > 1 else (True,)):
            for optimizer, params in _offloads(can, spec, cluster):
                places = {"parallel.strategy": strategy, "parallel.offload_optimizer": optimizer}
                if not permits(spec, places):
                    continue
                for recompute in _allowed(parallel.recompute, ("none", "full")):
                    yield replace(
                        plain,
                        shard_group_size=group,
                        reshard_after_forward=reshard,
                        offload_optimizer=optimizer,
                        offload_params=params,
                        recompute=recompute,
                    )


def _allowed(asked: Any, possible: tuple[Any, ...]) -> tuple[Any, ...]:
    return possible if asked == "auto" else tuple(value for value in possible if value == asked)


def _offloads(can: Can, spec: JobSpec, cluster: Cluster) -> list[Pair]:
    """Of those the strategy knows, what the spec allows and the machine has."""
    parallel = spec.parallel
    has_nvme = parallel.nvme_path is not None and cluster.host.nvme_gib is not None
    return [
        pair
        for pair in can.offloads
        if parallel.offload_optimizer in ("auto", pair[0])
        and parallel.offload_params in ("auto", pair[1])
        and (pair == ON_DEVICE or cluster.gpu.kind != "cpu")
        and (has_nvme or "nvme" not in pair)
    ]


def _groups(strategy: str, spec: JobSpec) -> list[int]:
    """Group sizes, 0 where there are none: parts of a node, or whole nodes; hpz's copy is worth while inside a node."""
    asked, per_node = spec.parallel.shard_group_size, spec.cluster.gpus_per_node
    if strategy not in GROUPED:
        return [0] if asked == "auto" else []
    if asked != "auto":
        return [asked] if not _wrong_group(asked, spec) else []
    aligned = [size for size in divisors(spec.num_ranks) if 1 < size < spec.num_ranks and not _wrong_group(size, spec)]
    return aligned if strategy == "hsdp" else [size for size in aligned if size <= per_node and spec.cluster.nodes > 1]


def _wrong_group(size: int, spec: JobSpec) -> bool:
    per_node = spec.cluster.gpus_per_node
    return bool(spec.num_ranks % size or (per_node % size and size % per_node))


def _check_machine(spec: JobSpec, cluster: Cluster) -> None:
    """Fixed keys that this machine, or this number of ranks, cannot honour under any strategy."""
    parallel = spec.parallel
    check_device(spec, cluster.gpu.kind)
    for key in ("offload_optimizer", "offload_params"):
        asked = getattr(parallel, key)
        if asked in ("cpu", "nvme") and cluster.gpu.kind == "cpu":
            rule = "has no effect on a CPU cluster, whose ranks compute in host memory"
            raise SpecError(f"parallel.{key}", asked, rule, "leave it out")
        if asked == "nvme" and cluster.host.nvme_gib is None:
            rule = f"needs NVMe disks, of which the cluster file {spec.cluster.name} knows nothing"
            raise SpecError(
                f"parallel.{key}", asked, rule, "give host.nvme_gib and host.nvme_gb_per_s there, or set cpu"
            )
        if asked == "nvme" and parallel.nvme_path is None:
            raise SpecError(
                f"parallel.{key}", asked, "needs a folder", "set parallel.nvme_path to one on a local NVMe disk"
            )
    size = parallel.shard_group_size
    if size != "auto" and _wrong_group(size, spec):
        fit = [good for good in divisors(spec.num_ranks) if good > 1 and not _wrong_group(good, spec)]
        ranks = f"{spec.cluster.nodes} nodes x {spec.cluster.gpus_per_node} ranks"
        known = f"possible: {', '.join(map(str, fit))}" if fit else "leave it out"
        raise SpecError(
            "parallel.shard_group_size",
            size,
            f"cuts {ranks} into no even groups of whole nodes or even parts of one",
            known,
        )


_FREE = ParallelSection()
_KEYS = ("precision", "shard_group_size", "reshard_after_forward", "offload_optimizer", "offload_params")


def _impossible(spec: JobSpec, cluster: Cluster) -> SpecError:
    """The first fixed key without which something is left; what the fixed strategy knows of it, or which ones know it."""
    asked = spec.parallel
    for key in _KEYS:
        value = getattr(asked, key)
        if value == "auto":
            continue
        freed = spec.model_copy(update={"parallel": asked.model_copy(update={key: "auto"})})
        if any(layout for strategy in _strategies(freed) for layout in _of_strategy(strategy, freed, cluster)):
            return SpecError(f"parallel.{key}", value, _rule(asked, key), _way_out(asked, key, spec, cluster))
    if asked.strategy in GROUPED:
        rule = f"shards within groups of ranks, and {spec.num_ranks} cannot be cut into any"
        return SpecError("parallel.strategy", asked.strategy, rule, "set fsdp or zero3, or give more ranks")
    fixed = [f"{key} {getattr(asked, key)}" for key in ("strategy", *_KEYS) if getattr(asked, key) != "auto"]
    return SpecError("parallel", ", ".join(fixed), "go together in no strategy", "leave some of them out")


def _rule(asked: ParallelSection, key: str) -> str:
    if asked.strategy != "auto":
        return f"cannot be honoured by strategy {asked.strategy}{_beside(asked, key)}"
    return f"cannot be honoured by any strategy{_beside(asked, key)}"


def _beside(asked: ParallelSection, key: str) -> str:
    others = [f"{other} {getattr(asked, other)}" for other in _KEYS if other != key and getattr(asked, other) != "auto"]
    return f" with {' and '.join(others)}" if others else ""


def _way_out(asked: ParallelSection, key: str, spec: JobSpec, cluster: Cluster) -> str:
    """Strategies that can do it alone, and leaving it out."""
    alone = spec.model_copy(
        update={"parallel": _FREE.model_copy(update={key: getattr(asked, key), "nvme_path": asked.nvme_path})}
    )
    able = [
        name for name in STRATEGIES if any(True for _ in _of_strategy(name, alone, cluster)) and name != asked.strategy
    ]
    return f"leave it out, or set parallel.strategy to {' or '.join(able)}" if able else "leave it out"


def check_batch(spec: JobSpec) -> None:
    """The batch must divide over the ranks, and a preset needs its engine."""
    batch, ranks, micro = spec.training.global_batch_size, spec.num_ranks, spec.parallel.micro_batch_size
    unit = ranks if micro == "auto" else ranks * micro
    if batch % unit:
        parts = f"{ranks} ranks" if micro == "auto" else f"micro_batch_size {micro} x {ranks} ranks = {unit}"
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        nearest = f"{below}, {above}" if below else str(above)
        raise SpecError("training.global_batch_size", batch, f"is not a multiple of {parts}", f"nearest: {nearest}")
    if spec.parallel.deepspeed_preset and ENGINE_OF.get(spec.parallel.strategy) != "deepspeed":
        raise SpecError(
            "parallel.deepspeed_preset",
            spec.parallel.deepspeed_preset,
            f"has no effect with strategy {spec.parallel.strategy}",
            "set parallel.strategy to zero1, zero2 or zero3, or leave the preset out",
        )
