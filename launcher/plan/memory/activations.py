"""What a forward pass leaves for backward, and what the loss makes of the logits."""

from __future__ import annotations

from launcher.cost.values import ModelCost, SavedBytes
from launcher.plan.layout import Layout
from launcher.plan.values import Item

LOSS_BYTES = {"fp32": 12, "bf16": 16}
"""Per logit. The loss is taken in fp32: log-probabilities and their gradient, beside the logits as the model gives them."""
_LOSS_PARTS = {"fp32": "fp32, log-softmax, gradient", "bf16": "bf16, fp32 copy, log-softmax, both gradients"}
_TRACED = "traced: launcher/cost/measure.py, saved_tensors_hooks"


def activations(cost: ModelCost, layout: Layout) -> tuple[Item, ...]:
    """When backward begins."""
    size, length, saved = layout.micro_batch_size, layout.seq_len, saved_of(cost, layout.precision)
    blocks = saved.blocks.at(size, length)
    if layout.recompute == "full":
        inputs = saved.block_inputs.at(size, length)
        kept = inputs + blocks // max(1, cost.num_blocks)
        words = "inputs of the blocks + all of one block, traced at B, T"
    else:
        kept, words = blocks, "saved for backward in the blocks, traced at B, T"
    outside = saved.outside.at(size, length)
    loss = loss_bytes(cost, size, length, layout.precision)
    return (
        Item("activations", kept, words, _TRACED, "traced"),
        Item("activations outside", outside, "embeddings, last norm, head", _TRACED, "traced"),
        Item("logits and loss", loss, _loss_formula(cost, layout.precision), "launcher/task: cross_entropy", "traced"),
    )


def remaining(cost: ModelCost, layout: Layout) -> tuple[Item, ...]:
    """When backward ends: what the first block and the embeddings kept."""
    saved = saved_of(cost, layout.precision)
    size, length = layout.micro_batch_size, layout.seq_len
    block = saved.blocks.at(size, length) // max(1, cost.num_blocks)
    outside = saved.outside.at(size, length)
    return (
        Item("activations", block, "of the last block to go", _TRACED, "traced"),
        Item("activations outside", outside, "embeddings, last norm, head", _TRACED, "traced"),
    )


def saved_of(cost: ModelCost, precision: str) -> SavedBytes:
    """Bytes kept for backward: the 16-bit formats keep alike."""
    return cost.saved["fp32" if precision == "fp32" else "bf16"]


def loss_bytes(cost: ModelCost, micro_batch_size: int, seq_len: int, precision: str) -> int:
    """Bytes of logits, loss and their gradients at the peak."""
    targets = micro_batch_size * (seq_len if cost.logits_per_token else 1)
    return targets * cost.logits_width * (cost.loss_bytes_per_logit or LOSS_BYTES[_kind(precision)])


def _loss_formula(cost: ModelCost, precision: str) -> str:
    if cost.loss_bytes_per_logit:
        return f"{cost.loss_bytes_per_logit} bytes x logits: the model's own loss"
    kind = _kind(precision)
    return f"{LOSS_BYTES[kind]} bytes x logits: {_LOSS_PARTS[kind]}"


def _kind(precision: str) -> str:
    return "fp32" if precision == "fp32" else "bf16"
