"""Bytes of torch's engines: DDP, and FSDP2 with a group per block and one for the rest. s bytes of an element of state."""

from __future__ import annotations

from launcher.cost.values import ModelCost
from launcher.plan.layout import FP32, Layout
from launcher.plan.memory.phases import State
from launcher.plan.memory.shards import Held, by_rows, largest_outside, trained_outside, trained_per_block, whole
from launcher.plan.values import Item

BF16 = 2
STEP_COUNTER = 4
"""Bytes: AdamW keeps the number of its steps as an fp32 tensor for each parameter."""
_ADAMW = "torch optim/adamw.py _init_group: exp_avg, exp_avg_sq, step"
_REDUCER = "torch nn/parallel/distributed.py DistributedDataParallel, gradient_as_bucket_view"
_PARAM = "torch distributed/fsdp/_fully_shard/_fsdp_param.py"
_COLLECTIVES = "torch distributed/fsdp/_fully_shard/_fsdp_collectives.py"


def state_bytes(layout: Layout) -> int:
    """Of an element of parameters, gradients and moments."""
    return BF16 if layout.precision == "pure_bf16" else layout.state_bytes


def ddp(cost: ModelCost, layout: Layout) -> State:
    """A replica. One rank alone is not wrapped: its gradients come and go."""
    kept, held = state_bytes(layout), whole(cost)
    gradients = Item("gradients", kept * held.trained, f"{kept} P', views of the reduction buckets", _REDUCER)
    always = layout.num_ranks > 1
    between = always or layout.accumulation_steps > 1
    casts = BF16 * cost.num_params if layout.precision == "bf16" else 0
    copies = Item("autocast copies", casts, "2 P: weights cast once per forward pass", "torch amp, cache_enabled")
    return State(
        kept=(
            Item("parameters", kept * held.all, f"{kept} P", "launcher/train/torch_engine.py"),
            moments(cost, held, kept, f"{2 * kept} P'"),
            *([gradients] if always else []),
        ),
        begin=(*([gradients] if between and not always else []), copies),
        blocks=(gradients if between and not always else head_gradient(cost, kept), copies)
        if not always
        else (copies,),
        end=() if always else (gradients,),
        update=() if always else (gradients,),
    )


def moments(cost: ModelCost, held: Held, element: int, formula: str) -> Item:
    counters = STEP_COUNTER * sum(group.count for group in cost.tensors if group.trainable)
    words = f"{formula}: two moments" + (", and the step counters" if counters else "")
    return Item("optimiser", 2 * element * held.trained + counters, words, _ADAMW)


def sharded(cost: ModelCost, layout: Layout) -> list[Item]:
    """What FSDP2 keeps of each parameter between its uses: on the accelerator, or on the host when offloaded."""
    kept, held = state_bytes(layout), by_rows(cost, layout.num_optimiser_shards)
    return [
        Item("parameters", kept * held.all, f"{kept} P / N by rows", f"{_PARAM} _init_sharded_param"),
        moments(cost, held, kept, f"{2 * kept} P' / N"),
        Item("gradients", kept * held.trained, f"{kept} P' / N", f"{_COLLECTIVES} foreach_reduce: views of its output"),
    ]


def fsdp(cost: ModelCost, layout: Layout) -> State:
    """hsdp is fsdp within a group; the copies' all-reduce works in place on the reduced gradients.

    The head's gradient is made right after the loss's peak, from memory that the allocator has not had back: counted with it.
    """
    on_host = layout.offload_params == "cpu"
    gathered, buffers = _gathered(cost, layout), _all_gather_buffers(cost, layout)
    head = head_gradient(cost, layout.element_bytes)
    return State(
        kept=(*([] if on_host else sharded(cost, layout)), *buffers),
        begin=(_gathered_at_loss(cost, layout), head),
        blocks=(gathered, head),
        end=(gathered, *_unreduced(cost, layout)),
        update=(),
    )


def _gathered(cost: ModelCost, layout: Layout) -> Item:
    """The root's group stays gathered through the step; of the blocks one at a time, or all that forward left."""
    element, source = layout.element_bytes, f"{_PARAM} alloc_all_gather_outputs"
    if layout.reshard_after_forward:
        words = "p x (outside blocks + 1 block)"
        return Item("gathered parameters", element * (cost.outside_num_params + cost.block_num_params), words, source)
    return Item("gathered parameters", element * cost.num_params, "p P, kept from forward to backward", source)


def _gathered_at_loss(cost: ModelCost, layout: Layout) -> Item:
    """Between the passes through the blocks, whose last one has been freed where blocks are."""
    if not layout.reshard_after_forward:
        return _gathered(cost, layout)
    size, words = layout.element_bytes * cost.outside_num_params, "p x outside blocks"
    return Item("gathered parameters", size, words, f"{_PARAM} alloc_all_gather_outputs")


def _all_gather_buffers(cost: ModelCost, layout: Layout) -> list[Item]:
    """Flat outputs, on their own stream: in forward the last one is freed after the next is copied out."""
    if layout.num_optimiser_shards == 1:
        return []
    size = layout.element_bytes * (max(cost.outside_num_params, cost.block_num_params) + cost.block_num_params)
    words = "p x (outside blocks or a block, and the next block), on a stream of its own"
    return [Item("all-gather buffers", size, words, f"{_COLLECTIVES} foreach_all_gather")]


def head_gradient(cost: ModelCost, element: int) -> Item:
    """The first that backward makes; FSDP's root keeps it to the end."""
    return Item("gradient of the head", element * largest_outside(cost), f"{element} x its elements", "autograd")


def _unreduced(cost: ModelCost, layout: Layout) -> list[Item]:
    """The root reduces last: its whole gradients, their copy for the collective, and the last block's copy."""
    outside, block = trained_outside(cost), trained_per_block(cost)
    return [
        Item(
            "whole gradients", layout.element_bytes * outside, "p x outside blocks, before they are reduced", "autograd"
        ),
        Item(
            "reduce-scatter buffers",
            reduce_element(layout) * (outside + block),
            f"{reduce_element(layout)} x (outside blocks + 1 block)",
            f"{_COLLECTIVES} foreach_reduce, _fsdp_param_group.py reduce_scatter_max_input_buffers",
        ),
    ]


def reduce_element(layout: Layout) -> int:
    """Bytes of a gradient element on its way between ranks."""
    return min(layout.reduce_bytes, FP32)
