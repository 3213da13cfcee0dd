"""Files -> records, one at a time. Whatever is wrong in a file is a DataError that names file, line and column.

A bad record does not end its file: its error stands where the record would, and the caller decides. Memory holds one
record (for parquet and arrow, one batch of rows; for `sample_by: document`, one file), never a corpus.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any

from launcher.data.formats import Columns, check_columns, record_of, required
from launcher.data.json_rows import json_rows, jsonl_rows
from launcher.data.lines import Rows, good_lines, good_or_noted, lines
from launcher.data.opened import opened, seekable
from launcher.data.sources import Source
from launcher.data.spans import conll_rows
from launcher.data.tokenised import FORMS, read_documents
from launcher.errors import ABSENT, DataError, Interrupted
from launcher.task import Record

PARQUET_BATCH_ROWS = 1000


def read_records(
    sources: Iterable[Source], columns: Columns, sample_by: str, report: Callable[[DataError], None] | None = None
) -> Iterator[Record]:
    """Every record of every file, in order. `sample_by` (document, paragraph, line) is for text files.

    report: called with each record that will not do, and with a file that cannot be read on; left out, it is raised.
    """
    for source in sources:
        try:
            for record in _records(source, columns, sample_by):
                if isinstance(record, Record):
                    yield record
                elif report is None:
                    raise record
                else:
                    report(record)
        except Interrupted:
            raise
        except DataError as error:
            if report is None:
                raise
            report(error)


def _records(source: Source, columns: Columns, sample_by: str) -> Iterator[Record | DataError]:
    if source.format in FORMS:
        return _read_tokenised(source, columns)
    if source.format == "text":
        return _read_text(source, columns, sample_by)
    return _read_table(source, columns)


def _read_tokenised(source: Source, columns: Columns) -> Iterator[Record | DataError]:
    if columns.task != "causal_lm":
        rule = f"holds token ids, which only causal_lm learns from, not {columns.task}"
        raise DataError(source.name, ABSENT, rule, "give texts")
    yield from read_documents(source.path, source.format, columns.token_dtype, columns.names.get("text", "tokens"))


def in_lists(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Lists of `size` records; the last may be shorter."""
    records = iter(records)
    while some := list(islice(records, size)):
        yield some


def _read_text(source: Source, columns: Columns, sample_by: str) -> Iterator[Record | DataError]:
    if required(columns.task) != ("text",):
        rule = f"is a text file, which holds no records of {columns.task}"
        way_out = "give jsonl, csv, tsv or parquet files with its columns, or set data.format"
        raise DataError(source.name, ABSENT, rule, way_out)
    with opened(source) as file:
        for line, text in _pieces(lines(source.name, file), sample_by):
            yield text if isinstance(text, DataError) else Record(text, None, source.name, line)


def _pieces(lines: Iterable[tuple[int, str | DataError]], sample_by: str) -> Iterator[tuple[int, str | DataError]]:
    """(first line, text) of each document, paragraph or line that is not blank; a document is kept to the byte.

    One with a line that will not do is that line's error.
    """
    held: list[str | DataError] = []
    first = 1
    for number, line in lines:
        is_blank = isinstance(line, str) and not line.strip()
        if not held:
            first = number
        if sample_by == "document" or not is_blank:
            held.append(line)
        if sample_by == "line" or (sample_by == "paragraph" and is_blank):
            yield from _joined(first, held, sample_by)
            held = []
    yield from _joined(first, held, sample_by)


def _joined(first: int, held: Sequence[str | DataError], sample_by: str) -> Iterator[tuple[int, str | DataError]]:
    error = next((line for line in held if isinstance(line, DataError)), None)
    text = "" if error else "".join(map(str, held))
    if error:
        yield first, error
    elif text.strip():
        yield first, text if sample_by == "document" else text.rstrip("\r\n")


