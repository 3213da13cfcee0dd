"""Few blocks in place of many: blocks of one kind cost the same, so three of each are traced and stand for the others."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from launcher.cost.architecture import block_list, blocks_of
from launcher.cost.trace import Trace

OF_A_KIND = 3
"""The first block also pays for what is made once and shared: masks, tables of positions."""


class Reduced(NamedTuple):
    model: Any
    """The model with fewer blocks, on the meta device."""
    stands_for: tuple[int, ...]
    """How many blocks that were left out each of its blocks stands for."""


def reduced(model: Any) -> Reduced:
    """Three blocks of each kind, the first ones. A model whose blocks differ in their modules is left whole."""
    kinds = [_kind(model, number, block) for number, block in enumerate(blocks_of(model))]
    chosen = sorted(number for kind in set(kinds) for number in _places(kinds, kind)[:OF_A_KIND])
    if len({kind[0] for kind in kinds}) != 1 or len(chosen) == len(kinds):
        return Reduced(copy.deepcopy(model), (0,) * len(kinds))
    stands_for = tuple(
        kinds.count(kinds[number]) - OF_A_KIND if number == _places(kinds, kinds[number])[:OF_A_KIND][-1] else 0
        for number in chosen
    )
    few = copy.deepcopy(model)
    blocks = block_list(few)
    kept = [blocks[number] for number in chosen]
    del blocks[len(kept) :]
    for place, block in enumerate(kept):
        blocks[place] = block
    _shorten(few.config, len(kinds), chosen)
    return Reduced(few, stands_for)


def _places(kinds: list[Any], kind: Any) -> list[int]:
    return [number for number, other in enumerate(kinds) if other == kind]


def _kind(model: Any, number: int, block: Any) -> tuple[Any, Any]:
    """(modules and shapes, what is trained and how it attends)."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    trained = tuple(parameter.requires_grad for parameter in block.parameters())
    count = len(blocks_of(model))
    lists = tuple(str(values[number]) for values in _per_block(model.config, count).values())
    return (type(block).__name__, shapes), (trained, lists)


def _per_block(config: Any, count: int) -> dict[str, Sequence[Any]]:
    """The config's lists with one entry for each block, such as `layer_types`."""
    return {
        key: value
        for key, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == count and count > 1
    }


def _shorten(config: Any, count: int, chosen: list[int]) -> None:
    for key, values in _per_block(config, count).items():
        setattr(config, key, [values[number] for number in chosen])
    config.num_hidden_layers = len(chosen)


def whole(trace: Trace, stands_for: tuple[int, ...]) -> Trace:
    """The trace of the model itself, by the blocks that were left out."""
    extra = [stands_for[block] for block in trace.block_of_pass]
    missing = sum(
        times * (trace.at_end[number] - trace.at_end[number - 1]) for number, times in enumerate(extra) if times
    )
    times_of = {number: 1 + times for number, times in enumerate(extra)}
    return Trace(
        block_of_pass=trace.block_of_pass,
        saved=type(trace.saved)({p: size * times_of.get(p, 1) for p, size in trace.saved.items()}),
        inputs=[size * times_of[number] for number, size in enumerate(trace.inputs)],
        at_end=trace.at_end,
        after_forward=trace.after_forward + missing,
        flops=type(trace.flops)({part: count * times_of.get(part[1], 1) for part, count in trace.flops.items()}),
        course=[(moment, alive + (missing if moment != "embeddings" else 0)) for moment, alive in trace.course],
    )


def in_precision(model: Any, dtype: torch.dtype) -> Any:
    """A copy with parameters in this precision, as engines cast them; buffers stay as they are."""
    few = copy.deepcopy(model)
    for parameter in few.parameters():
        parameter.data = parameter.data.to(dtype)
    return few
