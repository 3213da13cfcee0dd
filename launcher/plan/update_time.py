"""Seconds of the optimiser's step, where its state lies, and of the copies that offloading costs.

P' trained parameters, s ranks that share their state, A accumulation steps, p bytes of an element. An optimiser on the
host is bound by the node's memory, which its ranks share, as they share its NVMe disks. Sources: DeepSpeed 0.19
`runtime/zero/stage_1_and_2.py` and `stage3.py` (with every micro-batch the gradient shard goes down, and comes up again
to be added to the next), `runtime/swap_tensor` (not pipelined by default); torch 2.13 `_fully_shard/_fsdp_param.py`
(`CPUOffloadPolicy`: the fp32 shard is copied before each gather).
"""

from __future__ import annotations

from launcher.cost.values import ModelCost
from launcher.job.cluster import Cluster, Host
from launcher.plan.layout import ELEMENT_BYTES, FP32, Layout
from launcher.plan.values import TimeItem
from launcher.units import show_bytes

ADAMW_TOUCHES = 8
"""Elements moved per parameter: gradient read for its norm and for the update; weight and two moments read and written."""
HOST_MEMORY_SHARE = 0.8
"""Share of the RAM's bandwidth that a sweep over arrays reaches: STREAM's usual result, a working value."""
SWAPPED_BYTES = 2 * 3 * FP32 + 2 * FP32
"""Per parameter on NVMe and step: weight and two moments read and written, the gradient written and read."""


def update_items(cost: ModelCost, cluster: Cluster, layout: Layout, busy_seconds: float) -> list[TimeItem]:
    """The optimiser's step, with what is copied for it. Copies during a pass hide behind it as long as it lasts."""
    own = cost.num_trainable_params / layout.num_optimiser_shards
    if layout.offload_optimizer == "none":
        return [_on_device(cluster, layout, own)]
    items = [_copies(cost, cluster.host, layout, busy_seconds), _on_host(cluster.host, layout, own)]
    return [*items, *_swaps(cost, cluster.host, layout, own, busy_seconds)]


def _on_device(cluster: Cluster, layout: Layout, own: float) -> TimeItem:
    gpu = cluster.gpu
    touched, rate = ADAMW_TOUCHES * _state_bytes(layout), gpu.memory_gb_per_s * 1e9 * gpu.memory_share
    share = "P'" if layout.num_optimiser_shards == 1 else f"P' / {layout.num_optimiser_shards}"
    return TimeItem(
        "optimiser", touched * own / rate, f"{touched} {share} bytes at {rate / 1e9:.4g} GB/s", "memory bandwidth"
    )


def _on_host(host: Host, layout: Layout, own: float) -> TimeItem:
    touched = ADAMW_TOUCHES * _state_bytes(layout)
    rate = host.memory_gb_per_s * 1e9 * HOST_MEMORY_SHARE / layout.ranks_per_node
    formula = f"{touched} P' / {layout.num_optimiser_shards} bytes at {rate / 1e9:.4g} GB/s: RAM shared by {layout.ranks_per_node}"
    return TimeItem("optimiser", touched * own / rate, formula, "host memory")


def _state_bytes(layout: Layout) -> int:
    """Of an element of the optimiser's state."""
    return ELEMENT_BYTES["pure_bf16"] if layout.precision == "pure_bf16" else layout.state_bytes


def _copies(cost: ModelCost, host: Host, layout: Layout, busy_seconds: float) -> TimeItem:
    """Between host and device, per step and rank: during the passes, and after the update, which nothing hides."""
    during, after = _copied_bytes(cost, layout)
    room = busy_seconds / layout.accumulation_steps if layout.strategy == "zero1" else busy_seconds
    rate = host.device_gb_per_s * 1e9
    waited = max(0.0, during / rate - room) + after / rate
    formula = f"{show_bytes(during + after)} at {host.device_gb_per_s:g} GB/s"
    hidden = (during + after) / rate - waited
    formula += f", {hidden * rate / (during + after):.0%} hidden" if during + after else ""
    return TimeItem("copies to the host", waited, formula, "host link")


def _copied_bytes(cost: ModelCost, layout: Layout) -> tuple[float, float]:
    steps, shards = layout.accumulation_steps, layout.num_optimiser_shards
    held, trained = cost.num_params / shards, cost.num_trainable_params / shards
    if layout.engine == "torch":
        return steps * _state_bytes(layout) * (_gathers(layout) * held + trained), 0.0
    element = layout.element_bytes
    passes = min(steps, 2) if layout.strategy == "zero1" else steps  # zero1 has its sums on the device until the last
    gradients = element * trained * (2 * passes - 1)
    if layout.offload_params == "none":
        return gradients, element * trained
    return gradients + element * held * _gathers(layout) * steps, 0.0


def _gathers(layout: Layout) -> int:
    """Of every parameter, per micro-batch."""
    return 2 if layout.reshard_after_forward else 1


def _swaps(cost: ModelCost, host: Host, layout: Layout, own: float, busy_seconds: float) -> list[TimeItem]:
    """To and from the node's NVMe disks: the states around the update, the parameters before each gather."""
    if "nvme" not in (layout.offload_optimizer, layout.offload_params):
        return []
    rate = (host.nvme_gb_per_s or float("nan")) * 1e9 / layout.ranks_per_node
    states = SWAPPED_BYTES * own if layout.offload_optimizer == "nvme" else 0.0
    shard = layout.element_bytes * cost.num_params / layout.num_ranks
    read = shard * _gathers(layout) * layout.accumulation_steps if layout.offload_params == "nvme" else 0.0
    waited = states / rate + max(0.0, read / rate - busy_seconds)
    formula = f"{show_bytes(states + read)} at {rate / 1e9:.4g} GB/s: disks shared by {layout.ranks_per_node}"
    return [TimeItem("NVMe", waited, formula, "disk")]
