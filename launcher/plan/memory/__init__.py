"""Bytes of a layout, place by place and item by item, as each engine really allocates them. AdamW.

P parameters, P' those that are trained, N ranks that share a state, p bytes of an element in forward and backward,
B micro-batch, T length. Each item names the source it was read in: DeepSpeed 0.19, torch 2.13.
"""

from launcher.plan.memory.activations import loss_bytes, saved_of
from launcher.plan.memory.device import FRAGMENTATION, rank_memory
from launcher.plan.memory.disk import checkpoint_disk
from launcher.plan.memory.host import host_memory, nvme_memory
from launcher.plan.memory.zero import REDUCE_BUCKET_ELEMENTS

__all__ = [
    "FRAGMENTATION",
    "REDUCE_BUCKET_ELEMENTS",
    "checkpoint_disk",
    "host_memory",
    "loss_bytes",
    "nvme_memory",
    "rank_memory",
    "saved_of",
]
