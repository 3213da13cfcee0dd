"""Bytes of DeepSpeed's ZeRO: flat partitions, the bucket that gradients are reduced in, gathered parameters.

In fp32 the masters are a copy all the same. `launcher.emit.deepspeed_json` writes the sizes below, which are counted here.
"""

from __future__ import annotations

from launcher.cost.values import ModelCost
from launcher.plan.layout import FP32, Layout
from launcher.plan.memory.phases import State
from launcher.plan.memory.shards import (
    Held,
    by_elements,
    by_group,
    flat_groups,
    largest_tensor,
    num_groups,
    persistent,
)
from launcher.plan.memory.torch_state import head_gradient
from launcher.plan.values import Item

REDUCE_BUCKET_ELEMENTS = 50_000_000
"""Elements that ZeRO collects before it reduces. DeepSpeed's default of 5e8 would cost 2 GB of fp32 on every rank."""
PREFETCH_ELEMENTS = 50_000_000
"""`stage3_prefetch_bucket_size`."""
MAX_LIVE_ELEMENTS = 1_000_000_000
"""`stage3_max_live_parameters` and `stage3_max_reuse_distance`: up to here ZeRO-3 keeps what it has gathered."""
PERSISTENT_ELEMENTS = 100_000
"""`stage3_param_persistence_threshold`: parameters no larger are gathered for good."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""`sub_group_size`: ZeRO-3 updates so many elements at a time."""
STEP_COUNTER = 4
_STAGE_2 = "deepspeed runtime/zero/stage_1_and_2.py"
_STAGE_3 = "deepspeed runtime/zero/stage3.py"
_PARTITION = "deepspeed runtime/zero/partition_parameters.py"
_COORDINATOR = "deepspeed runtime/zero/partitioned_param_coordinator.py"


def zero_1_2(cost: ModelCost, layout: Layout) -> State:
    """zero1 keeps whole gradients until the last micro-batch, zero2 those that touch its partition."""
    element, part = layout.element_bytes, by_group(cost, layout.num_ranks)
    on_host = layout.offload_optimizer != "none"
    flat = sum(flat_groups(cost, layout.num_ranks))
    kept = [
        Item(
            "parameters",
            element * (flat + part.frozen),
            "p P, trained ones flat",
            f"{_STAGE_2} flatten_dense_tensors_aligned",
        ),
        *(_staging(cost, element) if on_host else _masters(part, num_groups(cost))),
    ]
    begin, end = _gradients_1_2(cost, layout, part)
    buckets = (_bucket(element), _flat_copy(cost, element))
    update = [] if on_host else [_own_gradients(cost, layout, part), *_fp32_gradients(element, part.trained)]
    head = head_gradient(cost, element)
    return State(tuple(kept), (*begin, *buckets), (*begin, head, *buckets), (*end, *buckets), tuple(update))


def _gradients_1_2(cost: ModelCost, layout: Layout, part: Held) -> tuple[list[Item], list[Item]]:
    """On the accelerator when the last backward pass begins and when it ends."""
    own, accumulates = _own_gradients(cost, layout, part), layout.accumulation_steps > 1
    if layout.strategy == "zero1":
        size = layout.element_bytes * cost.num_trainable_params
        every = Item("gradients", size, "p P', until the last micro-batch", "autograd")
        return [every] if accumulates else [], [every] if layout.offload_optimizer != "none" else [every, own]
    if layout.offload_optimizer != "none":
        return [], []
    new = Item("new gradients", own.num_bytes, "the last micro-batch's, before they are added", own.source)
    return [own] if accumulates else [], [own, new] if accumulates else [own]


def _masters(part: Held, num_groups: int) -> list[Item]:
    return [
        Item(
            "fp32 masters",
            FP32 * part.trained,
            "4 P' / N, a copy even in fp32",
            f"{_STAGE_2} single_partition_of_fp32_groups",
        ),
        moments(part, num_groups),
    ]


def moments(part: Held, num_vectors: int) -> Item:
    """AdamW over one flat vector per optimiser group."""
    size = 2 * FP32 * part.trained + STEP_COUNTER * num_vectors
    return Item("optimiser", size, "8 P' / N: two moments", "torch optim/adamw.py over the fp32 partitions")


def _staging(cost: ModelCost, element: int) -> list[Item]:
    words = "p x the largest parameter, for gradients on their way to the host"
    return [
        Item("offload staging", element * largest_tensor(cost), words, f"{_STAGE_2} temp_grad_buffer_for_gpu_offload")
    ]


def _own_gradients(cost: ModelCost, layout: Layout, part: Held) -> Item:
    """Parameters that straddle two partitions are kept whole by both; the largest one stands for them."""
    spill = largest_tensor(cost) if cost.tensors and layout.num_ranks > 1 else 0
    size = min(part.trained + spill, part.trained * layout.num_ranks)
    words = "p x (P' / N + the largest parameter)" if spill else "p P' / N"
    name = "own gradients" if layout.strategy == "zero1" else "gradients"
    return Item(name, layout.element_bytes * size, words, f"{_STAGE_2} copy_grads_in_partition: grads_in_partition")


