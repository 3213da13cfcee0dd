"""The chain of attempts of one run, `<output_dir>/attempts.jsonl`, and what follows when one of them ends.

A line when an attempt begins and a line when it ends. One that has no end was cut off: its node went down.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launcher.attempt.records import RankRecord
from launcher.errors import EXIT_DONE, EXIT_OURS, EXIT_PREEMPTED

ATTEMPTS = "attempts.jsonl"
Action = Literal["finish", "restart", "fail"]
FAILURES_OF_A_BAD_NODE = 2
"""A node that failed this often is left out."""


@dataclass(frozen=True)
class Attempt:
    """One start of the ranks."""

    via: str
    job: str
    """Job id of a scheduler; empty on one's own machines."""
    nodes: tuple[str, ...]
    began: float
    """Seconds since the epoch."""
    ended: float | None = None
    exit_code: int | None = None
    message: str = ""
    failed_node: str = ""
    """Where the first failure was, when it was the node's or may have been."""
    steps: tuple[int, int] | None = None
    """Steps recorded when it began and when it ended."""
    action: str = ""

    @property
    def was_cut_off(self) -> bool:
        return self.ended is None


@dataclass(frozen=True)
class Verdict:
    action: Action
    reason: str
    bad_nodes: tuple[str, ...] = ()
    """Left out of the next attempt."""


def began(output_dir: Path, attempt: Attempt) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    _append(output_dir, {"kind": "began", **asdict(attempt)})


def ended(output_dir: Path, attempt: Attempt) -> None:
    _append(output_dir, {"kind": "ended", **asdict(attempt)})


def _append(output_dir: Path, line: dict[str, Any]) -> None:
    with (output_dir / ATTEMPTS).open("a") as file:
        file.write(json.dumps(line) + "\n")


def attempts(output_dir: Path) -> list[Attempt]:
    """In order; a line that a power cut left half written is passed over."""
    path = output_dir / ATTEMPTS
    found: list[Attempt] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            raw = json.loads(line)
            kind = raw.pop("kind")
            attempt = Attempt(**{**raw, "nodes": tuple(raw["nodes"]), "steps": raw["steps"] and tuple(raw["steps"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        if kind == "ended" and found and found[-1].began == attempt.began:
            found[-1] = attempt
        else:
            found.append(attempt)
    return found


def cut_off(output_dir: Path, lost: dict[str, str]) -> None:
    """Close an attempt that never ended. lost: node -> what happened to it, of the nodes that are known to have failed."""
    chain = attempts(output_dir)
    if not chain or not chain[-1].was_cut_off:
        return
    last = chain[-1]
    node = next((node for node in last.nodes if node in lost), "")
    words = f"cut off: {node} {lost[node]}" if node else "cut off without a word"
    closed = replace(last, ended=time.time(), exit_code=EXIT_OURS, message=words, failed_node=node, action="restart")
    ended(output_dir, closed)


def last_step(output_dir: Path) -> int:
    """The last step in metrics.jsonl, 0 where there is none."""
    try:
        lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def decide(
    chain: list[Attempt], code: int, failure: RankRecord | None, max_restarts: int, max_requeues: int
) -> Verdict:
    """What follows an attempt that ended with this code. chain: this submission's earlier attempts and this one, last.

    max_restarts: after failures that may pass; max_requeues: after being told to stop.
    """
    if code == EXIT_DONE:
        return Verdict("finish", "done")
    earlier = chain[:-1]
    if code == EXIT_PREEMPTED:
        stops = sum(attempt.exit_code == EXIT_PREEMPTED for attempt in earlier)
        if stops >= max_requeues:
            return Verdict("fail", f"told to stop {stops + 1} times, launch.max_requeues is {max_requeues}")
        return Verdict("restart", "told to stop, and saved", bad_nodes(chain))
    if code != EXIT_OURS or (failure is not None and not failure.may_pass):
        return Verdict("fail", "the same would happen again")
    failures = sum(attempt.exit_code not in (EXIT_DONE, EXIT_PREEMPTED) for attempt in earlier)
    if failures >= max_restarts:
        return Verdict("fail", f"failed {failures + 1} times, launch.max_restarts is {max_restarts}")
    return Verdict(
        "restart", f"failure {failures + 1} of at most {max_restarts} that are tried again", bad_nodes(chain)
    )


def bad_nodes(chain: list[Attempt]) -> tuple[str, ...]:
    """Nodes on which attempts failed twice."""
    counts = Counter(attempt.failed_node for attempt in chain if attempt.failed_node)
    return tuple(sorted(node for node, count in counts.items() if count >= FAILURES_OF_A_BAD_NODE))
