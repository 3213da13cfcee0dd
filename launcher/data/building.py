"""The folder in which prepared data are made: one process at a time, and what a killed one had finished is found again.

`<folder>.building` holds finished chunks, each named in `finished.jsonl` with its checksum; `<folder>.lock` is held
while one works on it. Both are gone when the data are in place.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher.checksum import file_digest

_JOURNAL = "finished.jsonl"


@contextmanager
def locked(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Only one process at a time is inside, on any node that shares the file system; `waiting` is called by the others.

    The lock is the kernel's (flock), so it ends with its holder, killed or not.
    """
    path = folder.with_name(f"{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _taken(path, waiting)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _taken(path: Path, waiting: Callable[[], None]) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _wait_for(descriptor, waiting)
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # the holder before us has removed this file, and others lock a new one


def _wait_for(descriptor: int, waiting: Callable[[], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


class Building:
    """Finished work by name, kept for a successor that makes the same thing."""

    def __init__(self, target: Path, fingerprint: str) -> None:
        """What another fingerprint left here is removed."""
        self.folder = target.with_name(f"{target.name}.building")
        entries = self._read()
        if not entries or entries[0].get("fingerprint") != fingerprint:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            entries = [{"fingerprint": fingerprint}]
        self._finished = {entry["name"]: entry for entry in entries[1:]}
        journal = "".join(json.dumps(entry) + "\n" for entry in entries)
        (self.folder / _JOURNAL).write_text(journal, encoding="utf-8")  # without a line that a kill cut short

    def found(self, name: str) -> dict[str, Any] | None:
        """What was noted under this name, if the files it speaks of are as they were; else it is to be made again."""
        entry = self._finished.get(name)
        if entry is None or not all(self._is_whole(part) for part in entry.get("files", ())):
            return None
        return entry

    def note(self, name: str, entry: dict[str, Any]) -> dict[str, Any]:
        """This is finished. `entry["files"]`: its files below the folder, each with `file`, `size` and `blake2b`."""
        with (self.folder / _JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps({"name": name, **entry}) + "\n")
        return entry

    def described(self, path: Path) -> dict[str, Any]:
        """A file below the folder, for `note`."""
        return {
            "file": str(path.relative_to(self.folder)),
            "size": path.stat().st_size,
            "blake2b": file_digest(path),
        }

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        with suppress(OSError, ValueError), (self.folder / _JOURNAL).open(encoding="utf-8") as journal:
            for line in journal:
                entries.append(json.loads(line))  # noqa: PERF401  what comes before a broken line counts
        return entries

    def _is_whole(self, part: dict[str, Any]) -> bool:
        path = self.folder / part["file"]
        return path.is_file() and path.stat().st_size == part["size"] and file_digest(path) == part["blake2b"]
