"""Files to be: what is where in them, decided before the first byte, and the streaming copy that fills them.

Values are copied slot by slot in stretches of `CHUNK_BYTES`, by two threads; what only then is known (checksums) is
written last. A finished file is noted in a journal, from which a killed copy goes on.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.tensors import Progress
from launcher.stored.values import CHUNK_BYTES, Ledger, Values

JOURNAL = ".convert.jsonl"
FLUSH_BYTES = 64 * 2**20
THREADS = 2  # one reads while the other writes; more gained nothing on one disk


@dataclass(frozen=True)
class Part:
    """Elements `start` to `start + numel` of a tensor; without one, zeros."""

    values: Values | None
    start: int
    numel: int
    name: str = ""
    """For messages."""


@dataclass(frozen=True)
class Slot:
    """A stretch of values in a file to be."""

    offset: int
    dtype: torch.dtype
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.numel for part in self.parts) * self.dtype.itemsize


@dataclass(frozen=True)
class Planned:
    """A file to be."""

    name: str
    """Relative to the folder, with `/`."""
    num_bytes: int
    slots: tuple[Slot, ...]
    seal: Callable[[Sequence[int]], list[tuple[int, bytes]]]
    """Given the CRC-32 of each slot: what lies between them, as (offset, bytes)."""


def literal_file(name: str, content: bytes) -> Planned:
    return Planned(name, len(content), (), lambda _crcs: [(0, content)])


def plan_digest(files: Sequence[Planned], inputs: Sequence[Any]) -> str:
    """Names a copy: the same files, made of the same inputs."""
    told = [
        [file.name, file.num_bytes, [[slot.offset, str(slot.dtype), slot.num_bytes] for slot in file.slots]]
        for file in files
    ]
    return blake2b(json.dumps([told, [str(one) for one in inputs]]).encode(), digest_size=16).hexdigest()


class Copy:
    """One run of the writer: files in a folder, and what was read for them."""

    def __init__(self, folder: Path, files: Sequence[Planned], ledger: Ledger | None, report: Progress) -> None:
        self.folder, self.files, self.ledger, self._report = folder, files, ledger, report
        self._total = sum(file.num_bytes for file in files)
        self._done = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self, digest: str) -> dict[str, list[int]]:
        """Writes all files that the journal does not know; the CRC-32 of each file's slots."""
        journal = self.folder / JOURNAL
        finished = _read_journal(journal, digest, self.folder, self.files)
        with journal.open("a" if finished is not None else "w", encoding="utf-8") as notes:
            if finished is None:
                finished = {}
                _note(notes, {"plan": digest})
            for file in self.files:
                if file.name in finished:
                    self._advance(file.num_bytes)
                    continue
                finished[file.name] = self._write(file)
                _note(notes, {"file": file.name, "crcs": finished[file.name]})
        return finished

    def _write(self, file: Planned) -> list[int]:
        path = self.folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.ftruncate(handle, file.num_bytes)
            with _Flusher(handle) as self._flusher:
                crcs = self._fill(handle, file)
            for offset, content in file.seal(crcs):
                _pwrite(handle, memoryview(content), offset)
            os.fsync(handle)
        finally:
            os.close(handle)
        self._advance(file.num_bytes - sum(slot.num_bytes for slot in file.slots))
        return crcs

    def _fill(self, handle: int, file: Planned) -> list[int]:
        """Long slots one thread each; many short ones in batches, so that small tensors do not cost a task."""
        batches = list(_batches(file.slots))
        if len(batches) == 1:
            return self._fill_batch(handle, batches[0])
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                found = list(pool.map(lambda batch: self._fill_batch(handle, batch), batches))
            except BaseException:
                self._stop.set()
                raise
        return [crc for crcs in found for crc in crcs]

    def _fill_batch(self, handle: int, slots: Sequence[Slot]) -> list[int]:
        return [self._fill_slot(handle, slot) for slot in slots]

    def _fill_slot(self, handle: int, slot: Slot) -> int:
        crc, at = 0, slot.offset
        for chunk in self._chunks(slot):
            if self._stop.is_set():
                break
            view = chunk.view(torch.uint8).numpy().data
            crc = crc32(view, crc)
            _pwrite(handle, view, at)
            at += view.nbytes
            self._flusher.wrote(view.nbytes)
            self._advance(view.nbytes)
        return crc

    def _chunks(self, slot: Slot) -> Iterator[torch.Tensor]:
        """The slot's elements in its dtype; the buffer is the same each time."""
        room = max(1, CHUNK_BYTES // slot.dtype.itemsize)
        buffer = torch.empty(min(room, sum(part.numel for part in slot.parts)), dtype=slot.dtype)
        filled = 0
        for part in slot.parts:
            at = 0
            while at < part.numel:
                take = min(part.numel - at, buffer.numel() - filled)
                read_as(part, at, buffer[filled : filled + take], self.ledger)
                at, filled = at + take, filled + take
                if filled == buffer.numel():
                    yield buffer
                    filled = 0
        if filled:
            yield buffer[:filled]

    def _advance(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            self._report("writing", self._done, self._total)


class _Flusher:
    """Has the disk write while values are still being read: the kernel would wait for a tenth of the memory to be dirty."""

    def __init__(self, handle: int) -> None:
        self._handle, self._dirty = handle, 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def wrote(self, num_bytes: int) -> None:
        with self._lock:
            self._dirty += num_bytes
            if self._dirty >= FLUSH_BYTES and (self._running is None or self._running.done()):
                self._running, self._dirty = self._pool.submit(os.fdatasync, self._handle), 0


def read_as(part: Part, at: int, into: torch.Tensor, ledger: Ledger | None) -> None:
    """Fills `into` with the part's elements from `at`, cast to its dtype.

    Raises `CheckpointError` when a finite weight would become infinite without a word.
    """
    if part.values is None:
        into.zero_()
        return
    if part.values.dtype == into.dtype:
        part.values.read(part.start + at, into, ledger)
        return
    wide = torch.empty(into.numel(), dtype=part.values.dtype)
    part.values.read(part.start + at, wide, ledger)
    into.copy_(wide)
    if into.dtype.is_floating_point and wide.dtype.is_floating_point:
        _check_range(wide, into, part.name)


def _check_range(wide: torch.Tensor, short: torch.Tensor, name: str) -> None:
    if bool(short.isfinite().all()):
        return
    if bool((wide.isfinite() & ~short.isfinite()).any()):
        rule = f"holds values beyond the range of {short.dtype} (largest {wide.abs().max():.3g})"
        raise CheckpointError(name, ABSENT, rule, "use --dtype bf16 or fp32")


def _batches(slots: Sequence[Slot]) -> Iterator[list[Slot]]:
    batch: list[Slot] = []
    size = 0
    for slot in slots:
        batch.append(slot)
        size += slot.num_bytes
        if size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    if batch or not slots:
        yield batch


def _pwrite(handle: int, view: memoryview, offset: int) -> None:
    """One `pwrite` may take less than it is given."""
    while view.nbytes:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


def _note(notes: Any, line: dict[str, Any]) -> None:
    notes.write(json.dumps(line) + "\n")
    notes.flush()
    os.fsync(notes.fileno())


def _read_journal(journal: Path, digest: str, folder: Path, files: Sequence[Planned]) -> dict[str, list[int]] | None:
    """The files that an earlier run of the same copy finished; None when there was none."""
    if not journal.is_file():
        return None
    lines = []
    for text in journal.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the line that was being written
            break
    if not lines or lines[0].get("plan") != digest:
        return None
    sizes = {file.name: file.num_bytes for file in files}
    done = {line["file"]: line["crcs"] for line in lines[1:] if "file" in line}
    return {name: crcs for name, crcs in done.items() if _size(folder / name) == sizes.get(name)}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
