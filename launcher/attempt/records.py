"""What each rank of the current attempt leaves in `<output_dir>/ranks`, and which of several failures was the first.

A rank writes when it begins and when it leaves. One that was killed cannot: the node that started it sees it vanish, and
writes for it. So the record that a lost rank left behind says `running`, and the cause is not looked for in the echo.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

State = Literal["running", "done", "stopped", "failed", "killed"]
FOLDER = "ranks"

# Words of libraries when another rank has gone: an echo of a failure elsewhere, never the cause where there is one.
_ECHO = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Socket Timeout|socketPoll|recvValue|remote process exited"
    r"|ncclRemoteError|Gloo .*(failed|timed? ?out)|unhandled system error|Watchdog caught|closed by peer|RankLost",
    re.IGNORECASE,
)
# What may pass when it is tried again, though nothing was changed.
_PASSING = re.compile(
    r"NCCL|ncclSystemError|DistBackendError|DistNetworkError|DistStoreError|Rendezvous|uncorrectable ECC|XID"
    r"|Stale file handle|Input/output error|Connection timed out|Transport endpoint",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RankRecord:
    """How one rank stands, or how it left."""

    rank: int
    host: str
    pid: int
    state: State
    time: float
    """Seconds since the epoch."""
    message: str = ""
    exit_code: int = 0

    @property
    def is_failure(self) -> bool:
        return self.state in ("failed", "killed")

    @property
    def is_echo(self) -> bool:
        return self.state == "failed" and _ECHO.search(self.message) is not None

    @property
    def may_pass(self) -> bool:
        """Whether the same start may go well the next time."""
        if self.state == "killed" or self.is_echo:
            return True
        return self.exit_code == 1 and _PASSING.search(self.message) is not None

    def __str__(self) -> str:
        at = time.strftime("%H:%M:%S", time.localtime(self.time))
        return (
            f"rank {self.rank} on {self.host} (pid {self.pid}) {self.state} at {at}: {self.message or 'no word left'}"
        )


def write_record(output_dir: Path, record: RankRecord) -> None:
    """Whole or not at all; a run folder that cannot be written has its own error elsewhere."""
    folder = output_dir / FOLDER
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"rank-{record.rank:05d}.{os.getpid()}.tmp"
        partial.write_text(json.dumps(asdict(record)))
        partial.replace(_path(output_dir, record.rank))


def _path(output_dir: Path, rank: int) -> Path:
    return output_dir / FOLDER / f"rank-{rank:05d}.json"


def read_record(output_dir: Path, rank: int) -> RankRecord | None:
    return _parsed(_path(output_dir, rank))


def read_records(output_dir: Path) -> list[RankRecord]:
    paths = sorted((output_dir / FOLDER).glob("rank-*.json"))
    return [record for record in map(_parsed, paths) if record is not None]


def _parsed(path: Path) -> RankRecord | None:
    try:
        return RankRecord(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def clear_records(output_dir: Path) -> None:
    """Before an attempt begins."""
    shutil.rmtree(output_dir / FOLDER, ignore_errors=True)


def first_failure(records: list[RankRecord]) -> RankRecord | None:
    """The cause: what is no echo of another's end, the earliest of it; None where no rank failed."""
    failures = [record for record in records if record.is_failure]
    return min(failures, key=lambda record: (record.is_echo, record.time), default=None)
