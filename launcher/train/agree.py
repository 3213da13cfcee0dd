"""Ranks agree before they act: rank 0 decides, everyone obeys, and a mistake of the user's ends all ranks alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from launcher.errors import UserError

DecisionT = TypeVar("DecisionT")


def decide_on_first(decide: Callable[[], DecisionT]) -> DecisionT:
    """`decide()` on rank 0, its result (picklable) on every rank; its `UserError` is raised on every rank."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = decide()
        except UserError as error:
            box[1] = error.problems
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError.several(list(box[1]))
    return box[0]
