"""Which records are held out: decided by each record alone, so appending data moves no record to the other side."""

from __future__ import annotations

from hashlib import blake2b

from launcher.task import Record


def share_of(record: Record, purpose: str) -> float:
    """A number in [0, 1), the same for the same text and label wherever and how often they stand.

    `purpose` makes draws independent: what is held out says nothing about what another sample of the records takes.
    """
    digest = blake2b(digest_size=8, person=purpose.encode())
    digest.update(record.text.encode())
    digest.update(b"\xff" + (record.label or "").encode())  # 0xff is in no UTF-8: the two cannot run into each other
    return int.from_bytes(digest.digest(), "big") / 2**64


def is_held_out(record: Record, validation_fraction: float) -> bool:
    """Exact duplicates fall on the same side."""
    return share_of(record, "validation") < validation_fraction
