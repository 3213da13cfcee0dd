"""What was found, on disk as soon as it is known: one file per start and rank, read back in the order of the data.

A folder belongs to one question to one model about one file (`key`). A killed run leaves whole lines and perhaps a piece
of one, which is not counted; the next start computes what is missing, on any number of ranks.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

from launcher.errors import ABSENT, DataError
from tools.evaluation.values import Outcome, Part

Key = tuple[int, int]
"""(example, part)."""


class Spool:
    def __init__(self, folder: Path, key: str, rank: int) -> None:
        self.folder = folder
        self.key = key
        self.done = frozenset((line["example"], line["part"]) for path in self._files() for line in self._lines(path))
        number = sum(1 for _ in folder.glob(f"rank-{rank:05d}-*.jsonl"))
        self._file = (folder / f"rank-{rank:05d}-{number:05d}.jsonl").open("x", encoding="utf-8")
        self._file.write(json.dumps({"key": key}) + "\n")

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def put(self, window: int, parts: Iterable[Part], outcomes: Iterable[Outcome]) -> None:
        """Written through to the operating system, so that a kill loses no batch that was done."""
        for part, outcome in zip(parts, outcomes, strict=True):
            place = {"window": window, "example": part.example, "part": part.number}
            self._file.write(json.dumps({**place, "facts": part.facts, "outcome": outcome}) + "\n")
        self._file.flush()

    def examples(self) -> Iterator[tuple[int, dict[str, Any], list[Outcome]]]:
        """(example, its facts, the outcomes of its parts), in order, once all ranks are done. A window in memory at once."""
        lines = heapq.merge(*(self._lines(path) for path in self._files()), key=lambda line: line["window"])
        for _, window in groupby(lines, key=lambda line: line["window"]):
            known = {(line["example"], line["part"]): line for line in window}
            for example, parts in groupby(sorted(known), key=lambda key: key[0]):
                found = [known[key] for key in parts]
                yield example, found[0]["facts"], [line["outcome"] for line in found]

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("rank-*.jsonl"))

    def _lines(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open(encoding="utf-8") as file:
            head = _parsed(file.readline())
            if head is None:
                return
            if head.get("key") != self.key:
                rule = "holds what was found for another model, other data or other options"
                raise DataError("--save", str(self.folder), rule, "name another file, or delete that folder")
            for line in file:
                value = _parsed(line)
                if value is not None:
                    yield value


def _parsed(line: str) -> dict[str, Any] | None:
    """None for the piece of a line that a kill leaves: it has no end."""
    if not line.endswith("\n"):
        return None
    value = json.loads(line)
    assert isinstance(value, dict)
    return value


def read_predictions(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `--save` file, after its head. DataError where it is no such file, or not whole."""
    try:
        with path.open(encoding="utf-8") as file:
            head = _decoded(path, 1, file.readline())
            if not isinstance(head.get("num_examples"), int):
                raise DataError(f"{path}:1", ABSENT, "is not the first line of a --save file", "give one")
            yield head
            number = 0
            for number, line in enumerate(file, start=1):
                yield _decoded(path, number + 1, line)
    except OSError as error:
        raise DataError(str(path), ABSENT, f"cannot be read ({error.strerror})", "give a --save file") from None
    except UnicodeDecodeError:
        raise DataError(str(path), ABSENT, "is not UTF-8", "give a --save file") from None
    if number != head["num_examples"]:
        rule = f"is truncated: it holds {number} of the {head['num_examples']} examples that its first line promises"
        raise DataError(str(path), ABSENT, rule, "copy it again, or make it again with --save")


def _decoded(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        rule = "is truncated" if line and not line.endswith("\n") else "is not a line of a --save file"
        raise DataError(f"{path}:{number}", ABSENT, rule, "copy it again, or make it again with --save")
    return value
