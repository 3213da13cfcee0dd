"""Puts a result in place: whole or not at all, never over something else, and again where a killed run stopped."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.records import StoredBytes
from launcher.stored.tensors import Progress
from launcher.stored.values import Ledger, stored_in
from tools.formats.files import JOURNAL, Copy, Planned, plan_digest
from tools.formats.hf import fsync_folder

LOCK = ".convert.lock"
Finish = Callable[[Path, Mapping[str, Sequence[int]]], None]
"""Given the folder and the CRC-32 of each file's slots: writes what depends on them."""


@dataclass(frozen=True)
class Result:
    """Files to be, and where."""

    out: Path
    files: list[Planned]
    finish: Finish
    inputs: tuple[Any, ...]
    """Options that decide the bytes, beside the source's files."""
    one_file: bool = False
    """`out` is a file, not a folder."""

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def place(result: Result, proved: bool, report: Progress) -> None:
    """Copies everything, proves what was read unless it is `proved`, and renames. Raises `CheckpointError`."""
    records = _records(result.files)
    digest = plan_digest(result.files, (*result.inputs, *_identities(records)))
    ledger = Ledger()
    if not proved:
        ledger.expect(records)
    with appearing(result.out, result.num_bytes, digest, result.one_file) as folder:
        crcs = Copy(folder, result.files, ledger if not proved else None, report).run(digest)
        ledger.check(lambda done, total: report("checking", done, total))
        result.finish(folder, crcs)


def _records(files: Sequence[Planned]) -> list[StoredBytes]:
    parts = (part.values for file in files for slot in file.slots for part in slot.parts)
    stored = (one for values in parts if values is not None for one in stored_in(values))
    return list(dict.fromkeys(record for one in stored for record in one.records()))


def _identities(records: Sequence[StoredBytes]) -> list[tuple[str, int, int]]:
    """Name, size and time of every file that is read: another checkpoint at the same path is another copy."""
    found = []
    for file in sorted({record.file for record in records}):
        facts = file.stat()
        found.append((str(file), facts.st_size, facts.st_mtime_ns))
    return found


def check_target(out: Path, one_file: bool = False) -> None:
    empty = out.is_dir() and not one_file and not any(out.iterdir())
    if out.is_symlink() or (out.exists() and not empty):
        rule = "exists" if one_file else "exists and is not an empty folder"
        raise CheckpointError(str(out), ABSENT, rule, "name another, or remove it first")


@contextmanager
def appearing(out: Path, num_bytes: int, digest: str = "", one_file: bool = False) -> Iterator[Path]:
    """A folder beside `out` that is renamed to `out` (or whose file is) when the body succeeds.

    It is removed when the body fails; a kill leaves it, and the next run of the same conversion goes on in it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f"{out.name}.partial")
    folder.mkdir(exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        _lock(lock, folder)
        try:
            _clear_others(folder, digest)
            _check_room(out, num_bytes - _present(folder))
            yield folder
            for name in (JOURNAL, LOCK):
                (folder / name).unlink(missing_ok=True)
            _rename(folder, out, one_file)
        finally:
            if folder.exists():  # not renamed: an error, or Ctrl-C
                shutil.rmtree(folder)


def _lock(lock: Any, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise CheckpointError(str(folder), ABSENT, "is being written by another run", "wait for it") from None


def _clear_others(folder: Path, digest: str) -> None:
    """What another conversion left is no use to this one."""
    journal = folder / JOURNAL
    if digest and journal.is_file() and f'"{digest}"' in journal.read_text(encoding="utf-8").partition("\n")[0]:
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def _present(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def _check_room(out: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes:
        rule = f"needs {num_bytes} bytes, the disk has {free} free"
        raise CheckpointError(str(out), ABSENT, rule, "name another disk")


def _rename(folder: Path, out: Path, one_file: bool) -> None:
    if one_file:
        os.link(folder / out.name, out)  # fails where something has appeared meanwhile
        shutil.rmtree(folder)
    else:
        for part in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            fsync_folder(part)
        folder.rename(out)
    fsync_folder(out.parent)
