"""Every way to lay the job over the ranks, those that fit ranked, the best taken.

Rank: no recompute before recompute (it costs a third of the arithmetic), then least communication, then fewest
accumulation steps, then the order of STRATEGIES (least machinery first).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from launcher.cost.values import ModelCost
from launcher.errors import PlanError, SpecError
from launcher.job.cluster import Cluster
from launcher.job.spec import JobSpec
from launcher.plan.memory import communication_bytes, rank_memory
from launcher.plan.values import ENGINE_OF, Candidate, Plan, Rejected
from launcher.units import show_bytes

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "zero3")


def make_plan(spec: JobSpec, cost: ModelCost, cluster: Cluster) -> Plan:
    """The best plan that fits. Raises `SpecError` for impossible arithmetic, `PlanError` when nothing fits."""
    _check_lengths(spec, cost)
    _check_batch(spec)
    candidates = sorted(_candidates(spec, cost, cluster), key=_rank)
    fitting = [candidate for candidate in candidates if candidate.memory.fits]
    if not fitting:
        raise _nothing_fits(spec, candidates)
    chosen = fitting[0]
    return Plan(
        chosen=chosen,
        nodes=spec.cluster.nodes,
        gpus_per_node=spec.cluster.gpus_per_node,
        device=cluster.gpu.kind,
        global_batch_size=spec.training.global_batch_size,
        seq_len=spec.training.seq_len,
        num_params=cost.num_params,
        reason=_reason(spec, chosen, candidates),
        alternatives=tuple(fitting[1:]),
        rejected=tuple(Rejected(lost, _shortfall(lost)) for lost in candidates if not lost.memory.fits),
    )


def _rank(candidate: Candidate) -> tuple[bool, int, int, int]:
    return (
        candidate.recompute == "full",
        candidate.communication_bytes,
        candidate.accumulation_steps,
        STRATEGIES.index(candidate.strategy),
    )


def _candidates(spec: JobSpec, cost: ModelCost, cluster: Cluster) -> Iterator[Candidate]:
    usable = cluster.memory_bytes_per_rank(spec.cluster.gpus_per_node)
    precision = _precision(spec, cluster)
    for strategy in _choices(spec.parallel.strategy, STRATEGIES):
        for micro_batch_size in _micro_batches(spec):
            accumulation = spec.training.global_batch_size // (spec.num_ranks * micro_batch_size)
            for recompute in _choices(spec.parallel.recompute, ("none", "full")):
                memory = rank_memory(
                    cost,
                    strategy,
                    spec.num_ranks,
                    micro_batch_size,
                    spec.training.seq_len,
                    recompute,
                    precision,
                    usable,
                )
                sent = communication_bytes(cost, strategy, spec.num_ranks, accumulation, precision)
                yield Candidate(strategy, micro_batch_size, accumulation, recompute, precision, memory, sent)


def _choices(asked: str, every: tuple[str, ...]) -> tuple[str, ...]:
    return every if asked == "auto" else (asked,)


def _precision(spec: JobSpec, cluster: Cluster) -> str:
    asked = spec.parallel.precision
    return asked if asked != "auto" else "bf16" if cluster.gpu.bf16 else "fp32"


def _micro_batches(spec: JobSpec) -> list[int]:
    asked = spec.parallel.micro_batch_size
    if asked != "auto":
        return [asked]
    share = spec.training.global_batch_size // spec.num_ranks
    small = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
    return sorted({*small, *(share // size for size in small)})


def _check_lengths(spec: JobSpec, cost: ModelCost) -> None:
    limit = cost.max_positions
    if limit is not None and spec.training.seq_len > limit:
        raise SpecError(
            "training.seq_len",
            spec.training.seq_len,
            f"is more than the model's {limit} positions",
            f"give at most {limit}",
        )


def _check_batch(spec: JobSpec) -> None:
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


def _reason(spec: JobSpec, chosen: Candidate, candidates: list[Candidate]) -> str:
    room = f"{show_bytes(chosen.memory.total_bytes)} of {show_bytes(chosen.memory.usable_bytes)} per rank"
    if spec.parallel.strategy != "auto":
        return f"{chosen.strategy} is what the spec asks for; it fits ({room})"
    better = [lost for lost in candidates[: candidates.index(chosen)] if lost.strategy != chosen.strategy]
    nearest = {lost.strategy: lost for lost in sorted(better, key=lambda lost: -lost.memory.total_bytes)}
    if not nearest:
        return f"{chosen.strategy} sends least per step ({show_bytes(chosen.communication_bytes)}) and fits ({room})"
    lost_to = "; ".join(f"{name}: {_shortfall(lost)}" for name, lost in nearest.items())
    return f"{chosen.strategy} sends least of those that fit ({room}); {lost_to}"


def _shortfall(candidate: Candidate) -> str:
    memory = candidate.memory
    largest = sorted(memory.items, key=lambda item: -item.num_bytes)[:3]
    parts = ", ".join(f"{item.name} {show_bytes(item.num_bytes)}" for item in largest)
    return f"{show_bytes(memory.total_bytes)} needed, {show_bytes(memory.usable_bytes)} usable ({parts})"


def _nothing_fits(spec: JobSpec, candidates: list[Candidate]) -> PlanError:
    smallest = min(candidates, key=lambda candidate: candidate.memory.total_bytes)
    return PlanError(
        "parallel",
        spec.parallel.strategy,
        f"does not fit: {smallest.label} is the smallest, {_shortfall(smallest)}",
        _way_out(spec),
    )


def _way_out(spec: JobSpec) -> str:
    parallel = spec.parallel
    fixed = [key for key in ("strategy", "micro_batch_size", "recompute") if getattr(parallel, key) != "auto"]
    free = f"leave parallel.{', parallel.'.join(fixed)} to the planner, or " if fixed else ""
    return free + "give more ranks (cluster.nodes, cluster.gpus_per_node) or a shorter training.seq_len"
