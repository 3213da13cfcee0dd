"""What a forward pass leaves for backward, and what the loss makes of the logits.

Of a model that was traced, the peaks of the trace decide; of one that is known by its sizes alone (published tables), a
formula of the loss stands for them.
"""

from __future__ import annotations

from launcher.cost.values import ModelCost, SavedBytes
from launcher.plan.layout import Layout
from launcher.plan.values import Item

LOSS_BYTES = {"fp32": 12, "bf16": 16}
"""Per logit. The loss is taken in fp32: log-probabilities and their gradient, beside the logits as the model gives them."""
_LOSS_PARTS = {"fp32": "fp32, log-softmax, gradient", "bf16": "bf16, fp32 copy, log-softmax, both gradients"}
_TRACED = "traced: launcher/cost/measure.py, saved_tensors_hooks"
_PEAK = "traced: launcher/cost/live.py, storages alive at their most"


def activations(cost: ModelCost, layout: Layout, on_cpu: bool = False) -> tuple[Item, ...]:
    """When backward begins: all that is kept, and the loss."""
    return (*_kept(cost, layout, on_cpu), _loss(cost, layout, on_cpu))


def in_last_block(cost: ModelCost, layout: Layout, on_cpu: bool = False) -> tuple[Item, ...]:
    """While the last block runs backward: all that is kept, and what it works with; nothing where no peak was traced."""
    working = _working(cost, layout, on_cpu)
    return (*_kept(cost, layout, on_cpu), working) if working else ()


def remaining(cost: ModelCost, layout: Layout, on_cpu: bool = False) -> tuple[Item, ...]:
    """When backward ends: what the first block and the embeddings kept, or what the embeddings' gradients take.

    FSDP's root reduces when every block has, so what a block works with is no longer there.
    """
    kept, outside = _kept(cost, layout, on_cpu)
    working = _working(cost, layout, on_cpu)
    whole = kept if working else _of_all_blocks(cost, layout, on_cpu)  # one block recomputed is in what it works with
    last = Item("activations", whole.num_bytes // max(1, cost.num_blocks), "of the last block to go", _TRACED, "traced")
    items = (last, outside, *([working] if working else []))
    if working and layout.strategy in ("fsdp", "hsdp"):
        items = (outside,)
    at_embeddings = _peak(cost, layout, on_cpu, "embeddings") or 0
    if at_embeddings > sum(item.num_bytes for item in items):
        return (Item("embeddings backward", at_embeddings, "kept outside the blocks, and gradients", _PEAK, "traced"),)
    return items


def _kept(cost: ModelCost, layout: Layout, on_cpu: bool) -> tuple[Item, Item]:
    """By the blocks, and outside."""
    saved, size, length = saved_of(cost, layout, on_cpu), layout.micro_batch_size, layout.seq_len
    outside = Item(
        "activations outside", saved.outside.at(size, length), "embeddings, last norm, head", _TRACED, "traced"
    )
    blocks = _of_all_blocks(cost, layout, on_cpu)
    if layout.recompute == "none":
        return blocks, outside
    kept, words = (saved.recomputed or saved.block_inputs).at(size, length), "inputs of the blocks, traced at B, T"
    if _peak(cost, layout, on_cpu, "blocks") is None:
        kept, words = kept + blocks.num_bytes // max(1, cost.num_blocks), "inputs of the blocks + all of one block"
    return Item("activations", kept, words, _TRACED, "traced"), outside


def _of_all_blocks(cost: ModelCost, layout: Layout, on_cpu: bool) -> Item:
    kept = saved_of(cost, layout, on_cpu).blocks.at(layout.micro_batch_size, layout.seq_len)
    return Item("activations", kept, "saved for backward in the blocks, traced at B, T", _TRACED, "traced")


def _loss(cost: ModelCost, layout: Layout, on_cpu: bool) -> Item:
    peak = _peak(cost, layout, on_cpu, "loss")
    if peak is None:
        size = loss_bytes(cost, layout.micro_batch_size, layout.seq_len, layout.precision)
        formula = _loss_formula(cost, layout.precision)
        return Item("logits and loss", size, formula, "launcher/task: cross_entropy", "traced")
    size = max(0, peak - sum(item.num_bytes for item in _kept(cost, layout, on_cpu)))
    return Item("logits and loss", size, "head, loss and their gradients, traced at B, T", _PEAK, "traced")


def _working(cost: ModelCost, layout: Layout, on_cpu: bool) -> Item | None:
    peak = _peak(cost, layout, on_cpu, "blocks")
    if peak is None:
        return None
    size = max(0, peak - sum(item.num_bytes for item in _kept(cost, layout, on_cpu)))
    words = "what one block allocates in backward" + (", recomputed" if layout.recompute == "full" else "")
    return Item("work of a block", size, f"{words}, traced at B, T", _PEAK, "traced")


def _peak(cost: ModelCost, layout: Layout, on_cpu: bool, moment: str) -> int | None:
    """Traced bytes of a moment; None where none was traced."""
    policies = cost.peak.get(_trace(cost, layout, on_cpu), {})
    if layout.recompute not in policies:
        return None
    return policies[layout.recompute].at(layout.micro_batch_size, layout.seq_len)[moment]


def _trace(cost: ModelCost, layout: Layout, on_cpu: bool) -> str:
    return cost.trace_of(layout.precision, layout.autocast, "cpu" if on_cpu else "fused")


def saved_of(cost: ModelCost, layout: Layout, on_cpu: bool = False) -> SavedBytes:
    """Bytes kept for backward in the layout's precision."""
    return cost.saved[_trace(cost, layout, on_cpu)]


def loss_bytes(cost: ModelCost, micro_batch_size: int, seq_len: int, precision: str) -> int:
    """Bytes of logits, loss and their gradients, by formula: all that passes through memory, whenever it is freed."""
    targets = micro_batch_size * (seq_len if cost.logits_per_token else 1)
    return targets * cost.logits_width * (cost.loss_bytes_per_logit or LOSS_BYTES[_kind(precision)])


def _loss_formula(cost: ModelCost, precision: str) -> str:
    if cost.loss_bytes_per_logit:
        return f"{cost.loss_bytes_per_logit} bytes x logits: the model's own loss"
    kind = _kind(precision)
    return f"{LOSS_BYTES[kind]} bytes x logits: {_LOSS_PARTS[kind]}"


def _kind(precision: str) -> str:
    return "fp32" if precision == "fp32" else "bf16"
