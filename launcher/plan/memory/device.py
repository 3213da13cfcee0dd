"""The account of one rank's accelerator at the peak of a step."""

from __future__ import annotations

from collections.abc import Callable

from launcher.cost.values import ModelCost
from launcher.job.cluster import Cluster
from launcher.plan.layout import Layout
from launcher.plan.memory.activations import activations, in_last_block, remaining
from launcher.plan.memory.phases import State, total
from launcher.plan.memory.torch_state import ddp, fsdp
from launcher.plan.memory.zero import zero_1_2, zero_3
from launcher.plan.values import Item, Memory

FRAGMENTATION = 0.05
"""Share of the total that the caching allocator loses to rounding and holes: a margin, not a measurement."""

_STATE: dict[str, Callable[[ModelCost, Layout], State]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "hsdp": fsdp,
    "zero1": zero_1_2,
    "zero2": zero_1_2,
    "zero3": zero_3,
    "hpz": zero_3,
}


def rank_memory(cost: ModelCost, cluster: Cluster, layout: Layout) -> Memory:
    """Account of one rank: the highest of the step's moments. The context is taken off what is usable."""
    state, on_cpu = _STATE[layout.strategy](cost, layout), cluster.gpu.kind == "cpu"
    moments = {
        "when backward begins": (*state.begin, *activations(cost, layout, on_cpu)),
        "in the last block's backward": (*state.blocks, *in_last_block(cost, layout, on_cpu)),
        "when backward ends": (*state.end, *remaining(cost, layout, on_cpu)),
        "in the optimiser's update": state.update,
    }
    moment = max(moments, key=lambda name: total(moments[name]))
    items = (*state.kept, *moments[moment])
    margin = round(total(items) * FRAGMENTATION)
    words = f"{FRAGMENTATION:.0%} of the above, a margin"
    items = (*items, Item("fragmentation", margin, words, "torch c10/cuda/CUDACachingAllocator.cpp", "margin"))
    usable_bytes = cluster.memory_bytes_per_rank(layout.ranks_per_node)
    return Memory(tuple(item for item in items if item.num_bytes), usable_bytes, moment=moment)
