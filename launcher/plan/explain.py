"""A plan in words, for a terminal: the choice, memory and time as bars, what lost and why."""

from __future__ import annotations

from launcher.plan.values import Candidate, Memory, Plan, StepTime
from launcher.units import show_bytes, show_count, show_time

BAR_WIDTH = 28


def explain(plan: Plan, most: int = 8) -> str:
    """Several lines of plain text; at most `most` of what else fits, and of what does not."""
    places = [line for place in (plan.chosen.host, plan.chosen.nvme, plan.chosen.disk) for line in _place(place)]
    lines = [*_head(plan), "", *_memory(plan.chosen.memory), *places, "", *_step_time(plan), ""]
    lines += [f"why: {plan.reason}", *(f"note: {note}" for note in plan.notes)]
    if plan.alternatives:
        lines += ["", "also fits:", *_first_ones([_alternative(c) for c in best_first(plan.alternatives)], most)]
    if plan.rejected:
        reasons = {lost.candidate: lost.reason for lost in plan.rejected}
        lost = best_first(tuple(reasons))
        lines += ["", "does not fit:", *_first_ones([f"{c.label}: {reasons[c]}" for c in lost], most)]
    return "\n".join(lines)


def best_first(candidates: tuple[Candidate, ...]) -> list[Candidate]:
    """The best of each strategy in their order, then the rest in theirs."""
    best = list({c.strategy: c for c in reversed(candidates)}.values())[::-1]
    firsts = sorted(best, key=candidates.index)
    return firsts + [candidate for candidate in candidates if candidate not in firsts]


def _alternative(candidate: Candidate) -> str:
    took, room = show_time(candidate.step_time.seconds), show_bytes(candidate.memory.total_bytes)
    return f"{candidate.label}: {took} per step, {room}"


def _first_ones(lines: list[str], most: int) -> list[str]:
    left_out = len(lines) - most
    return [f"  {line}" for line in lines[:most]] + [f"  and {left_out} more (--json has all)"] * (left_out > 0)


def _head(plan: Plan) -> list[str]:
    chosen, layout = plan.chosen, plan.chosen.layout
    each = "rank" if plan.gpus_per_node == 1 else "ranks"
    ranks = f"{plan.num_ranks} {each}" if plan.nodes == 1 else f"{plan.nodes} nodes x {plan.gpus_per_node} {each}"
    return [
        f"plan {plan.digest()}: {chosen.strategy} ({plan.engine}) on {ranks} ({plan.device}), {layout.precision}",
        f"  model       {show_count(plan.num_params)} parameters, sequence length {plan.seq_len}",
        f"  batch       {plan.global_batch_size} samples = micro-batch {layout.micro_batch_size}"
        f" x {layout.accumulation_steps} accumulation x {plan.num_ranks} {'rank' if plan.num_ranks == 1 else 'ranks'}",
        f"  recompute   {layout.recompute}",
        f"  sent        {show_bytes(chosen.communication_bytes)} per rank and step",
    ]


def _memory(memory: Memory) -> list[str]:
    largest = max(item.num_bytes for item in memory.items)
    lines = [f"memory per rank at the peak, {memory.moment}:"]
    lines += [
        _line(item.name, show_bytes(item.num_bytes), item.num_bytes / largest, item.formula) for item in memory.items
    ]
    usable = memory.usable_bytes or 0
    share = memory.total_bytes / usable if usable > 0 else float("inf")
    total = f"{show_bytes(memory.total_bytes):>10}"
    band = f"between {show_bytes(memory.low_bytes)} and {show_bytes(memory.high_bytes)}"
    lines.append(f"  {'total':<20} {total}  {share:.0%} of {show_bytes(usable)} usable; {band}")
    return lines


_PLACES = {"host": "RAM of a node", "nvme": "NVMe of a node", "disk": "checkpoints"}


def _place(memory: Memory) -> list[str]:
    """One line, its items in brackets; nothing where nothing is kept."""
    if not memory.items:
        return []
    largest = sorted(memory.items, key=lambda item: -item.num_bytes)
    parts = ", ".join(f"{item.name} {show_bytes(item.num_bytes)}" for item in largest[:4])
    usable = f"of {show_bytes(memory.usable_bytes)} " if memory.usable_bytes is not None else ""
    return [f"  {_PLACES[memory.place]:<20} {show_bytes(memory.total_bytes):>10}  {usable}({parts})"]


def _step_time(plan: Plan) -> list[str]:
    time = plan.chosen.step_time
    largest = max(item.seconds for item in time.items)
    lines = ["time per optimiser step, predicted:"]
    lines += [_line(item.name, show_time(item.seconds), item.seconds / largest, item.formula) for item in time.items]
    lines.append(f"  {'total':<20} {show_time(time.seconds):>10}  {_speed(time)}")
    return lines + _job(plan)


def _job(plan: Plan) -> list[str]:
    """How long all of it takes; what is missing for that, where it is not known."""
    if plan.job_seconds is None or plan.gpu_hours is None:
        return [f"  {'job':<20} {'?':>10}  epochs of data that are not prepared yet: `fleetune prepare` counts them"]
    steps = f"for {plan.num_steps} step{'s' if plan.num_steps != 1 else ''}"
    kind = "GPU-hours" if plan.device != "cpu" else "rank-hours"
    hours = f"{show_count(float(f'{plan.gpu_hours:.3g}'))} {kind}"
    price = "" if plan.price is None else f", {plan.price:,.2f} {plan.currency}"
    return [f"  {'job':<20} {show_time(plan.job_seconds):>10}  {steps}: {hours}{price}"]


def _speed(time: StepTime) -> str:
    rates = (time.tokens_per_second, time.tokens_per_second_per_rank)
    every, each = (show_count(float(f"{rate:.3g}")) for rate in rates)
    return f"{every} tokens/s, {each} per rank, {time.mfu:.1%} MFU, mostly bound by {time.bound_by}"


def _line(name: str, size: str, share: float, formula: str) -> str:
    bar = "█" * max(1, round(BAR_WIDTH * share))
    return f"  {name:<20} {size:>10}  {bar:<{BAR_WIDTH}}  {formula}"
