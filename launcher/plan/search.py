"""Every way to lay the job over the ranks, those that fit ranked, the best taken.

Rank: the predicted time of a step. Predictions are no better than a few per cent, so all within `TIE` of the fastest
count as equally fast, and among those: no recompute before recompute, then least communication, then fewest accumulation
steps, then the order of STRATEGIES (least machinery first).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from launcher.cost.values import ModelCost
from launcher.errors import PlanError, SpecError
from launcher.job.cluster import Cluster
from launcher.job.spec import JobSpec
from launcher.plan.collectives import communication_bytes
from launcher.plan.layout import ENGINE_OF, Layout
from launcher.plan.memory import checkpoint_disk, host_memory, nvme_memory, rank_memory
from launcher.plan.step_time import step_time
from launcher.plan.values import Candidate, Plan, Rejected
from launcher.units import show_bytes, show_time

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "zero3")
TIE = 0.03
"""Share of the fastest step's time: the median error of the predictions on published runs (`tools.calibrate`)."""


def make_plan(spec: JobSpec, cost: ModelCost, cluster: Cluster) -> Plan:
    """The best plan that fits. Raises `SpecError` for impossible arithmetic, `PlanError` when nothing fits."""
    _check_lengths(spec, cost)
    _check_batch(spec)
    candidates = list(_candidates(spec, cost, cluster))
    fitting = ranked([candidate for candidate in candidates if candidate.fits])
    if not fitting:
        raise _nothing_fits(spec, candidates)
    chosen = fitting[0]
    too_large = ranked([candidate for candidate in candidates if not candidate.fits])
    return Plan(
        chosen=chosen,
        nodes=spec.cluster.nodes,
        gpus_per_node=spec.cluster.gpus_per_node,
        device=cluster.gpu.kind,
        global_batch_size=spec.training.global_batch_size,
        seq_len=spec.training.seq_len,
        num_params=cost.num_params,
        num_steps=spec.training.max_steps,
        reason=_reason(spec, fitting, too_large),
        alternatives=tuple(fitting[1:]),
        rejected=tuple(Rejected(lost, _shortfall(lost)) for lost in too_large),
    )


def ranked(candidates: list[Candidate]) -> list[Candidate]:
    """Best first: those as fast as the fastest, simplest first, then the others by their time."""
    limit = (1 + TIE) * min((candidate.step_time.seconds for candidate in candidates), default=0.0)
    fast = [candidate for candidate in candidates if candidate.step_time.seconds <= limit]
    slow = [candidate for candidate in candidates if candidate.step_time.seconds > limit]
    return sorted(fast, key=_simplicity) + sorted(slow, key=lambda lost: (lost.step_time.seconds, _simplicity(lost)))


def _simplicity(candidate: Candidate) -> tuple[bool, int, int, int]:
    return (
        candidate.layout.recompute == "full",
        candidate.communication_bytes,
        candidate.layout.accumulation_steps,
        STRATEGIES.index(candidate.strategy),
    )


def _candidates(spec: JobSpec, cost: ModelCost, cluster: Cluster) -> Iterator[Candidate]:
    precision = _precision(spec, cluster)
    for strategy in _choices(spec.parallel.strategy, STRATEGIES):
        for micro_batch_size in _micro_batches(spec):
            accumulation = spec.training.global_batch_size // (spec.num_ranks * micro_batch_size)
            for recompute in _choices(spec.parallel.recompute, ("none", "full")):
                layout = Layout(
                    strategy=strategy,
                    nodes=spec.cluster.nodes,
                    ranks_per_node=spec.cluster.gpus_per_node,
                    micro_batch_size=micro_batch_size,
                    accumulation_steps=accumulation,
                    seq_len=spec.training.seq_len,
                    recompute=recompute,
                    precision=precision,
                )
                yield _weighed(spec, cost, cluster, layout)


def _weighed(spec: JobSpec, cost: ModelCost, cluster: Cluster, layout: Layout) -> Candidate:
    return Candidate(
        layout,
        memory=rank_memory(cost, cluster, layout),
        host=host_memory(cost, cluster, layout),
        nvme=nvme_memory(cost, cluster, layout),
        disk=checkpoint_disk(cost, layout, spec.checkpoint.keep_last),
        communication_bytes=communication_bytes(cost, layout),
        step_time=step_time(cost, cluster, layout),
    )


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


def _reason(spec: JobSpec, fitting: list[Candidate], too_large: list[Candidate]) -> str:
    """Why the winner won: its time against the best of each other strategy, then what is faster but does not fit."""
    chosen = fitting[0]
    room = f"{show_bytes(chosen.memory.total_bytes)} of {show_bytes(chosen.memory.usable_bytes or 0)} per rank"
    took = show_time(chosen.step_time.seconds)
    if spec.parallel.strategy != "auto":
        return f"{chosen.strategy} is what the spec asks for; it fits ({room}) and takes {took} per step"
    others = _best_of_each([lost for lost in fitting if lost.strategy != chosen.strategy])
    parts = [f"{chosen.strategy} takes {took} per step and fits ({room})", *_rivals(chosen, others)]
    smallest = sorted(too_large, key=lambda lost: lost.memory.total_bytes)
    fits = {candidate.strategy for candidate in fitting}
    never = _best_of_each([lost for lost in smallest if lost.strategy not in fits])
    return "; ".join([*parts, *(f"{lost.strategy} does not fit: {_shortfall(lost)}" for lost in never)])


def _rivals(chosen: Candidate, others: list[Candidate]) -> list[str]:
    """In words: which strategies are as fast, and how much slower the others are."""
    seconds = chosen.step_time.seconds
    limit = (1 + TIE) * min(candidate.step_time.seconds for candidate in [chosen, *others])
    even = [lost.strategy for lost in others if lost.step_time.seconds <= limit]
    slower = [
        f"{lost.strategy} {show_time(lost.step_time.seconds)} (+{lost.step_time.seconds / seconds - 1:.0%})"
        for lost in others
        if lost.step_time.seconds > limit
    ]
    parts = [f"no slower than {', '.join(even)} to within {TIE:.0%}, and simpler or with less to send"] if even else []
    return parts + ([f"faster than {', '.join(slower)}"] if slower else [])


def _best_of_each(candidates: list[Candidate]) -> list[Candidate]:
    """The first of each strategy."""
    return list({candidate.strategy: candidate for candidate in reversed(candidates)}.values())[::-1]


def _shortfall(candidate: Candidate) -> str:
    """Of the first place that is too small; of the accelerator where none is."""
    memory = next(iter(candidate.too_small), candidate.memory)
    assert memory.usable_bytes is not None, "what has no limit is never too small"
    largest = sorted(memory.items, key=lambda item: -item.num_bytes)[:3]
    parts = ", ".join(f"{item.name} {show_bytes(item.num_bytes)}" for item in largest)
    where = {"rank": "", "host": " in the RAM of a node", "nvme": " on the NVMe disks of a node"}[memory.place]
    return f"{show_bytes(memory.total_bytes)} needed{where}, {show_bytes(memory.usable_bytes)} usable ({parts})"


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
