"""(JobSpec, ModelCost, Cluster) -> Plan: the best layout that fits, and the argument for it in words."""

from __future__ import annotations

import math
from collections.abc import Callable

from launcher.cost.values import ModelCost
from launcher.job.cluster import Cluster
from launcher.job.spec import JobSpec
from launcher.plan.advice import changes, nothing_fits
from launcher.plan.knobs import precision_of
from launcher.plan.search import TIE, Search
from launcher.plan.values import Candidate, Plan, Rejected
from launcher.units import show_bytes, show_time


def make_plan(
    spec: JobSpec,
    cost: ModelCost,
    cluster: Cluster,
    num_samples: int | None = None,
    cost_of: Callable[[JobSpec], ModelCost] | None = None,
    advise: bool = True,
) -> Plan:
    """The best plan that fits.

    num_samples: training samples, where they are counted already; the length of a job given in epochs follows.
    cost_of: measures the model of another spec, so that adapters can be tried where nothing fits.
    advise: whether to look for what would fit, where nothing does.
    Raises `SpecError` for impossible arithmetic and options, `PlanError` with what would fit where nothing does.
    """
    fitting, lost = Search(spec, cost, cluster).candidates()
    if not fitting:
        raise nothing_fits(spec, lost, list(changes(spec, cost, cluster, cost_of)) if advise else [])
    return Plan(
        chosen=fitting[0],
        nodes=spec.cluster.nodes,
        gpus_per_node=spec.cluster.gpus_per_node,
        device=cluster.gpu.kind,
        global_batch_size=spec.training.global_batch_size,
        seq_len=spec.training.seq_len,
        num_params=cost.num_params,
        num_steps=_num_steps(spec, num_samples),
        price_per_gpu_hour=cluster.price_per_gpu_hour,
        currency=cluster.currency,
        reason=_reason(spec, fitting, lost),
        notes=_notes(spec, cluster, fitting[0]),
        alternatives=tuple(fitting[1:]),
        rejected=tuple(Rejected(candidate, candidate.shortfall) for candidate in lost),
    )


def _num_steps(spec: JobSpec, num_samples: int | None) -> int | None:
    training = spec.training
    if training.max_steps is not None or num_samples is None:
        return training.max_steps
    return math.ceil((training.num_epochs or 0) * num_samples / training.global_batch_size)


def _notes(spec: JobSpec, cluster: Cluster, chosen: Candidate) -> tuple[str, ...]:
    """What the reader must know of the figures."""
    gpu, asked = cluster.gpu, precision_of(spec, cluster)
    notes = []
    has = {"fp32": True, "fp16": gpu.fp16}.get(asked, gpu.bf16)
    if not has:
        notes.append(f"{gpu.name} has no units for {asked}, which runs no faster than fp32 there")
    if spec.parallel.precision == "auto" and gpu.fp16 and not gpu.bf16:
        notes.append(f"{gpu.name} has fp16 units and none for bf16: fp32 is planned; parallel.precision=fp16 is faster")
    unsure = [key for key, source in cluster.sources.items() if key.startswith("gpu.") and "extrapolated" in source]
    if unsure:
        notes.append(f"step times are extrapolated: no run on {gpu.name} is behind {', '.join(unsure)}")
    if chosen.layout.offload_optimizer != "none":
        notes.append("the time of offload is worked out from bandwidths and held against no run")
    return tuple(notes)


def _reason(spec: JobSpec, fitting: list[Candidate], lost: list[Candidate]) -> str:
    """Why the winner won: its time against the best of each other strategy, then what is faster but does not fit."""
    chosen = fitting[0]
    room = f"{show_bytes(chosen.memory.total_bytes)} of {show_bytes(chosen.memory.usable_bytes or 0)} per rank"
    took = show_time(chosen.step_time.seconds)
    if spec.parallel.strategy != "auto":
        return f"{chosen.strategy} is what the spec asks for; it fits ({room}) and takes {took} per step"
    others = best_of_each([other for other in fitting if other.strategy != chosen.strategy])
    parts = [f"{chosen.strategy} takes {took} per step and fits ({room})", *_rivals(chosen, others)]
    smallest = sorted(lost, key=lambda candidate: candidate.memory.total_bytes)
    fits = {candidate.strategy for candidate in fitting}
    never = best_of_each([candidate for candidate in smallest if candidate.strategy not in fits])
    return "; ".join([*parts, *(f"{other.strategy} does not fit: {other.shortfall}" for other in never)])


def _rivals(chosen: Candidate, others: list[Candidate]) -> list[str]:
    """In words: which strategies are as fast, and how much slower the others are."""
    seconds = chosen.step_time.seconds
    limit = (1 + TIE) * min([seconds, *(other.step_time.seconds for other in others if not other.memory.is_tight)])
    even = [other.strategy for other in others if other.step_time.seconds <= limit and not other.memory.is_tight]
    slower = [
        f"{_named(other)} {show_time(other.step_time.seconds)} (+{other.step_time.seconds / seconds - 1:.0%})"
        for other in others
        if other.step_time.seconds > max(limit, seconds)
    ]
    tight = [
        f"{_named(other)} {show_time(other.step_time.seconds)} (up to {show_bytes(other.memory.high_bytes)})"
        for other in others
        if other.memory.is_tight and other.step_time.seconds < seconds
    ]
    parts = [f"no slower than {', '.join(even)} to within {TIE:.0%}, and simpler or with less to send"] if even else []
    parts += [f"faster than {', '.join(slower)}"] if slower else []
    return parts + ([f"with more room than {', '.join(tight)}"] if tight else [])


def _named(candidate: Candidate) -> str:
    """With what it costs the layout to fit."""
    layout = candidate.layout
    costs = ["offload"] if {layout.offload_optimizer, layout.offload_params} != {"none"} else []
    costs += ["recompute"] if layout.recompute == "full" else []
    return f"{candidate.strategy} with {' and '.join(costs)}" if costs else candidate.strategy


def best_of_each(candidates: list[Candidate]) -> list[Candidate]:
    """The first of each strategy."""
    return list({candidate.strategy: candidate for candidate in reversed(candidates)}.values())[::-1]
