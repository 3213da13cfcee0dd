"""Which storages are alive while a model runs, and the FLOPs of its operators: on real tensors or on fake ones."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launcher.cost.kernels import Count, count_of


class Live(TorchDispatchMode):
    """Follows every storage that operators allocate, from its birth to its end.

    `part` says what runs at present; bytes and FLOPs are written down under it. `own` are tensors that were there
    before, on the device that is watched; `weights` those among them whose copies in another precision are not counted: autocast keeps one per step.
    """

    def __init__(self, own: Iterable[torch.Tensor], weights: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.part: Any = None
        self.flops: Counter[Any] = Counter()
        self.changes: list[tuple[int, int, Any]] = []
        """(storage, bytes more or fewer, part), in the order of time."""
        self.num_bytes = 0
        there = list(own)
        self._device = there[0].device
        self._own = {_address(tensor) for tensor in there}
        self._weights = {_address(tensor) for tensor in weights}
        self._numbers: dict[int, int] = {}
        self._sizes: list[int] = []
        self._watches: dict[int, weakref.ref[Any]] = {}
        self._counts: dict[Any, Count | None] = {}
        self._started = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in self._counts:
            self._counts[func] = count_of(func)
        if (count := self._counts[func]) is not None:
            self.flops[self.part] += count(*args, **kwargs, out_val=result)
        is_cast = func is torch.ops.aten._to_copy.default and _address(args[0]) in self._weights
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, is_cast)
        return result

    def count(self, flops: int) -> None:
        """Of a kernel that is no operator here."""
        self.flops[self.part] += flops

    def _see(self, tensor: torch.Tensor, is_cast: bool) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._own or address in self._numbers or tensor.device != self._device:
            return
        number = self._numbers[address] = self._started
        self._started += 1
        size = 0 if is_cast else storage.nbytes()
        self._sizes.append(size)
        self._watches[address] = weakref.ref(storage, lambda _: self._end(address, number, size))
        self._change(number, size)

    def _end(self, address: int, number: int, size: int) -> None:
        del self._numbers[address], self._watches[address]
        self._change(number, -size)

    def _change(self, number: int, size: int) -> None:
        if size:
            self.num_bytes += size
            self.changes.append((number, size, self.part))

    def size_of(self, number: int) -> int:
        """Bytes of a storage, as they are counted."""
        return self._sizes[number]

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """Of its storage; None for one that was there before."""
        return self._numbers.get(_address(tensor))


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
