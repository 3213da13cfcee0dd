"""Prepared data that lie behind a URL: the index and the tokenizer at once, shards ahead of their use.

Shards are kept in a folder of bounded size that all ranks of a node share. What comes is compared with the checksum in
the index before it gets its name, and what a process finds there when it first opens it; so no rank reads a byte that
was not written by `fleetune prepare`. Which shard goes first is decided by when each was last asked for.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.checksum import file_digest
from launcher.data.building import locked
from launcher.data.fingerprint import digest_of
from launcher.data.remote import fetch
from launcher.errors import ABSENT, DataError, Interrupted
from launcher.job.resources import cache_dir
from launcher.job.spec import DataSection
from launcher.units import GIB, show_bytes

WINDOW_SHARDS = 16
"""Shards drawn from at a time: 1 GiB, some 500 million tokens to shuffle among, and two windows fit any disk."""

CACHE_GIB = 32.0

_NUM_THREADS = 4
"""Shards fetched at once by a process: one connection to an object store gives about 100 MB/s, a node reads more."""


@dataclass(frozen=True)
class Origin:
    """Where prepared data come from, and where what was fetched of them is kept."""

    url: str
    folder: Path
    limit_bytes: int
    window_shards: int = WINDOW_SHARDS

    @classmethod
    def of(cls, url: str, data: DataSection) -> Origin:
        root = Path(data.cache_dir) if data.cache_dir else cache_dir() / "data"
        limit_bytes = int((data.cache_gib or CACHE_GIB) * GIB)
        url = url.rstrip("/")
        return cls(url, root / digest_of([url]), limit_bytes, data.window_shards or WINDOW_SHARDS)

    def fetch_index(self) -> None:
        """As it is there now: what is kept of another content is found out by its checksums. Interrupted, DataError."""
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            fetch(f"{self.url}/index.json", self.folder / "index.json")

    def fetch_tokenizer(self, index: dict[str, Any]) -> None:
        folder = self.folder / "tokenizer"
        with _writing(self.folder), locked(folder, _wait):
            folder.mkdir(exist_ok=True)
            for entry in index.get("tokenizer_files", ()):
                path = folder / entry["file"]
                if not (path.is_file() and file_digest(path) == entry["blake2b"]):
                    _fetch_whole(f"{self.url}/tokenizer/{entry['file']}", path, entry, "")

    def check_room(self, entry: dict[str, Any]) -> None:
        """DataError where the shards of two windows, the one in use and the one that is fetched, have no room."""
        sizes = sorted((shard["size"] for shard in entry["shards"]), reverse=True)
        needed = sum(sizes[: 2 * self.window_shards])
        if needed > self.limit_bytes:
            rule = f"is less than two windows of {self.window_shards} shards ({show_bytes(needed)})"
            way_out = f"give at least {needed / GIB:.3g}, or fewer data.window_shards"
            raise DataError("data.cache_gib", f"{self.limit_bytes / GIB:.3g}", rule, way_out)


class FetchedShards:
    """The shards of one split of such data; `ShardStore` of `mapped.py`."""

    def __init__(self, origin: Origin, split: str, entry: dict[str, Any]) -> None:
        self._origin, self._split, self._shards = origin, split, entry["shards"]
        self.num_open = 2 * origin.window_shards
        self._verified: set[int] = set()
        self._asked: tuple[int, ...] = ()
        self._wanted: deque[int] = deque()
        self._change = threading.Condition()

    def path(self, number: int) -> Path:
        """Where the shard lies, fetched if it does not. DataError: it is not as it was written; Interrupted: no network,
        no room."""
        target = self._target(number)
        with _writing(self._origin.folder):
            if not self._is_here(number):
                with locked(target, _wait):  # one rank of the node fetches it, the others find it
                    if not self._is_here(number):
                        self._make_room(self._shards[number]["size"])
                        _fetch_whole(self._url(number), target, self._shards[number], self._held(number))
                        self._verified.add(number)
        return target

    def ahead(self, numbers: Sequence[int]) -> None:
        """Fetch them in the background. What goes wrong there is told where the shard is needed."""
        if tuple(numbers) == self._asked:
            return
        self._asked = tuple(numbers)
        with self._change:
            self._wanted = deque(numbers)
            self._change.notify_all()
        assert self._threads, "they end with the process"

    @cached_property
    def _threads(self) -> list[threading.Thread]:
        threads = [threading.Thread(target=self._work, name="fetch", daemon=True) for _ in range(_NUM_THREADS)]
        for thread in threads:
            thread.start()
        return threads

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._wanted)
                number = self._wanted.popleft()
            with suppress(DataError):
                self.path(number)

    def _is_here(self, number: int) -> bool:
        """Whether it lies here as it was written; that it was asked for is noted in its time of modification."""
        target = self._target(number)
        with suppress(FileNotFoundError):
            os.utime(target)
            if number in self._verified or file_digest(target) == self._shards[number]["blake2b"]:
                self._verified.add(number)
                return True
            target.unlink(missing_ok=True)
        self._verified.discard(number)
        return False

    def _make_room(self, num_bytes: int) -> None:
        """Remove what was asked for longest ago. A mapped file may go too: whoever reads it still can."""
        kept = []
        for path in self._origin.folder.glob("*/*.arrow"):
            with suppress(FileNotFoundError):
                told = path.stat()
                kept.append((told.st_mtime_ns, told.st_size, path))
        excess = sum(size for _, size, _ in kept) + num_bytes - self._origin.limit_bytes
        for _, size, path in sorted(kept):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def _target(self, number: int) -> Path:
        return self._origin.folder / self._split / str(self._shards[number]["file"])

    def _url(self, number: int) -> str:
        return f"{self._origin.url}/{self._split}/{self._shards[number]['file']}"

    def _held(self, number: int) -> str:
        first = sum(shard["num_samples"] for shard in self._shards[:number])
        return f" ({self._split} samples {first} to {first + self._shards[number]['num_samples'] - 1})"


def _fetch_whole(url: str, target: Path, entry: dict[str, Any], held: str) -> None:
    """Fetched twice if need be: what was altered on its way is not so the second time."""
    arrived = target.with_name(f"{target.name}.new")
    try:
        for _ in range(2):
            fetch(url, arrived)
            if file_digest(arrived) == entry["blake2b"]:
                arrived.rename(target)
                return
    finally:
        arrived.unlink(missing_ok=True)
        arrived.with_name(f"{arrived.name}.part").unlink(missing_ok=True)
    rule = f"does not have the checksum it was written with{held}"
    raise DataError(url, ABSENT, rule, "copy the prepared folder there again")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error})"
        way_out = "make room, or give another data.cache_dir, and start the same command again"
        raise Interrupted(str(folder), ABSENT, rule, way_out) from error


def _wait() -> None:
    """Another rank is fetching the same; nobody needs to be told."""
