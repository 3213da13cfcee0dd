"""When a checkpoint is written: the state is copied to host memory in a moment, and a thread writes it behind the steps.

One save at a time; the newest complete checkpoint is never touched. All ranks write together, in a process group of
their own, so that the collectives of a save and those of the steps cannot be taken for each other. Where a rank fails,
all ranks learn of it in the same place, and the run ends with the checkpoint before.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from launcher.errors import ABSENT, CheckpointError, UserError
from launcher.job.spec import CheckpointSection
from launcher.train.by_name import open_state
from launcher.train.checkpoint import (
    digest_and_sync,
    folders_of,
    fresh_folder,
    prune,
    random_state,
    seal,
    write_random_state,
)
from launcher.train.engine import Engine
from launcher.train.manifest import Manifest
from launcher.train.prove import prove
from launcher.train.remote_copy import copy_out
from launcher.train.report import LOG

ResultT = TypeVar("ResultT")
FAILURES = (OSError, RuntimeError, UserError, CheckpointException)
"""What a full or lost disk becomes on its way through torch (RuntimeError) and DCP (CheckpointException)."""
OUT_OF_ROOM = "make room or mend the disk; the same command goes on from the checkpoint before"


@dataclass(frozen=True)
class Work:
    """All that a save needs once the step goes on."""

    manifest: Manifest
    partial: Path
    final: Path
    write: Callable[[Any], None]
    """Writes the engine's part; gets the process group."""
    random: bytes
    trained: Mapping[str, tuple[int, ...]]


class Saver:
    def __init__(
        self, root: Path, hf_files: Path, engine: Engine, rule: CheckpointSection, greater: bool = True
    ) -> None:
        self._root, self._hf_files, self._engine, self._rule, self._greater = root, hf_files, engine, rule, greater
        self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._behind = rule.asynchronous and engine.can_copy
        if rule.asynchronous and not engine.can_copy:
            LOG.warning("checkpoints are written while training waits: the optimiser lies on NVMe, not in memory")

    def save(self, manifest: Manifest) -> None:
        """Begins a save; it is complete after `wait`. All ranks together. Raises what went wrong in the one before."""
        self.wait()
        partial, final = folders_of(self._root, manifest.step)
        self._on_first(lambda: fresh_folder(partial))
        write = self._engine.staged(partial, with_frozen=manifest.base is None, copy=self._behind)
        work = Work(manifest, partial, final, write, random_state(), self._engine.trained_shapes())
        if not self._behind:
            self._finish(work)
            return
        self._thread = threading.Thread(target=self._finish_behind, args=(work,), daemon=True)
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Returns when nothing is being written; raises what went wrong meanwhile."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _finish_behind(self, work: Work) -> None:
        try:
            self._finish(work)
        except BaseException as error:  # noqa: BLE001 - a thread's entry point: `wait` raises it
            self._error = error

    def _finish(self, work: Work) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        share = slice(rank, None, world)
        try:
            self._together(lambda: work.write(self._group))
            self._together(lambda: write_random_state(work.partial, rank, work.random))
            self._on_first(lambda: shutil.copytree(self._hf_files, work.partial / "hf"))
            self._together(lambda: self._prove(work, share))
            shares = self._together(lambda: digest_and_sync(work.partial, share))
            files = dict(sorted((name, entry) for entries in shares for name, entry in entries.items()))
            self._on_first(lambda: seal(work.partial, work.final, work.manifest, files))
        except UserError:
            if rank == 0:  # half a checkpoint is of no use, and its room may be what was missing
                shutil.rmtree(work.partial, ignore_errors=True)
            raise
        LOG.info("saved %s", work.final)
        best_step = (work.manifest.best or {}).get("step")
        self._on_first(lambda: prune(self._root, self._rule, best_step, self._greater))
        if self._rule.copy_to is not None:
            self._copy_out(work.final, str(self._rule.copy_to), files, share)

    def _copy_out(self, folder: Path, target: str, files: Mapping[str, Any], share: slice) -> None:
        """A store that cannot be reached costs the copy, not the run."""
        try:
            self._together(lambda: copy_out(folder, target, files, share))
            self._on_first(lambda: copy_out(folder, target, None, share))
        except UserError as error:
            LOG.warning("%s", error)

    def _prove(self, work: Work, share: slice) -> None:
        if not self._engine.has_plain_optimizer():
            LOG.info("saved values are not read again: the optimiser's are in a form of its own")
            return
        prove(open_state(work.partial, self._engine.folder_name), work.trained, share)

    def _on_first(self, body: Callable[[], Any]) -> None:
        self._together(lambda: body() if dist.get_rank() == 0 else None)

    def _together(self, body: Callable[[], ResultT]) -> list[ResultT]:
        """`body()` on every rank, and all results; one rank's failure is raised on all of them."""
        outcome: tuple[Any, Any] = (None, None)
        try:
            outcome = (body(), None)
        except FAILURES as error:
            outcome = (None, _problem(error, self._root))
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, outcome, group=self._group)
        for _, problem in shares:
            if problem is not None:
                raise problem
        return [result for result, _ in shares]


def _problem(error: BaseException, root: Path) -> UserError:
    if isinstance(error, UserError):
        return error
    causes = list(error.failures.values()) if isinstance(error, CheckpointException) else [error]
    first = causes[0][0] if isinstance(causes[0], tuple) else causes[0]
    where = getattr(first, "filename", None) or str(root)
    words = getattr(first, "strerror", None) or "a write failed"  # torch's own words name a line of its source
    free = shutil.disk_usage(root).free
    return CheckpointError(str(where), ABSENT, f"could not be written ({words}; {free} bytes are free)", OUT_OF_ROOM)