def _read_table(source: Source, columns: Columns) -> Iterator[Record | DataError]:
    readers = {"jsonl": _jsonl_rows, "csv": _csv_rows, "tsv": _csv_rows, "parquet": _parquet_rows, "arrow": _arrow_rows}
    readers |= {"json": _json_rows, "conll": _conll_rows}
    with opened(source) as file:
        for place, row in readers[source.format](source, file, columns):
            try:
                yield row if isinstance(row, DataError) else _record(source.name, place, row, columns)
            except DataError as error:
                yield error


def _record(file: str, place: int | str, row: Mapping[str, Any], columns: Columns) -> Record:
    if isinstance(place, int):
        return record_of(file, place, row, columns)
    return record_of(f"{file}: {place}", 0, row, columns)


def _conll_rows(source: Source, file: IO[bytes], columns: Columns) -> Rows:
    yield from conll_rows(source.name, good_lines(source.name, file), columns)


def _json_rows(source: Source, file: IO[bytes], columns: Columns) -> Rows:
    return json_rows(source.name, file)


def _jsonl_rows(source: Source, file: IO[bytes], columns: Columns) -> Rows:
    return jsonl_rows(source.name, file)


def _csv_rows(source: Source, file: IO[bytes], columns: Columns) -> Rows:
    """csv as RFC 4180 has it; tsv as IANA's text/tab-separated-values: no quoting, a quote mark is a character."""
    csv.field_size_limit(sys.maxsize)  # a text may be longer than csv's default of 128 KiB
    bad: list[DataError] = []
    is_tsv = source.format == "tsv"
    reader = csv.reader(
        good_or_noted(source.name, file, bad),
        delimiter="\t" if is_tsv else ",",
        quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL,
    )
    header = list(columns.header or next(reader, []))
    if header:
        otherwise = "name the columns in the first line, or by data.header"
        check_columns(f"{source.name}:1", columns, required(columns.task), header, otherwise)
    first = reader.line_num + 1  # a quoted text may span lines: a row is named by its first
    for fields in reader:
        if bad:
            yield first, bad[0]
            bad.clear()
        elif fields and len(fields) != len(header):
            rule = f"has {len(fields)} fields where the header has {len(header)}"
            way_out = "quote or escape the separator inside a field"
            yield first, DataError(f"{source.name}:{first}", ABSENT, rule, way_out)
        elif fields:
            yield first, dict(zip(header, fields, strict=True))
        first = reader.line_num + 1


def _parquet_rows(source: Source, file: IO[bytes], columns: Columns) -> Rows:
    from pyarrow import parquet

    with seekable(source, file) as whole, _told_whole(source, "parquet"):
        table = parquet.ParquetFile(whole)
        wanted = _wanted(source, columns, table.schema_arrow.names)
        yield from _numbered(table.iter_batches(PARQUET_BATCH_ROWS, columns=wanted))


def _arrow_rows(source: Source, file: IO[bytes], columns: Columns) -> Rows:
    """An Arrow IPC file, or an IPC stream as `datasets` writes it."""
    from pyarrow import ipc

    with seekable(source, file) as whole, _told_whole(source, "arrow"):
        is_file = whole.read(6) == b"ARROW1"
        whole.seek(0)
        with (ipc.open_file if is_file else ipc.open_stream)(whole) as table:
            wanted = _wanted(source, columns, table.schema.names)
            batches = (table.get_batch(i) for i in range(table.num_record_batches)) if is_file else iter(table)
            yield from _numbered(
                piece
                for batch in batches
                for start in range(0, batch.num_rows, PARQUET_BATCH_ROWS)
                for piece in [batch.select(wanted).slice(start, PARQUET_BATCH_ROWS)]
            )


def _wanted(source: Source, columns: Columns, found: Sequence[str]) -> list[str]:
    check_columns(source.name, columns, required(columns.task), found, "name them in data.columns")
    return columns.wanted(found)


def _numbered(batches: Iterable[Any]) -> Rows:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row


@contextmanager
def _told_whole(source: Source, form: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).split("\n")[0].rstrip(".")
        raise DataError(source.name, ABSENT, f"is not a whole {form} file ({reason})", "copy it again") from None
