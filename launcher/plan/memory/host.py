"""A node beside its accelerators: RAM while the model is loaded and while it is trained, and NVMe disks."""

from __future__ import annotations

from launcher.cost.values import ModelCost
from launcher.job.cluster import Cluster
from launcher.plan.layout import FP32, Layout
from launcher.plan.memory.shards import by_elements, by_group, largest_tensor, num_groups
from launcher.plan.memory.torch_state import sharded
from launcher.plan.memory.zero import SUB_GROUP_ELEMENTS, moments, optimiser_3, partitions
from launcher.plan.values import Item, Memory
from launcher.units import GIB

PROCESS_BYTES = 3 * GIB
"""Of a rank: Python, torch, CUDA's libraries and transformers resident in memory. A working value."""
PARAM_BUFFERS, PARAM_BUFFER_ELEMENTS = 5, 100_000_000
"""DeepSpeed's `offload_param.buffer_count` and `buffer_size`."""
OPTIMIZER_BUFFERS = 4
"""DeepSpeed's `offload_optimizer.buffer_count`."""
_SWAP = "deepspeed runtime/swap_tensor"


def host_memory(cost: ModelCost, cluster: Cluster, layout: Layout) -> Memory:
    """RAM of one node at the higher of two moments: loading, and training with what is offloaded.

    On a CPU cluster the ranks' own account is of the same RAM, so only loading is counted here.
    """
    ranks = layout.ranks_per_node
    process = Item("processes", ranks * PROCESS_BYTES, f"{ranks} x 3 GiB, a working value", "assumed", "assumed")
    loading = Item("loading", FP32 * cost.num_params, "4 P: one rank has them all", "launcher/train/handout.py")
    training = [] if cluster.gpu.kind == "cpu" else [_times(ranks, item) for item in offloaded(cost, layout)]
    held = max([loading], training, key=lambda items: sum(item.num_bytes for item in items))
    base = [] if cluster.gpu.kind == "cpu" else [process]
    return Memory(tuple(item for item in (*base, *held) if item.num_bytes), cluster.host_bytes_per_node(), "host")


def nvme_memory(cost: ModelCost, cluster: Cluster, layout: Layout) -> Memory:
    """Files of one node's ranks."""
    held, ranks = by_elements(cost, layout.num_optimiser_shards), layout.ranks_per_node
    items = []
    if layout.offload_optimizer == "nvme":
        words = f"{ranks} x 16 P' / N: masters, moments and gradients in fp32"
        items.append(Item("optimiser", ranks * 4 * FP32 * held.trained, words, f"{_SWAP}/optimizer_utils.py"))
    if layout.offload_params == "nvme":
        size = ranks * layout.element_bytes * held.all
        items.append(Item("parameters", size, f"{ranks} x p P / N", f"{_SWAP}/partitioned_param_swapper.py"))
    return Memory(tuple(items), int((cluster.host.nvme_gib or 0) * GIB), "nvme")


def offloaded(cost: ModelCost, layout: Layout) -> list[Item]:
    """Of one rank."""
    if layout.strategy in ("fsdp", "hsdp"):
        return sharded(cost, layout) if layout.offload_params == "cpu" else []
    if layout.strategy in ("zero1", "zero2"):
        return _zero_1_2(cost, layout) if layout.offload_optimizer == "cpu" else []
    if layout.strategy in ("zero3", "hpz"):
        return _zero_3(cost, layout)
    return []


def _zero_1_2(cost: ModelCost, layout: Layout) -> list[Item]:
    source = "deepspeed runtime/zero/stage_1_and_2.py"
    part, element = by_group(cost, layout.num_ranks), layout.element_bytes
    accumulated = element * part.trained if layout.accumulation_steps > 1 else 0
    return [
        Item("fp32 masters", FP32 * part.trained, "4 P' / N, pinned", f"{source} single_partition_of_fp32_groups"),
        moments(part, num_groups(cost)),
        Item("fp32 gradients", FP32 * part.trained, "4 P' / N, pinned", f"{source} initialize_optimizer_states"),
        Item("updated parameters", element * part.trained, "p P' / N, pinned", f"{source} param_buffer_of_bit16_for_cpu_offload_groups"),
        Item("accumulated gradients", accumulated, "p P' / N, pinned", f"{source} accumulated_grads_in_cpu"),
        Item("staging", element * largest_tensor(cost), "p x the largest parameter", f"{source} temp_grad_buffer_for_cpu_offload"),
    ]  # fmt: skip


def _zero_3(cost: ModelCost, layout: Layout) -> list[Item]:
    held, element = by_elements(cost, layout.num_optimiser_shards), layout.element_bytes
    items = []
    if layout.offload_optimizer == "cpu":
        items += optimiser_3(element, held, num_groups(cost))
        items.append(
            Item(
                "fp32 gradients",
                FP32 * held.trained,
                "4 P' / N, pinned",
                "deepspeed runtime/zero/stage3.py initialize_optimizer_states",
            )
        )
    elif layout.offload_optimizer == "nvme":
        largest = min(held.trained, SUB_GROUP_ELEMENTS)
        words = f"{OPTIMIZER_BUFFERS} x 4 x min(P' / N, sub_group_size), pinned"
        items.append(
            Item(
                "optimiser buffers",
                OPTIMIZER_BUFFERS * FP32 * largest,
                words,
                f"{_SWAP}/optimizer_utils.py SwapBufferManager",
            )
        )
        items.append(
            Item(
                "gradients",
                element * held.trained,
                "p P' / N, pinned",
                "deepspeed runtime/zero/stage3.py grad_partitions_flat_buffer",
            )
        )
    if layout.offload_params == "cpu":
        items.append(partitions(element, held))
    elif layout.offload_params == "nvme":
        size = element * PARAM_BUFFERS * PARAM_BUFFER_ELEMENTS
        items.append(
            Item("parameter buffers", size, "p x 5 x 1e8, pinned", f"{_SWAP}/partitioned_param_swapper.py buffers")
        )
    return items


def _times(ranks: int, item: Item) -> Item:
    return Item(item.name, ranks * item.num_bytes, f"{ranks} x {item.formula}", item.source, item.basis)
