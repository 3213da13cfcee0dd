"""Rows of unequal length -> one rectangle of numbers, shared by the tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from launcher.task import Batch, Row
from launcher.task.block import TokenBlock


def pad_right(rows: Sequence[Row], pad_id: int) -> Batch:
    """`input_ids` and `attention_mask`, both int64 (B, T), T being the longest row. A block is taken as it is.

    Rows that say where their `second` segment begins also give `token_type_ids`, if any of them has one.
    """
    if isinstance(rows, TokenBlock):
        input_ids = torch.from_numpy(rows.tokens)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    lengths = np.fromiter((len(row["input_ids"]) for row in rows), dtype=np.int64, count=len(rows))
    columns = np.arange(int(lengths.max()))
    batch = {
        "input_ids": padded([row["input_ids"] for row in rows], pad_id),
        "attention_mask": torch.from_numpy((columns < lengths[:, None]).astype(np.int64)),
    }
    seconds = np.array([row.get("second", len(row["input_ids"])) for row in rows], dtype=np.int64)
    if (seconds < lengths).any():
        in_second = (columns >= seconds[:, None]) & (columns < lengths[:, None])
        batch["token_type_ids"] = torch.from_numpy(in_second.astype(np.int64))
    return batch


def padded(lists: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Lists of integers as int64 (B, longest), filled up on the right."""
    longest = max(len(numbers) for numbers in lists)
    array = np.full((len(lists), longest), fill, dtype=np.int64)
    for i, numbers in enumerate(lists):
        array[i, : len(numbers)] = numbers
    return torch.from_numpy(array)
