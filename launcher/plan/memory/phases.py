"""When bytes are there: what lies on the accelerator all the time, and what only during a part of the step.

A step's peak is at one of four moments: when a backward pass begins (all activations and the loss are there), in its first
block (the loss is gone, a block works), when it ends (the activations are gone, the gradients are there), or in the
optimiser's update. In between both fall and rise at a steady rate, so nothing exceeds the higher end.

What an engine allocates on a stream of its own is counted as there all the time: the caching allocator gives a block
back only to the stream that it came from.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.plan.values import Item


@dataclass(frozen=True)
class State:
    """An engine's bytes, activations aside."""

    kept: tuple[Item, ...]
    """All the time."""
    begin: tuple[Item, ...]
    """When the last micro-batch's backward pass begins."""
    blocks: tuple[Item, ...]
    """While the last block runs backward, which is the first to: the head's gradient is there."""
    end: tuple[Item, ...]
    """When it ends."""
    update: tuple[Item, ...]
    """While the optimiser updates."""


def total(items: tuple[Item, ...]) -> int:
    return sum(item.num_bytes for item in items)
