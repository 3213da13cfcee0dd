"""Rows of JSON files: an object per line, a list of objects, or questions as SQuAD has them."""

from __future__ import annotations

import codecs
import json
import re
from typing import IO, Any

from launcher.data.lines import Rows, good_lines, lines
from launcher.data.spans import is_squad, squad_rows
from launcher.errors import ABSENT, DataError


def jsonl_rows(file_name: str, file: IO[bytes]) -> Rows:
    """An object per line; a line that is none does not end the file."""
    for number, line in lines(file_name, file):
        if isinstance(line, DataError):
            yield number, line
        elif line.strip():
            yield number, _object(f"{file_name}:{number}", line)


def _object(where: str, line: str) -> dict[str, Any] | DataError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return DataError(where, ABSENT, f"is not JSON ({reason})", "write one object per line")
    return row if isinstance(row, dict) else DataError(where, row, "is not a JSON object", "write one object per line")


def json_rows(file_name: str, file: IO[bytes]) -> Rows:
    """Any of the three. All but lines is read whole."""
    first = file.readline()
    file.seek(0)
    if first.lstrip(codecs.BOM_UTF8).lstrip().startswith(b"{") and _is_json(first):
        document = json.loads(first.decode("utf-8-sig"))
        if not is_squad(document):
            yield from jsonl_rows(file_name, file)
            return
    text = "".join(line for _, line in good_lines(file_name, file))
    if text.lstrip().startswith("["):
        yield from _elements(file_name, text)
        return
    document = _parsed(file_name, text)
    if not is_squad(document):
        rule = "is neither a list of objects, nor objects line by line, nor questions as SQuAD has them"
        raise DataError(file_name, ABSENT, rule, "write a list, or one object per line")
    yield from squad_rows(document)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(file_name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(file_name, error) from None


def _not_json(file_name: str, error: Exception, line: int = 0) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        line, reason = line or error.lineno, f"{error.msg} at column {error.colno}"
    else:
        reason = str(error)
    where = f"{file_name}:{line}" if line else file_name
    return DataError(where, ABSENT, f"is not JSON ({reason})", "mend the file")


def _elements(file_name: str, text: str) -> Rows:
    """The objects of a list, each with the line where it begins."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    at, line, counted = blank.match(text, text.index("[") + 1).end(), 1, 0  # type: ignore[union-attr]
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _not_json(file_name, error) from None
        if not isinstance(row, dict):
            row = DataError(f"{file_name}:{line}", row, "is not a JSON object", "write a list of objects")
        yield line, row
        at = blank.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith(",", at):
            at = blank.match(text, at + 1).end()  # type: ignore[union-attr]
        elif not text.startswith("]", at):
            line += text.count("\n", counted, at)
            raise DataError(f"{file_name}:{line}", ABSENT, "is not JSON (the list is not closed)", "mend the file")
