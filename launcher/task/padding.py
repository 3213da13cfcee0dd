"""Rows of unequal length -> one rectangle of tokens, shared by the tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from launcher.task import Batch, Row


def pad_right(rows: Sequence[Row], pad_id: int) -> Batch:
    """`input_ids` and `attention_mask`, both int64 (B, T), T being the longest row."""
    lengths = np.fromiter((len(row["input_ids"]) for row in rows), dtype=np.int64, count=len(rows))
    input_ids = np.full((len(rows), int(lengths.max())), pad_id, dtype=np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : lengths[i]] = row["input_ids"]
    attention_mask = np.arange(input_ids.shape[1]) < lengths[:, None]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask.astype(np.int64)),
    }
