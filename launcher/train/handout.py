"""Rank 0 builds the model, the others its skeleton; then its tensors are handed out, each to where the engine wants it.

So the host memory of a node stays near one copy of the model, however many ranks it has: a skeleton is built on the
meta device, where a tensor is a shape alone, and an engine that shards asks for one part of the model at a time. All
of the state travels, parameters, buffers (also those that no checkpoint holds, such as rotary tables) and tensors that
a module keeps beside both, so nothing has to be computed twice to be the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from launcher.errors import FleetuneError

SOURCE = 0
"""The rank that has the weights."""


class Held(NamedTuple):
    """A parameter or buffer of the source's model."""

    names: tuple[str, ...]
    """More than one where it is shared, as by a tied head."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


def held_by(model: nn.Module) -> list[Held]:
    """Every parameter and buffer of a model, with the names that it is reached by."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in _named(model):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return [Held(tuple(names[key]), tuple(t.shape), t.dtype, t.requires_grad) for key, t in tensors.items()]


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def skeleton(build: Callable[[], Any], held: list[Held]) -> Any:
    """What `build` makes, with shapes in place of values; types and sharing are those of the source's model, `held`.

    Weights decide more than values: a checkpoint that holds a head of its own leaves it untied.
    """
    with torch.device("meta"), no_init_weights():
        model = build()
    mine, theirs = {name for name, _ in _named(model)}, {name for each in held for name in each.names}
    if mine != theirs:
        odd = ", ".join(sorted(mine ^ theirs)[:3])
        raise FleetuneError(f"{type(model).__name__} built without its weights has other parts than with them: {odd}")
    for names, shape, dtype, requires_grad in held:
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        for name in names:
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            if last in module._buffers:
                module._buffers[last] = tensor
            else:
                tensor = module._parameters[last] = _as_parameter(tensor, requires_grad)
    return model


def _as_parameter(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=requires_grad)


class HandOut:
    """Gives every tensor of the source's model to all ranks, once, on their device. All ranks make the same calls."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """dtype: what parameters become on the way; None: they stay as they are."""
        self._model, self._device, self._dtype = model, device, dtype
        self._is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._seen: set[nn.Module] = set()
        self._given: dict[int, weakref.ref[Tensor]] = {}

    def parts(self, blocks: list[nn.Module]) -> Iterator[nn.Module]:
        """Block after block, then the model with what is outside of them: each is whole on every rank when it comes, so
        whoever shards it before asking for the next never holds more than one whole."""
        for part in (*blocks, self._model):
            self.give(part)
            yield part

    def whole(self) -> Any:
        self.give(self._model)
        return self._model

    def give(self, part: nn.Module) -> None:
        for module in part.modules():
            if module not in self._seen:
                self._seen.add(module)
                for holder in (module._parameters, module._buffers, vars(module)):
                    self._give_all(holder)

    def _give_all(self, holder: MutableMapping[str, Any]) -> None:
        for name, tensor in list(holder.items()):
            if isinstance(tensor, Tensor):
                holder[name] = self._received(tensor)

    def _received(self, tensor: Tensor) -> Tensor:
        """Shared tensors are received once. What was here from the start has an id of its own, so ids will do; and a
        reference would hold on to what an engine has cut up since."""
        if (known := self._given.get(id(tensor))) is not None:
            shared = known()
            assert shared is not None, "engines do not shard what blocks share with the rest"
            return shared
        key, moved = id(tensor), self._moved(tensor)
        self._given[key] = weakref.ref(moved)
        if moved.numel() and not self._is_alone:
            bits = moved.detach().contiguous().reshape(-1).view(torch.uint8)
            dist.broadcast(bits, SOURCE)
        return moved

    def _moved(self, tensor: Tensor) -> Tensor:
        """On this rank's device; without values yet, where there were none."""
        is_parameter = isinstance(tensor, nn.Parameter)
        dtype = self._dtype if is_parameter and tensor.is_floating_point() and self._dtype else tensor.dtype
        if not tensor.is_meta:
            tensor.data = tensor.data.to(self._device, dtype).contiguous()
            return tensor
        empty = torch.empty(tensor.shape, dtype=dtype, device=self._device)
        return nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
