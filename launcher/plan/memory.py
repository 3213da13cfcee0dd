"""Bytes per rank, item by item, as each engine really allocates them. AdamW, every parameter trained.

P parameters, N ranks, p bytes of an element in forward and backward (4 in fp32, 2 in bf16), B micro-batch, T length.
Sources: DeepSpeed 0.19 `runtime/zero/stage_1_and_2.py`, `stage3.py` (flat partitions, ipg bucket, live parameters);
torch 2.13 `distributed/fsdp/_fully_shard` (one group gathered while the next is prefetched), `nn/parallel/distributed.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from launcher.cost.values import ModelCost, SavedBytes
from launcher.job.cluster import Cluster
from launcher.plan.layout import ELEMENT_BYTES, FP32, Layout
from launcher.plan.values import Item, Memory

REDUCE_BUCKET_ELEMENTS = 50_000_000
"""Elements that ZeRO collects before it reduces. DeepSpeed's default of 5e8 would cost 2 GB of fp32 on every rank."""
FRAGMENTATION = 0.05
"""Share of the total that the caching allocator loses to rounding and holes: a margin, not a measurement."""


def rank_memory(cost: ModelCost, cluster: Cluster, layout: Layout) -> Memory:
    """Account of one rank at the peak of a step."""
    strategy, num_ranks, precision = layout.strategy, layout.num_ranks, layout.precision
    fsdp = strategy == "fsdp"
    state = (
        _fsdp(cost, num_ranks, precision, layout.state_bytes)
        if fsdp
        else _ZERO_OR_DDP[strategy](cost, num_ranks, precision)
    )
    items = [*state, *_activations(cost, layout)]
    margin = round(sum(item.num_bytes for item in items) * FRAGMENTATION)
    items.append(Item("fragmentation", margin, f"{FRAGMENTATION:.0%} of the above, a margin"))
    usable_bytes = cluster.memory_bytes_per_rank(layout.ranks_per_node)
    return Memory(tuple(item for item in items if item.num_bytes), usable_bytes)


def saved_of(cost: ModelCost, precision: str) -> SavedBytes:
    """Bytes kept for backward: the 16-bit formats keep alike."""
    return cost.saved["fp32" if precision == "fp32" else "bf16"]


