"""The ranks of this node, looked at from outside: one that vanishes without a word was killed, and is written down as that."""

from __future__ import annotations

import platform
import time
from pathlib import Path

from launcher.attempt.records import RankRecord, read_record, write_record
from launcher.spawn import ranks_below


class RankWatch:
    """`look(pid of the launcher)`, called a few times a second."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir
        self._seen: dict[int, int] = {}
        self.failure: RankRecord | None = None
        """The first one found here."""
        self.has_stopped = False
        """Whether one was told to stop, saved, and left."""

    def look(self, launcher_pid: int) -> None:
        alive = ranks_below(launcher_pid)
        for pid, rank in list(self._seen.items()):
            if pid not in alive:
                del self._seen[pid]
                self._gone(pid, rank)
        self._seen.update(alive)

    def ended(self, code: int) -> None:
        """The launcher has ended: whoever was last seen alive went with it."""
        for pid, rank in self._seen.items():
            if code != 0:
                self._gone(pid, rank)
        self._seen = {}

    def _gone(self, pid: int, rank: int) -> None:
        record = read_record(self._output_dir, rank)
        if record is None or record.state == "running":
            words = "it left no word: killed from outside, or by the kernel for lack of memory"
            record = RankRecord(rank, platform.node(), pid, "killed", time.time(), words, 1)
            if self.failure is None:  # what comes after it is taken down because of it
                write_record(self._output_dir, record)
        self.has_stopped = self.has_stopped or record.state == "stopped"
        if record.is_failure and self.failure is None:
            self.failure = record
