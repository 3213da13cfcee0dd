"""Kernels as a GPU has them, for a trace by shapes: fused attention, experts in any precision, 16-bit products.

torch's fused attention has no form without a device, and the CPU's none with dropout. Grouped products are refused there
in fp32; transformers' own form of them has the same shapes and keeps the same. Autocast knows no device `meta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.utils.flop_counter import flop_registry

Count = Callable[..., int]


class Flash(torch.autograd.Function):
    """What fused attention allocates and keeps: its inputs, its output and one number per row, on any device.

    Layouts as in torch's kernels: the output lies token by token, so that joining its heads copies nothing.
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any, count: Any) -> Any:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums, *([] if mask is None else [mask]))
        ctx.count = count
        count(attention_flops(query, key, value))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value = ctx.saved_tensors[:3]
        ctx.count(attention_backward_flops(None, query, key, value))
        made = (tensor.transpose(1, 2).new_empty(tensor.transpose(1, 2).shape) for tensor in (query, key, value))
        return (*(tensor.transpose(1, 2) for tensor in made), None, None)


@contextmanager
def as_on_gpus(fused: bool, autocast: bool, count: Callable[[int], None]) -> Iterator[set[str]]:
    """Gathers the names of kernels whose figures follow from shapes alone; `count` is told of their FLOPs.

    The functions are replaced where models look them up: a mode would not be in force where backward recomputes.
    """
    derived: set[str] = set()
    theirs, half = functional.scaled_dot_product_attention, (_in_bf16 if autocast else lambda tensor: tensor)

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, **more: Any) -> Any:
        query, key, value = half(query), half(key), half(value)
        if dropout_p and not fused:
            return theirs(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, **more)
        derived.add("scaled_dot_product_attention")
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)  # as torch makes it additive, in every layer
        return Flash.apply(query, key, value, attn_mask, count)

    def grouped(rows: Any, weight: Any, *, offs: Any) -> Any:
        derived.add("grouped_mm")
        return torch.ops.transformers.grouped_mm_fallback(half(rows), half(weight), offs=offs)

    with ExitStack() as stack:
        stack.enter_context(replaced(functional, "scaled_dot_product_attention", attention))
        if hasattr(functional, "grouped_mm"):
            stack.enter_context(replaced(functional, "grouped_mm", grouped))
        for home, name in _HALVED if autocast else ():
            stack.enter_context(replaced(home, name, _halved(getattr(home, name))))
        yield derived


_HALVED = ((functional, "linear"), (torch, "addmm"), (torch, "matmul"), (torch, "bmm"), (torch, "baddbmm"))
"""What autocast runs in 16 bits: the products that transformers calls. (torch/csrc autocast_mode.h)"""


def _halved(function: Any) -> Any:
    return lambda *args, **kwargs: function(*map(_in_bf16, args), **{k: _in_bf16(v) for k, v in kwargs.items()})


def _in_bf16(value: Any) -> Any:
    is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(torch.bfloat16) if is_number else value


@contextmanager
def replaced(home: Any, name: str, ours: Any) -> Iterator[None]:
    """One attribute of a module or class, for a while."""
    theirs = getattr(home, name)
    setattr(home, name, ours)
    try:
        yield
    finally:
        setattr(home, name, theirs)


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """From batch, heads, length and width of a head: scores, then their product with the values; nothing masked."""
    batch, heads, length, width = query.shape
    return int(2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1]))


def attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Five products to forward's two: the scores are formed again (Dao 2023, FlashAttention-2, sec. 4.1)."""
    return attention_flops(query, key, value) * 5 // 2


def grouped_flops(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Each row meets one expert of (experts, in, out)."""
    return int(2 * rows.shape[0] * weight.shape[-2] * weight.shape[-1])


def grouped_backward_flops(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * grouped_flops(rows, weight)


_OURS: dict[str, Count] = {
    "transformers::grouped_mm_fallback": grouped_flops,
    "transformers::grouped_mm_fallback_backward": grouped_backward_flops,
}


def count_of(operator: Any) -> Count | None:
    """The function that counts this operator's FLOPs: torch's, or ours for what it does not know."""
    return _OURS.get(operator._schema.name) or flop_registry.get(operator._overloadpacket)
