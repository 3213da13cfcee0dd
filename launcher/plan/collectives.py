"""What the ranks send to each other in an optimiser step, over which links, and how long that takes.

P parameters, P' trained ones, N ranks, g ranks of a group, A accumulation steps, L blocks, p and r bytes of an element
gathered and reduced. A ring all-gather or reduce-scatter over n ranks sends (n-1)/n of the vector, an all-reduce twice
that. Sources: DeepSpeed 0.19 `runtime/zero/stage_1_and_2.py`, `stage3.py`; torch 2.13 `distributed/fsdp/_fully_shard`.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.cost.values import ModelCost
from launcher.job.cluster import Link
from launcher.plan.layout import Layout

DDP_BUCKET_BYTES = 25 * 2**20
"""torch's `bucket_cap_mb`: how much of the gradients one all-reduce takes."""
NODE_HOP_US, NETWORK_HOP_US = 1.9, 4.0
"""One step of a ring over NVLink and over the network: NCCL's own table (src/graph/tuning.cc, `hwLat`, ring, LL128)."""
HIDES = {"ddp": True, "zero1": False, "zero2": False, "zero3": True, "hpz": True, "fsdp": True, "hsdp": True}
"""Whether collectives run beside arithmetic; DeepSpeed's `overlap_comm` is off by default below stage 3."""


@dataclass(frozen=True)
class Ring:
    """Collectives of a step among the same ranks."""

    name: str
    num_bytes: int
    """Sent by one rank per optimiser step."""
    calls: int
    """Collectives per optimiser step."""
    gb_per_s: float
    """Achievable rate at one rank."""
    hops_us: float = 0.0
    """What the nodes after the first add to the latency of a collective."""

    def seconds(self, latency_us: float) -> float:
        """latency_us: of a small collective within one node."""
        return self.num_bytes / (self.gb_per_s * 1e9) + self.calls * (latency_us + self.hops_us) * 1e-6


def communication_bytes(cost: ModelCost, layout: Layout) -> int:
    """Bytes that one rank sends per optimiser step, over all links together."""
    return sum(sent for sent, _ in _sent(cost, layout).values())


def rings(cost: ModelCost, link: Link, layout: Layout) -> list[Ring]:
    """What is sent, by the ranks it is sent among; nothing where there is one rank."""
    group, per_node = layout.shard_group_size, layout.ranks_per_node
    members = {
        "collectives": (layout.num_ranks, per_node),
        "in groups": (group, min(group, per_node)),
        "between groups": (layout.num_ranks // max(1, group), per_node // group if 0 < group < per_node else 1),
    }
    return [
        Ring(name, sent, calls, ring_gb_per_s(link, *members[name]), ring_hops_us(*members[name]))
        for name, (sent, calls) in _sent(cost, layout).items()
        if members[name][0] > 1
    ]


def ring_gb_per_s(link: Link, num_members: int, members_per_node: int) -> float:
    """Rate at one rank of a ring: its slowest link. Members in one node use its network ports side by side."""
    inside, between = link.intra_node_gb_per_s, link.inter_node_gb_per_s * members_per_node
    if num_members <= members_per_node:
        return inside * link.link_share
    return (min(inside, between) if members_per_node > 1 else between) * link.link_share


def ring_hops_us(num_members: int, members_per_node: int) -> float:
    """Each further node lengthens the ring by one step across the network and one for each of its other members."""
    further = max(0, num_members // members_per_node - 1)
    return further * (NETWORK_HOP_US + (members_per_node - 1) * NODE_HOP_US)


def _sent(cost: ModelCost, layout: Layout) -> dict[str, tuple[int, int]]:
    """Bytes and calls per step: one call for each block and one for the rest, as the engines wrap them.

    ddp and zero1 reduce once per step; zero2, zero3 and fsdp with every micro-batch, which is what keeps their gradients
    sharded. zero3 and fsdp gather for forward and for backward, fsdp only once if the parameters stay gathered. hpz
    gathers over all ranks once after each update, then from the copy in its group. hsdp reduces inside the group, then
    its shard between the groups.
    """
    steps, num, group = layout.accumulation_steps, layout.num_ranks, layout.shard_group_size
    params, trained, element = cost.num_params, cost.num_trainable_params, layout.element_bytes
    units = cost.num_blocks + 1
    if layout.strategy == "ddp":
        buckets = -(-layout.gradient_bytes * trained // DDP_BUCKET_BYTES)
        return {"collectives": (2 * layout.gradient_bytes * _ring(trained, num), buckets)}
    if layout.strategy in ("zero1", "zero2"):
        reductions = steps if layout.strategy == "zero2" else 1
        return {"collectives": ((reductions + 1) * element * _ring(trained, num), (reductions + 1) * units)}
    gathers = (1 if not layout.reshard_after_forward else 2) * steps
    if layout.strategy in ("zero3", "fsdp"):
        reduced = element if layout.strategy == "zero3" else layout.reduce_bytes
        sent = gathers * element * _ring(params, num) + steps * reduced * _ring(trained, num)
        return {"collectives": (sent, (gathers + steps) * units)}
    if layout.strategy == "hpz":
        everywhere = element * _ring(params, num) + steps * element * _ring(trained, num)
        inside = (gathers - 1) * element * _ring(params, group)
        return {"collectives": (everywhere, (1 + steps) * units), "in groups": (inside, (gathers - 1) * units)}
    inside = gathers * element * _ring(params, group) + steps * layout.reduce_bytes * _ring(trained, group)
    between = steps * 2 * layout.reduce_bytes * _ring(-(-trained // group), num // group)
    return {"in groups": (inside, (gathers + steps) * units), "between groups": (between, steps * units)}


def _ring(elements: int, num_members: int) -> int:
    return elements * (num_members - 1) // num_members
