"""A plan in words, for a terminal: the choice, the memory as a bar, what lost and why."""

from __future__ import annotations

from launcher.plan.values import Memory, Plan
from launcher.units import show_bytes, show_count

BAR_WIDTH = 28


def explain(plan: Plan, most_rejected: int = 5) -> str:
    """Several lines of plain text."""
    lines = [*_head(plan), "", *_memory(plan.chosen.memory), "", f"why: {plan.reason}"]
    if plan.alternatives:
        lines += ["", "also fits:"]
        lines += [f"  {c.label}: {show_bytes(c.memory.total_bytes)}" for c in plan.alternatives[:most_rejected]]
    if plan.rejected:
        lines += ["", "does not fit:"]
        lines += [f"  {lost.candidate.label}: {lost.reason}" for lost in plan.rejected[:most_rejected]]
        left_out = len(plan.rejected) - most_rejected
        lines += [f"  and {left_out} more (--json has all)"] if left_out > 0 else []
    return "\n".join(lines)


def _head(plan: Plan) -> list[str]:
    chosen = plan.chosen
    ranks = f"{plan.num_ranks} ranks" if plan.nodes == 1 else f"{plan.nodes} nodes x {plan.gpus_per_node} ranks"
    return [
        f"plan {plan.digest()}: {chosen.strategy} ({plan.engine}) on {ranks} ({plan.device}), {chosen.precision}",
        f"  model       {show_count(plan.num_params)} parameters, sequence length {plan.seq_len}",
        f"  batch       {plan.global_batch_size} samples = micro-batch {chosen.micro_batch_size}"
        f" x {chosen.accumulation_steps} accumulation x {plan.num_ranks} ranks",
        f"  recompute   {chosen.recompute}",
        f"  sent        {show_bytes(chosen.communication_bytes)} per rank and step",
    ]


def _memory(memory: Memory) -> list[str]:
    largest = max(item.num_bytes for item in memory.items)
    lines = ["memory per rank at the peak:"]
    for item in memory.items:
        bar = "█" * max(1, round(BAR_WIDTH * item.num_bytes / largest))
        lines.append(f"  {item.name:<20} {show_bytes(item.num_bytes):>10}  {bar:<{BAR_WIDTH}}  {item.formula}")
    share = memory.total_bytes / memory.usable_bytes if memory.usable_bytes > 0 else float("inf")
    total = f"{show_bytes(memory.total_bytes):>10}"
    lines.append(f"  {'total':<20} {total}  {share:.0%} of {show_bytes(memory.usable_bytes)} usable")
    return lines
