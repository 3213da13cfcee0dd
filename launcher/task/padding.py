"""Rows of unequal length -> one rectangle of tokens, shared by the tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from launcher.task import Batch, Row
from launcher.task.block import TokenBlock


def pad_right(rows: Sequence[Row], pad_id: int) -> Batch:
    """`input_ids` and `attention_mask`, both int64 (B, T), T being the longest row. A block is taken as it is."""
    if isinstance(rows, TokenBlock):
        input_ids = torch.from_numpy(rows.tokens)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    lengths = np.fromiter((len(row["input_ids"]) for row in rows), dtype=np.int64, count=len(rows))
    padded = np.full((len(rows), int(lengths.max())), pad_id, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : lengths[i]] = row["input_ids"]
    attention_mask = np.arange(padded.shape[1]) < lengths[:, None]
    return {
        "input_ids": torch.from_numpy(padded),
        "attention_mask": torch.from_numpy(attention_mask.astype(np.int64)),
    }
