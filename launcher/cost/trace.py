"""One forward and backward pass, watched: bytes kept, bytes alive and FLOPs, by block and moment. Real tensors or fake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from launcher.cost.architecture import blocks_of
from launcher.cost.live import Live
from launcher.task import MODEL_INPUTS, Task, logits_of

BLOCKS, LOSS, EMBEDDINGS = "blocks", "loss", "embeddings"
Part = tuple[str, int]
"""(`forward` or `backward`, pass through a block, -1 outside)."""


@dataclass
class Trace:
    """What one pass showed. A model whose blocks share weights passes through one block several times."""

    block_of_pass: list[int] = field(default_factory=list)
    """Which block each pass went through."""
    saved: Counter[int] = field(default_factory=Counter)
    """Bytes that autograd keeps, by the pass that kept them first; -1 outside the blocks."""
    inputs: list[int] = field(default_factory=list)
    """Bytes of the hidden states that enter each pass."""
    at_end: list[int] = field(default_factory=list)
    """Bytes alive when each pass has ended."""
    after_forward: int = 0
    """Bytes alive when the model has answered, its answer included."""
    flops: Counter[Part] = field(default_factory=Counter)
    course: list[tuple[str, int]] = field(default_factory=list)
    """(moment, bytes alive) after every allocation: moments are `blocks`, `loss` and `embeddings`."""


def watched(
    model: Any,
    task: Task,
    batch: dict[str, torch.Tensor],
    more_inputs: Callable[[], dict[str, Any]] = dict,
    kernels: Callable[[Callable[[int], None]], AbstractContextManager[Any]] = lambda count: nullcontext(),
) -> Trace:
    """Run the model on a batch as an engine does: forward, the task's loss, backward. Gradients are thrown away.

    more_inputs: makes what the model gets beyond the batch, and is watched. kernels: what stands in for some kernels, told
    how to count FLOPs that no operator shows.
    """
    parameters = list(model.parameters())
    live = Live([*parameters, *model.buffers(), *batch.values()], parameters)
    watch = _Watch(live)
    with live, watch.attached(blocks_of(model)), kernels(live.count):
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda tensor: tensor):
            logits = logits_of(model(**inputs, **more_inputs()))
            watch.trace.after_forward = live.num_bytes
        loss = task.loss_sum(logits, batch)
        del logits
        watch.turn_back()
        loss.backward()
        gradients = {live.number_of(p.grad) for p in parameters if p.grad is not None}
    for parameter in parameters:
        parameter.grad = None
    return watch.result({number for number in gradients if number is not None})


class _Watch:
    def __init__(self, live: Live) -> None:
        self.live = live
        self.trace = Trace()
        self.is_backward = False
        self.seen: set[int] = set()
        self.first_input: torch.Tensor | None = None
        self.outputs: list[torch.Tensor] = []
        live.part = ("forward", -1)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        number = self.live.number_of(tensor)
        if number is not None and number not in self.seen:
            self.seen.add(number)
            self.trace.saved[self.live.part[1]] += self.live.size_of(number)
        return tensor.detach()  # the tensor itself would hold on to its own graph

    @contextmanager
    def attached(self, blocks: list[Any]) -> Iterator[None]:
        hooks = []
        for number, block in enumerate(blocks):
            hooks.append(block.register_forward_pre_hook(self._entering(number), with_kwargs=True))
            hooks.append(block.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, number: int) -> Callable[..., None]:
        def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.is_backward:  # recompute
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            if not self.trace.inputs:
                self._on_gradient(hidden, ("backward", -1))
            self.live.part = ("forward", len(self.trace.inputs))
            self.trace.inputs.append(hidden.nbytes)
            self.trace.block_of_pass.append(number)

        return enter

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        if self.is_backward:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        self._on_gradient(hidden, ("backward", len(self.trace.inputs) - 1))
        self.trace.at_end.append(self.live.num_bytes)
        self.live.part = ("forward", -1)

    def _on_gradient(self, hidden: torch.Tensor, part: Part) -> None:
        def arrived(gradient: torch.Tensor) -> None:
            self.live.part = part

        if hidden.requires_grad:
            hidden.register_hook(arrived)

    def turn_back(self) -> None:
        self.is_backward = True
        self.live.part = ("backward", len(self.trace.inputs))  # the head, until the last block's gradient is there

    def result(self, gradients: set[int]) -> Trace:
        self.trace.flops = self.live.flops
        alive, passed = 0, 0
        for storage, size, (way, number) in self.live.changes:
            if storage in gradients:
                continue
            alive += size
            if way == "forward":
                passed = max(passed, number + 1)
            if size > 0:
                self.trace.course.append((self._moment(way, number, passed), alive))
        return self.trace

    def _moment(self, way: str, number: int, passed: int) -> str:
        """The end of the last block begins the loss, the gradient of the first one's input the embeddings."""
        num_passes = len(self.trace.inputs)
        if way == "forward":
            return BLOCKS if number >= 0 or passed < num_passes else LOSS
        if number == num_passes:
            return LOSS
        return BLOCKS if number >= 0 else EMBEDDINGS
