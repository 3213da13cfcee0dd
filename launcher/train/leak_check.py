"""Run once at the start of a run with packed rows: the real model, as sharded and in its precision, on two documents.

A document's logits may not change when its neighbour's tokens do, and must be those that it gets alone. All ranks make
the same two rows, so a sharded model is gathered by all, and all come to the same answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from launcher.data.prepared import PreparedData
from launcher.errors import ModelError
from launcher.task import Batch
from launcher.task.packed import DOCUMENT_IDS
from launcher.train.engine import Engine

ROUNDING = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "pure_bf16": 5e-2}
"""What a difference between two shapes of the same product may be, of the largest logit: 2^-24, 2^-11 or 2^-8, times
what a deep model makes of it. A leak by a neighbour is found at any size: there the shapes are the same, so the numbers are too."""

_LENGTHS = (11, 7)


def check_isolation(
    engine: Engine, model: Any, device: torch.device, precision: str, data: PreparedData, seq_len: int
) -> None:
    """Raises `ModelError` where attention crosses the border between packed documents, or a document is out of place."""
    random, vocab_size = torch.Generator().manual_seed(0), data.vocab_size
    lengths = [max(1, min(length, seq_len // 2)) for length in _LENGTHS]
    first, other, second = (
        torch.randint(vocab_size, (length,), generator=random) for length in (lengths[0], lengths[0], lengths[1])
    )
    other = torch.where(other == first, (first + 1) % vocab_size, other)  # no token stays by chance
    first, other, second = (_no_padding(ids, data.pad_id, vocab_size).to(device) for ids in (first, other, second))
    before, after = (engine.evaluate(_packed(ids, second))[0, lengths[0] :] for ids in (first, other))
    behind, ahead = (engine.evaluate(_packed(second, ids))[0, : lengths[1]] for ids in (first, other))
    alone = engine.evaluate(_single(second))[0]
    scale = float(alone.abs().max())
    may_differ = _has_experts(model)  # how many tokens an expert gets depends on all of them
    leak = max(_apart(before, after), _apart(behind, ahead))
    if leak > (ROUNDING[precision] * scale if may_differ else 0.0):
        raise _error(model, f"lets attention cross documents (a neighbour's tokens change a logit by {leak:.2g})")
    shift = max(_apart(before, alone), _apart(behind, alone))
    if not shift <= ROUNDING[precision] * scale:
        raise _error(model, f"gives a packed document other logits than alone (by {shift:.2g} of {scale:.2g})")


def _packed(*documents: Tensor) -> Batch:
    """One row that holds the documents one after another."""
    ids = torch.cat(documents)[None]
    lengths = torch.tensor([len(document) for document in documents])
    numbers = torch.repeat_interleave(torch.arange(1, len(documents) + 1), lengths)[None].to(ids.device)
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None].to(ids.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": positions,
        DOCUMENT_IDS: numbers,
    }


def _single(document: Tensor) -> Batch:
    return {"input_ids": document[None], "attention_mask": torch.ones_like(document)[None]}


def _no_padding(ids: Tensor, pad_id: int, vocab_size: int) -> Tensor:
    """RoBERTa's family gives a padding token no position of its own, wherever it stands."""
    return torch.where(ids == pad_id, (ids + 1) % vocab_size, ids)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


def _has_experts(model: Any) -> bool:
    return any("expert" in name for name, _ in model.named_modules())


def _error(model: Any, what: str) -> ModelError:
    way_out = "set data.packing to none, or to concat, which lets attention cross documents by design"
    return ModelError("data.packing", "best_fit", f"{what} in {type(model).__name__}", way_out)
