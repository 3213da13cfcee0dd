"""Files -> records, one at a time. Whatever is wrong in a file is a DataError that names file, line and column.

Memory holds one record (for parquet, one batch of rows; for `sample_by: document`, one file), never a corpus.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any

from launcher.data.formats import Columns, check_columns, record_of, required
from launcher.data.sources import Source
from launcher.data.spans import conll_rows, is_squad, squad_rows
from launcher.errors import ABSENT, DataError
from launcher.task import Record

PARQUET_BATCH_ROWS = 1000


def read_records(sources: Iterable[Source], columns: Columns, sample_by: str) -> Iterator[Record]:
    """Every record of every file, in order. `sample_by` (document, paragraph, line) is for text files."""
    for source in sources:
        if source.format == "text":
            yield from _read_text(source, columns, sample_by)
        else:
            yield from _read_table(source, columns)


def in_lists(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Lists of `size` records; the last may be shorter."""
    records = iter(records)
    while some := list(islice(records, size)):
        yield some


@contextmanager
def _opened(source: Source) -> Iterator[IO[bytes]]:
    """The bytes of a file, unzipped."""
    path = str(source.path)
    try:
        with gzip.open(path) if source.is_gzip else source.path.open("rb") as file:
            yield file  # type: ignore[misc]  # GzipFile reads bytes as any binary file does
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(path, ABSENT, f"is not a whole gzip file ({error})", "copy it again, or unzip it") from None
    except OSError as error:
        raise DataError(path, ABSENT, f"cannot be read ({error.strerror or error})", "see its permissions") from None


def _lines(source: Source, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end), decoded; a byte order mark is dropped."""
    for number, line in enumerate(file, start=1):
        yield number, _decoded(source, number, line)


def _decoded(source: Source, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line)"
        raise DataError(f"{source.path}:{number}", ABSENT, rule, "save the file as UTF-8") from None


def _read_text(source: Source, columns: Columns, sample_by: str) -> Iterator[Record]:
    if required(columns.task) != ("text",):
        rule = f"is a text file, which holds no records of {columns.task}"
        way_out = "give jsonl, csv, tsv or parquet files with its columns, or set data.format"
        raise DataError(str(source.path), ABSENT, rule, way_out)
    with _opened(source) as file:
        for line, text in _pieces(_lines(source, file), sample_by):
            yield Record(text, None, str(source.path), line)


def _pieces(lines: Iterable[tuple[int, str]], sample_by: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of each document, paragraph or line that is not blank; a document is kept to the byte."""
    held: list[str] = []
    first = 1
    for number, line in lines:
        is_blank = not line.strip()
        if not held:
            first = number
        if sample_by == "document" or not is_blank:
            held.append(line)
        if sample_by == "line" or (sample_by == "paragraph" and is_blank):
            yield from _joined(first, held, sample_by)
            held = []
    yield from _joined(first, held, sample_by)


def _joined(first: int, held: Sequence[str], sample_by: str) -> Iterator[tuple[int, str]]:
    text = "".join(held)
    if text.strip():
        yield first, text if sample_by == "document" else text.rstrip("\r\n")


def _read_table(source: Source, columns: Columns) -> Iterator[Record]:
    readers: dict[str, Callable[..., Iterator[tuple[Any, dict[str, Any]]]]]
    readers = {"jsonl": _jsonl_rows, "csv": _csv_rows, "tsv": _csv_rows, "parquet": _parquet_rows}
    readers |= {"json": _json_rows, "conll": _conll_rows}
    with _opened(source) as file:
        for place, row in readers[source.format](source, file, columns):
            if isinstance(place, int):
                yield record_of(str(source.path), place, row, columns)
            else:
                yield record_of(f"{source.path}: {place}", 0, row, columns)


