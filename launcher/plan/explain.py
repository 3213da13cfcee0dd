"""A plan in words, for a terminal: the choice, memory and time as bars, what lost and why."""

from __future__ import annotations

from launcher.plan.values import Memory, Plan, StepTime
from launcher.units import show_bytes, show_count, show_time

BAR_WIDTH = 28


def explain(plan: Plan, most_rejected: int = 5) -> str:
    """Several lines of plain text."""
    lines = [*_head(plan), "", *_memory(plan.chosen.memory), "", *_step_time(plan), "", f"why: {plan.reason}"]
    if plan.alternatives:
        lines += ["", "also fits:"]
        lines += [
            f"  {c.label}: {show_time(c.step_time.seconds)} per step, {show_bytes(c.memory.total_bytes)}"
            for c in plan.alternatives[:most_rejected]
        ]
    if plan.rejected:
        lines += ["", "does not fit:"]
        lines += [f"  {lost.candidate.label}: {lost.reason}" for lost in plan.rejected[:most_rejected]]
        left_out = len(plan.rejected) - most_rejected
        lines += [f"  and {left_out} more (--json has all)"] if left_out > 0 else []
    return "\n".join(lines)


def _head(plan: Plan) -> list[str]:
    chosen, layout = plan.chosen, plan.chosen.layout
    ranks = f"{plan.num_ranks} ranks" if plan.nodes == 1 else f"{plan.nodes} nodes x {plan.gpus_per_node} ranks"
    return [
        f"plan {plan.digest()}: {chosen.strategy} ({plan.engine}) on {ranks} ({plan.device}), {layout.precision}",
        f"  model       {show_count(plan.num_params)} parameters, sequence length {plan.seq_len}",
        f"  batch       {plan.global_batch_size} samples = micro-batch {layout.micro_batch_size}"
        f" x {layout.accumulation_steps} accumulation x {plan.num_ranks} ranks",
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
    lines.append(f"  {'total':<20} {total}  {share:.0%} of {show_bytes(usable)} usable")
    return lines


def _step_time(plan: Plan) -> list[str]:
    time = plan.chosen.step_time
    largest = max(item.seconds for item in time.items)
    lines = ["time per optimiser step, predicted:"]
    lines += [_line(item.name, show_time(item.seconds), item.seconds / largest, item.formula) for item in time.items]
    lines.append(f"  {'total':<20} {show_time(time.seconds):>10}  {_speed(time)}")
    if plan.job_seconds is not None:
        lines.append(
            f"  {'job':<20} {show_time(plan.job_seconds):>10}  for {plan.num_steps} step{'s' if plan.num_steps != 1 else ''}"
        )
    return lines


def _speed(time: StepTime) -> str:
    rates = (time.tokens_per_second, time.tokens_per_second_per_rank)
    every, each = (show_count(float(f"{rate:.3g}")) for rate in rates)
    return f"{every} tokens/s, {each} per rank, {time.mfu:.1%} MFU, mostly bound by {time.bound_by}"


def _line(name: str, size: str, share: float, formula: str) -> str:
    bar = "█" * max(1, round(BAR_WIDTH * share))
    return f"  {name:<20} {size:>10}  {bar:<{BAR_WIDTH}}  {formula}"
