"""Packed rows -> one rectangle of tokens, for every task that answers per token.

The task collates the documents as if each were a row; then whatever it made per token moves to its place in the bin. So
a document's labels are exactly those it has alone, and none of them reaches across a border: a task for next tokens
leaves the first label of each document out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from launcher.task import IGNORED, Batch, Row

DOCUMENT_IDS = "document_ids"
"""Key of a packed batch: (B, T) int64, which document of its row a token belongs to, from 1 on; 0 is padding."""

Collate = Callable[[Sequence[Row], int], Batch]


def collate_packed(collate: Collate, rows: Sequence[Row], pad_id: int) -> Batch:
    """What `collate` makes of the documents of all rows, moved into (B, T), T being the fullest bin.

    Adds `position_ids`, which start at 0 with each document, and `document_ids`. `rows` are those of a `PackedSplit`.
    """
    documents = [document for row in rows for document in row["documents"]]
    single = collate(documents, pad_id)
    is_token = single["attention_mask"].bool()
    lengths = is_token.sum(1)
    counts = torch.tensor([len(row["documents"]) for row in rows])
    row_of = torch.repeat_interleave(torch.arange(len(rows)), counts)
    first_of_row = (counts.cumsum(0) - counts)[row_of]
    begins = lengths.cumsum(0) - lengths
    columns = (begins - begins[first_of_row])[:, None] + torch.arange(is_token.shape[1])
    target = (row_of[:, None].expand_as(is_token)[is_token], columns[is_token])
    single["position_ids"] = torch.arange(is_token.shape[1]).expand_as(is_token)
    single[DOCUMENT_IDS] = (torch.arange(len(documents)) - first_of_row + 1)[:, None].expand_as(is_token)
    shape = (len(rows), int(columns[is_token].max()) + 1)
    return {name: _moved(name, tensor, is_token, target, shape, pad_id) for name, tensor in single.items()}


def _moved(
    name: str, tensor: Tensor, is_token: Tensor, target: tuple[Tensor, Tensor], shape: tuple[int, int], pad_id: int
) -> Tensor:
    assert tensor.shape[:2] == is_token.shape, f"{name} is not per token: the spec does not allow packing here"
    fill = {"input_ids": pad_id, "labels": IGNORED}.get(name, 0)
    moved = torch.full((*shape, *tensor.shape[2:]), fill, dtype=tensor.dtype)
    moved[target] = tensor[is_token]
    return moved