def _conll_rows(source: Source, file: IO[bytes], columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    return conll_rows(str(source.path), _lines(source, file), columns)


def _json_rows(source: Source, file: IO[bytes], columns: Columns) -> Iterator[tuple[int | str, dict[str, Any]]]:
    """A list of objects, objects line by line, or a file as SQuAD has it. All but lines is read whole."""
    first = file.readline()
    file.seek(0)
    if first.lstrip(codecs.BOM_UTF8).lstrip().startswith(b"{") and _is_json(first):
        document = json.loads(first.decode("utf-8-sig"))
        if not is_squad(document):
            yield from _jsonl_rows(source, file, columns)
            return
    text = "".join(line for _, line in _lines(source, file))
    if text.lstrip().startswith("["):
        yield from _elements(source, text)
        return
    document = _parsed(source, text)
    if not is_squad(document):
        rule = "is neither a list of objects, nor objects line by line, nor questions as SQuAD has them"
        raise DataError(str(source.path), ABSENT, rule, "write a list, or one object per line")
    yield from squad_rows(document)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(source: Source, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(source, error) from None


def _not_json(source: Source, error: Exception, line: int = 0) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        line, reason = line or error.lineno, f"{error.msg} at column {error.colno}"
    else:
        reason = str(error)
    where = f"{source.path}:{line}" if line else str(source.path)
    return DataError(where, ABSENT, f"is not JSON ({reason})", "mend the file")


def _elements(source: Source, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a list, each with the line where it begins."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    at, line, counted = blank.match(text, text.index("[") + 1).end(), 1, 0  # type: ignore[union-attr]
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _not_json(source, error) from None
        if not isinstance(row, dict):
            raise DataError(f"{source.path}:{line}", row, "is not a JSON object", "write a list of objects")
        yield line, row
        at = blank.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith(",", at):
            at = blank.match(text, at + 1).end()  # type: ignore[union-attr]
        elif not text.startswith("]", at):
            line += text.count("\n", counted, at)
            raise DataError(f"{source.path}:{line}", ABSENT, "is not JSON (the list is not closed)", "mend the file")


def _jsonl_rows(source: Source, file: IO[bytes], columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(source, file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            where = f"{source.path}:{number}"
            raise DataError(where, ABSENT, f"is not JSON ({reason})", "write one object per line") from None
        if not isinstance(row, dict):
            raise DataError(f"{source.path}:{number}", row, "is not a JSON object", "write one object per line")
        yield number, row


def _csv_rows(source: Source, file: IO[bytes], columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """csv as RFC 4180 has it; tsv as IANA's text/tab-separated-values: no quoting, a quote mark is a character."""
    csv.field_size_limit(sys.maxsize)  # a text may be longer than csv's default of 128 KiB
    lines = (line for _, line in _lines(source, file))
    is_tsv = source.format == "tsv"
    reader = csv.reader(
        lines, delimiter="\t" if is_tsv else ",", quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL
    )
    header = list(columns.header or next(reader, []))
    if header:
        otherwise = "name the columns in the first line, or by data.header"
        check_columns(f"{source.path}:1", columns, required(columns.task), header, otherwise)
    first = reader.line_num + 1  # a quoted text may span lines: a row is named by its first
    for fields in reader:
        if fields and len(fields) != len(header):
            rule = f"has {len(fields)} fields where the header has {len(header)}"
            raise DataError(f"{source.path}:{first}", ABSENT, rule, "quote or escape the separator inside a field")
        if fields:
            yield first, dict(zip(header, fields, strict=True))
        first = reader.line_num + 1


def _parquet_rows(source: Source, file: IO[bytes], columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    with _seekable(source, file) as seekable:
        try:
            table = parquet.ParquetFile(seekable)
            found = table.schema_arrow.names
            check_columns(str(source.path), columns, required(columns.task), found, "name them in data.columns")
            number = 0
            for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=columns.wanted(found)):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except pyarrow.ArrowException as error:
            reason = str(error).split("\n")[0].rstrip(".")
            raise DataError(
                str(source.path), ABSENT, f"is not a whole parquet file ({reason})", "copy it again"
            ) from None


@contextmanager
def _seekable(source: Source, file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Parquet is read from its end, and gzip only from its start: unzip to a temporary file, not to memory."""
    if not source.is_gzip:
        yield file
        return
    with tempfile.TemporaryFile() as unzipped:
        shutil.copyfileobj(file, unzipped)
        unzipped.seek(0)
        yield unzipped