def _ceil_div(total: int, parts: int) -> int:
    return -(-total // parts)


def _ddp(cost: ModelCost, num_ranks: int, precision: str) -> list[Item]:
    num = cost.num_params
    items = [
        Item("parameters", FP32 * num, "4 P"),
        Item("gradients", FP32 * num, "4 P, views of the reduction buckets"),
        Item("optimiser", 2 * FP32 * num, "8 P: two moments"),
    ]
    if precision == "bf16":
        items.append(Item("autocast copies", 2 * num, "2 P: weights cast once per step"))
    return items


def _zero(cost: ModelCost, num_ranks: int, precision: str, shard_gradients: bool) -> list[Item]:
    num, element = cost.num_params, ELEMENT_BYTES[precision]
    part = _ceil_div(num, num_ranks)
    gradients = part if shard_gradients else num
    bucket = min(REDUCE_BUCKET_ELEMENTS, num)
    items = [
        Item("parameters", element * num, "p P"),
        Item("fp32 masters", FP32 * part, "4 P / N, a copy even in fp32"),
        Item("gradients", element * gradients, "p P / N" if shard_gradients else "p P"),
        Item("optimiser", 2 * FP32 * part, "8 P / N: two moments"),
        Item("reduction bucket", element * bucket, "p x min(reduce_bucket_size, P)"),
    ]
    if precision == "bf16":
        items.append(Item("fp32 gradients", FP32 * part, "4 P / N, made for the optimiser step"))
    return items


def _zero1(cost: ModelCost, num_ranks: int, precision: str) -> list[Item]:
    return _zero(cost, num_ranks, precision, shard_gradients=False)


def _zero2(cost: ModelCost, num_ranks: int, precision: str) -> list[Item]:
    return _zero(cost, num_ranks, precision, shard_gradients=True)


def _zero3(cost: ModelCost, num_ranks: int, precision: str) -> list[Item]:
    element, part = ELEMENT_BYTES[precision], _ceil_div(cost.num_params, num_ranks)
    live = cost.outside_num_params + 2 * cost.block_num_params
    bucket = min(REDUCE_BUCKET_ELEMENTS, cost.num_params)
    items = [
        Item("parameters", element * part, "p P / N"),
        Item("fp32 masters", FP32 * part, "4 P / N, a copy even in fp32"),
        Item("gradients", element * part, "p P / N"),
        Item("optimiser", 2 * FP32 * part, "8 P / N: two moments"),
        Item("gathered parameters", element * live, "p x (outside blocks + 2 blocks)"),
        Item("reduction bucket", element * bucket, "p x min(reduce_bucket_size, P)"),
    ]
    if precision == "bf16":
        items.append(Item("fp32 gradients", FP32 * part, "4 P / N, made for the optimiser step"))
    return items


def _fsdp(cost: ModelCost, num_ranks: int, precision: str, state_bytes: int) -> list[Item]:
    element, part, kept = ELEMENT_BYTES[precision], _ceil_div(cost.num_params, num_ranks), state_bytes
    gathered = cost.outside_num_params + 2 * cost.block_num_params
    unsharded = cost.outside_num_params + cost.block_num_params
    return [
        Item("parameters", kept * part, f"{kept} P / N"),
        Item("gradients", kept * part, f"{kept} P / N"),
        Item("optimiser", 2 * kept * part, f"{2 * kept} P / N: two moments"),
        Item("gathered parameters", element * gathered, "p x (outside blocks + 2 blocks)"),
        Item("gathered gradients", kept * unsharded, f"{kept} x (outside blocks + 1 block), before they are reduced"),
    ]


_ZERO_OR_DDP: dict[str, Callable[[ModelCost, int, str], list[Item]]] = {
    "ddp": _ddp,
    "zero1": _zero1,
    "zero2": _zero2,
    "zero3": _zero3,
}


def _activations(cost: ModelCost, layout: Layout) -> list[Item]:
    micro_batch_size, seq_len, recompute, precision = (
        layout.micro_batch_size,
        layout.seq_len,
        layout.recompute,
        layout.precision,
    )
    saved = saved_of(cost, precision)
    blocks = saved.blocks.at(micro_batch_size, seq_len)
    if recompute == "full":
        one = blocks // max(1, cost.num_blocks)
        inputs = saved.block_inputs.at(micro_batch_size, seq_len)
        kept = Item("activations", inputs + one, "inputs of the blocks + all of one block, traced at B, T")
    else:
        kept = Item("activations", blocks, "saved for backward in the blocks, traced at B, T")
    return [
        kept,
        Item("activations outside", saved.outside.at(micro_batch_size, seq_len), "embeddings, last norm, head"),
        Item("logits and loss", loss_bytes(cost, micro_batch_size, seq_len, precision), _loss_formula(cost, precision)),
    ]


LOSS_BYTES = {"fp32": 12, "bf16": 16}
"""Per logit. The loss is taken in fp32: log-probabilities and their gradient, beside the logits as the model gives them."""
_LOSS_PARTS = {"fp32": "fp32, log-softmax, gradient", "bf16": "bf16, fp32 copy, log-softmax, both gradients"}


def loss_bytes(cost: ModelCost, micro_batch_size: int, seq_len: int, precision: str) -> int:
    """Bytes of logits, loss and their gradients at the peak."""
    targets = micro_batch_size * (seq_len if cost.logits_per_token else 1)
    return (
        targets
        * cost.logits_width
        * (cost.loss_bytes_per_logit or LOSS_BYTES["fp32" if precision == "fp32" else "bf16"])
    )


def _loss_formula(cost: ModelCost, precision: str) -> str:
    if cost.loss_bytes_per_logit:
        return f"{cost.loss_bytes_per_logit} bytes x logits: the model's own loss"
    kind = "fp32" if precision == "fp32" else "bf16"
    return f"{LOSS_BYTES[kind]} bytes x logits: {_LOSS_PARTS[kind]}"
