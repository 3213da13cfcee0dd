"""What a model is given so that attention stays inside each document of a packed row.

`position_ids` alone isolate documents in some decoders and some call forms of transformers, never in BERT; a boolean
4-D mask is wrong under eager attention. So the mask is ours, one form per attention kernel:

    sdpa, eager          a dense additive mask, 0 inside a document and the type's minimum outside
    flex_attention       a block mask
    flash_attention_2    cumulative lengths, for its kernels of variable length

Shapes: B rows, T tokens. Padding is a document of its own, or its rows would have nothing to attend to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from launcher.errors import ModelError
from launcher.task import Batch
from launcher.task.packed import DOCUMENT_IDS

_WINDOWED, _WHOLE = "sliding_attention", "full_attention"  # `layer_types` of a transformers config


@dataclass(frozen=True)
class Attention:
    """The facts of a model that its mask depends on."""

    kernel: str
    """`_attn_implementation` of its config."""
    is_causal: bool
    layer_types: frozenset[str]
    """The kinds of its layers: all tokens, or a window of them."""
    window: int | None
    """Tokens: those before, the token itself included (causal), or to each side."""
    first_position: int
    """What the model calls the position of a document's first token: 0, or in RoBERTa's family the padding's id + 1."""

    @classmethod
    def of(cls, model: Any) -> Attention:
        """Raises `ModelError` for a model whose attention cannot be kept inside a document."""
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if window is not None and getattr(config, "use_sliding_window", True) is False:
            window = None
        kinds = frozenset(getattr(config, "layer_types", None) or (_WINDOWED if window else _WHOLE,))
        if kinds - {_WINDOWED, _WHOLE}:
            raise _cannot(model, f"has layers of {', '.join(sorted(kinds - {_WINDOWED, _WHOLE}))}")
        if config._attn_implementation not in _FORMS:
            raise _cannot(model, f"uses the attention kernel {config._attn_implementation}")
        return cls(config._attn_implementation, _is_causal(model), kinds, window, _first_position(model))

    def inputs(self, batch: Batch, dtype: torch.dtype) -> dict[str, Any]:
        """`attention_mask` and `position_ids` (and the lengths, for flash attention) of a packed batch, on its device."""
        documents, positions = batch[DOCUMENT_IDS], batch["position_ids"]
        return {"position_ids": positions + self.first_position, **_FORMS[self.kernel](self, documents, dtype)}

    def _dense(self, documents: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        place = torch.arange(documents.shape[1], device=documents.device)
        same = documents[:, :, None] == documents[:, None, :]
        masks = {}
        for kind in self.layer_types:
            allowed = same & self._reach(kind, place[:, None], place)
            mask = torch.zeros(allowed.shape, dtype=dtype, device=documents.device)
            masks[kind] = mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
        return {"attention_mask": self._per_kind(masks)}

    def _blocks(self, documents: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        from torch.nn.attention.flex_attention import create_block_mask

        rows, length = documents.shape
        masks = {}
        for kind in self.layer_types:
            allowed = self.allowed(kind, documents)
            masks[kind] = create_block_mask(allowed, rows, None, length, length, device=documents.device)
        return {"attention_mask": self._per_kind(masks)}

    def allowed(self, kind: str, documents: Tensor) -> Any:
        """`mask_mod` of flex attention: may query `q` of row `b` see key `k`?"""

        def allowed(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (documents[b, q] == documents[b, k]) & self._reach(kind, q, k)

        return allowed

    def _lengths(self, documents: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """The rows one after another as the kernel sees them: a document ends where the next begins, or the row does."""
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts = begins.flatten().nonzero().flatten().to(torch.int32)
        ends = torch.cat([starts, starts.new_tensor([documents.numel()])])
        longest = int((ends[1:] - ends[:-1]).max())
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        return {"attention_mask": None, **lengths}

    def _reach(self, kind: str, query: Tensor, key: Tensor) -> Tensor:
        """The pattern of a layer inside one document, as transformers' masking_utils has it."""
        reach = key <= query if self.is_causal else torch.ones_like(key <= query)
        if kind == _WINDOWED and self.window is not None:
            reach = reach & (key > query - self.window if self.is_causal else (query - key).abs() <= self.window)
        return reach

    def _per_kind(self, masks: dict[str, Any]) -> Any:
        """Models with two kinds of layers take a mask of each, by name; the others take one."""
        return masks if len(masks) > 1 else next(iter(masks.values()))


_FORMS: dict[str, Any] = {
    "eager": Attention._dense,
    "sdpa": Attention._dense,
    "flex_attention": Attention._blocks,
    "flash_attention_2": Attention._lengths,
}


def _cannot(model: Any, why: str) -> ModelError:
    way_out = "set data.packing to none, or to concat, which lets attention cross documents"
    return ModelError(
        "data.packing", "best_fit", f"cannot keep documents apart in {type(model).__name__}, which {why}", way_out
    )


def _is_causal(model: Any) -> bool:
    """As the attention modules say themselves; those that say nothing follow the kind of model."""
    said = {bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")}
    if len(said) > 1:
        raise _cannot(model, "mixes attention to the past with attention to all")
    return said.pop() if said else bool(model.config.is_decoder or model.can_generate())


def _first_position(model: Any) -> int:
    """RoBERTa and its kin count from `padding_idx + 1`, in a function that each of them carries."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0
