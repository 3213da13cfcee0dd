"""How many elements one rank holds of a model cut over N ranks: each engine pads otherwise. The rank with most counts.

A cost without tensors (only sizes are known) is cut without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from launcher.cost.values import ModelCost, TensorGroup

FLAT_ALIGNMENT = 2
"""Elements: DeepSpeed pads a flat group to a multiple of this and of the ranks, so that NCCL starts at 4 bytes."""


@dataclass(frozen=True)
class Held:
    """Elements on one rank."""

    trained: int
    frozen: int

    @property
    def all(self) -> int:
        return self.trained + self.frozen


def whole(cost: ModelCost) -> Held:
    """Of a replica."""
    return Held(cost.num_trainable_params, cost.num_params - cost.num_trainable_params)


def by_rows(cost: ModelCost, num_ranks: int) -> Held:
    """FSDP2: each parameter by its rows, the first ranks one more. torch `_fsdp_param.py` `_init_sharded_param`."""
    return _by_tensor(cost, num_ranks, lambda shape: ceil_div(shape[0], num_ranks) * math.prod(shape[1:]))


def by_elements(cost: ModelCost, num_ranks: int) -> Held:
    """ZeRO-3: each parameter as a vector, padded. DeepSpeed `partition_parameters.py` `_partition_param`."""
    return _by_tensor(cost, num_ranks, lambda shape: ceil_div(math.prod(shape), num_ranks))


def by_group(cost: ModelCost, num_ranks: int) -> Held:
    """ZeRO-1 and -2: the trained parameters of an optimiser group as one vector, padded; the frozen ones whole.

    DeepSpeed `stage_1_and_2.py` `flatten_dense_tensors_aligned`; the groups are those of `launcher.train.optim`.
    """
    frozen = cost.num_params - cost.num_trainable_params
    if not cost.tensors:
        return Held(ceil_div(cost.num_trainable_params, num_ranks), frozen)
    return Held(sum(flat // num_ranks for flat in flat_groups(cost, num_ranks)), frozen)


def flat_groups(cost: ModelCost, num_ranks: int) -> list[int]:
    """Elements of ZeRO-1's and -2's flat vectors: matrices and tables, then vectors."""
    if not cost.tensors:
        return [cost.num_trainable_params]
    unit = FLAT_ALIGNMENT * num_ranks
    trained = [group for group in cost.tensors if group.trainable]
    sizes = [
        sum(_numel(group) for group in trained if (len(group.shape) >= 2) == matrices) for matrices in (True, False)
    ]
    return [ceil_div(size, unit) * unit for size in sizes if size]


def num_groups(cost: ModelCost) -> int:
    """Of the optimiser; 0 where only sizes are known."""
    return len(flat_groups(cost, 1)) if cost.tensors else 0


def _numel(group: TensorGroup) -> int:
    return group.count * math.prod(group.shape)


def _by_tensor(cost: ModelCost, num_ranks: int, part: Callable[[tuple[int, ...]], int]) -> Held:
    if not cost.tensors:
        total = whole(cost)
        return Held(ceil_div(total.trained, num_ranks), ceil_div(total.frozen, num_ranks))
    parts = [(group.trainable, group.count * part(group.shape or (1,))) for group in cost.tensors]
    return Held(sum(size for trained, size in parts if trained), sum(size for trained, size in parts if not trained))


def trained_outside(cost: ModelCost) -> int:
    """Trained elements outside the blocks."""
    if not cost.tensors:
        return cost.outside_num_params if cost.num_trainable_params else 0
    return sum(_numel(group) for group in cost.tensors if group.trainable and not group.in_block)


def trained_per_block(cost: ModelCost) -> int:
    """Trained elements of one block, the mean; of the largest block where only sizes are known."""
    if not cost.tensors or not cost.num_blocks:
        return min(cost.block_num_params, cost.num_trainable_params)
    inside = sum(_numel(group) for group in cost.tensors if group.trainable and group.in_block)
    return ceil_div(inside, cost.num_blocks)


def largest_tensor(cost: ModelCost) -> int:
    """Elements of the largest trained parameter; where only sizes are known, of the largest block or what is outside."""
    sizes = [math.prod(group.shape) for group in cost.tensors if group.trainable]
    return max(sizes, default=max(cost.block_num_params, cost.outside_num_params))


def ceil_div(total: int, parts: int) -> int:
    return -(-total // parts)


def largest_outside(cost: ModelCost) -> int:
    """Elements of the largest trained parameter outside the blocks, the head or the table tied to it."""
    sizes = [math.prod(group.shape) for group in cost.tensors if group.trainable and not group.in_block]
    return max(sizes, default=0) if cost.tensors else trained_outside(cost)


def persistent(cost: ModelCost, threshold: int, num_ranks: int) -> int:
    """Elements of the parameters that are no larger than this, gathered with their padding."""
    sizes = ((group.count, math.prod(group.shape)) for group in cost.tensors)
    return sum(count * ceil_div(size, num_ranks) * num_ranks for count, size in sizes if size <= threshold)