def _bucket(element: int) -> Item:
    return Item(
        "reduction bucket", element * REDUCE_BUCKET_ELEMENTS, "p x reduce_bucket_size", f"{_STAGE_2} setup_buckets"
    )


def _flat_copy(cost: ModelCost, element: int) -> Item:
    """The bucket's slices are put together once more for the collective; a parameter larger than the bucket goes alone."""
    size = min(max(REDUCE_BUCKET_ELEMENTS, largest_tensor(cost)), cost.num_trainable_params)
    return Item(
        "reduction copy", element * size, "p x what is reduced at once", f"{_STAGE_2} allreduce_bucket: flatten"
    )


def _fp32_gradients(element: int, trained: int) -> list[Item]:
    flat = Item(
        "flat gradients", element * trained, "p P' / N, put together for the update", f"{_STAGE_2} step: flatten"
    )
    if element == FP32:
        return [flat]
    return [flat, Item("fp32 gradients", FP32 * trained, "4 P' / N, made for the update", f"{_STAGE_2} step")]


def zero_3(cost: ModelCost, layout: Layout) -> State:
    """hpz adds a copy of the parameters within each group."""
    element, held = layout.element_bytes, by_elements(cost, layout.num_optimiser_shards)
    groups = num_groups(cost)
    kept = [
        *([] if layout.offload_params != "none" else [partitions(element, held)]),
        *([] if layout.offload_optimizer != "none" else [*optimiser_3(element, held, groups)]),
        *([_secondary(held, layout)] if layout.strategy == "hpz" else []),
        *_live(cost, layout),
        Item(
            "reduction bucket",
            element * REDUCE_BUCKET_ELEMENTS,
            "p x reduce_bucket_size",
            f"{_STAGE_3} _setup_for_real_optimizer",
        ),
        _interleaved(cost, element),
    ]
    at_once = min(held.trained, SUB_GROUP_ELEMENTS)
    update = () if layout.offload_optimizer != "none" else _fp32_gradients_3(element, at_once)
    head, largest = head_gradient(cost, element), _largest_gradient(cost, element)
    return State(tuple(kept), (), (head,), (largest,), tuple(update))


def partitions(element: int, held: Held) -> Item:
    return Item("parameters", element * held.all, "p P / N, each padded", f"{_PARTITION} _partition_param")


def optimiser_3(element: int, held: Held, num_groups: int) -> list[Item]:
    """On the accelerator, or on the host when offloaded."""
    return [
        Item(
            "fp32 masters", FP32 * held.trained, "4 P' / N, a copy even in fp32", f"{_STAGE_3} _create_fp32_partitions"
        ),
        moments(held, num_groups),
        Item("gradients", element * held.trained, "p P' / N", f"{_STAGE_3} grad_partitions_flat_buffer"),
    ]


def _secondary(held: Held, layout: Layout) -> Item:
    part = held.all * layout.num_ranks // layout.shard_group_size
    words = "p P / g: all parameters once in every group"
    return Item("secondary copy", layout.element_bytes * part, words, f"{_PARTITION} ds_secondary_tensor")


def _live(cost: ModelCost, layout: Layout) -> list[Item]:
    """Released only when the next use is farther than the reuse distance, and gathered ahead up to the live limit."""
    element, small = layout.element_bytes, persistent(cost, PERSISTENT_ELEMENTS, layout.num_ranks)
    needed = cost.outside_num_params + cost.block_num_params
    live = min(max(0, cost.num_params - small), max(needed, MAX_LIVE_ELEMENTS))
    flat = min(PREFETCH_ELEMENTS + largest_tensor(cost), cost.num_params)
    return [
        Item("persistent parameters", element * small, "p x those of at most 1e5 elements", "deepspeed runtime/zero/parameter_offload.py mark_persistent_parameters"),
        Item("gathered parameters", element * live, "p x min(P, stage3_max_live_parameters)", f"{_COORDINATOR} __params_to_release", "bound"),
        Item("all-gather buffer", element * flat, "p x (prefetch bucket + the largest parameter)", f"{_PARTITION} _all_gather_coalesced"),
    ]  # fmt: skip


def _interleaved(cost: ModelCost, element: int) -> Item:
    size = min(max(REDUCE_BUCKET_ELEMENTS, largest_tensor(cost)), cost.num_trainable_params)
    words = "p x what is reduced at once, on a stream of its own"
    source = "deepspeed runtime/comm/coalesced_collectives.py reduce_scatter_coalesced"
    return Item("reduction copy", element * size, words, source)


def _largest_gradient(cost: ModelCost, element: int) -> Item:
    return Item("whole gradient", element * largest_tensor(cost), "p x the largest parameter", "autograd")


def _fp32_gradients_3(element: int, at_once: int) -> list[Item]:
    source = f"{_STAGE_3} _prepare_fp32_grad_for_sub_group"
    flat = Item("flat gradients", element * at_once, "p x min(P' / N, sub_group_size)", source)
    fp32 = Item("fp32 gradients", FP32 * at_once, "4 x min(P' / N, sub_group_size)", source)
    return [flat] if element == FP32 else [flat, fp32]
