"""The lines of a file of text, decoded; one that is not UTF-8 is a DataError in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import IO, Any

from launcher.errors import ABSENT, DataError

Rows = Iterator[tuple[int | str, "Mapping[str, Any] | DataError"]]
"""(line number, or the place in words; the row), or what is wrong with the line."""


def lines(file_name: str, file: IO[bytes]) -> Iterator[tuple[int, str | DataError]]:
    """(line number from 1, line with its end); a byte order mark is dropped."""
    for number, line in enumerate(file, start=1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            rule = f"is not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line)"
            yield number, DataError(f"{file_name}:{number}", ABSENT, rule, "save the file as UTF-8")


def good_lines(file_name: str, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """For forms in which a line means nothing without those around it: a bad one ends the file."""
    for number, line in lines(file_name, file):
        if isinstance(line, DataError):
            raise line
        yield number, line


def good_or_noted(file_name: str, file: IO[bytes], bad: list[DataError]) -> Iterator[str]:
    """For a reader that takes lines as it likes: what is wrong with those it is about to take goes to `bad`."""
    for _, line in lines(file_name, file):
        if isinstance(line, DataError):
            bad.append(line)
            yield "\n"
        else:
            yield line
