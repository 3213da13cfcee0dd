"""Which checkpoints stay, and how one that is being read is never taken away."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.job.spec import CheckpointSection
from launcher.train.manifest import MANIFEST


def kept(scores: Mapping[int, float | None], rule: CheckpointSection, greater_is_better: bool = True) -> set[int]:
    """Of complete checkpoints by step, those that stay; a score is None where none was measured.

    Among equal scores the earlier one is the best: it was there first.
    """
    newest = sorted(scores, reverse=True)[: rule.keep_last]
    multiples = [step for step in scores if rule.keep_every is not None and step % rule.keep_every == 0]
    sign = -1.0 if greater_is_better else 1.0
    scored = sorted((sign * score, step) for step, score in scores.items() if score is not None)
    return {*newest, *multiples, *(step for _, step in scored[: rule.keep_best])}


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """While a checkpoint is read: `remove` leaves it alone, from whichever process."""
    with (folder / MANIFEST).open("rb") as manifest:
        _lock(manifest, fcntl.LOCK_SH)
        yield


def remove(folder: Path) -> bool:
    """Deletes a complete checkpoint; False when somebody reads it, and then it stays for a later time."""
    with (folder / MANIFEST).open("rb") as manifest:
        if not _lock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        (folder / MANIFEST).unlink()  # first no checkpoint any more, then gone
    shutil.rmtree(folder)
    return True


def _lock(file: Any, kind: int) -> bool:
    """A file system that knows no locks says so by an error; there it is as if nobody read."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
