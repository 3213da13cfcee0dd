"""Every form of file gives the same records; whatever is wrong in one is said whole."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from launcher.data.formats import Columns
from launcher.data.read import read_records
from launcher.data.sources import find_sources
from launcher.errors import DataError
from launcher.task import Record

PAIRS = [('first, "quoted"', "good"), ("zweite Zeile é 漢", "bad"), ("x" * 200_000, "good")]
LABELLED = Columns("sequence_classification", {})
TEXT_ONLY = Columns("causal_lm", {})


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in PAIRS), encoding="utf-8")


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *PAIRS])


def write_tsv(path: Path) -> None:
    path.write_text("".join(f"{t}\t{label}\n" for t, label in [("text", "label"), *PAIRS]), encoding="utf-8")


def write_parquet(path: Path) -> None:
    texts, labels = zip(*PAIRS, strict=True)
    parquet.write_table(pyarrow.table({"text": texts, "other": [1, 2, 3], "label": labels}), path)


WRITERS = {"jsonl": write_jsonl, "csv": write_csv, "tsv": write_tsv, "parquet": write_parquet}


def records_of(
    path: Path | str, columns: Columns = TEXT_ONLY, sample_by: str = "document", data_format: str | None = None
) -> list[Record]:
    return list(read_records(find_sources("data.train", str(path), data_format), columns, sample_by))


@pytest.mark.parametrize("is_gzip", [False, True])
@pytest.mark.parametrize("form", WRITERS)
def test_every_table_gives_the_same_records(tmp_path: Path, form: str, is_gzip: bool) -> None:
    path = tmp_path / f"data.{form}"
    WRITERS[form](path)
    if is_gzip:
        path = path.rename(tmp_path / "raw")
        zipped = tmp_path / f"data.{form}.gz"
        zipped.write_bytes(gzip.compress(path.read_bytes()))
        path = zipped
    records = records_of(path, LABELLED)
    assert [(record.text, record.label) for record in records] == PAIRS
    assert {record.file for record in records} == {str(path)}
    assert [record.line for record in records] == ([2, 3, 4] if form in ("csv", "tsv") else [1, 2, 3])


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("document", [(1, "\na\r\nb\n\n\n  c\n")]),
        ("paragraph", [(2, "a\r\nb"), (6, "  c")]),
        ("line", [(2, "a"), (3, "b"), (6, "  c")]),
    ],
)
def test_text_by_document_paragraph_and_line(tmp_path: Path, sample_by: str, expected: list[tuple[int, str]]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\na\r\nb\n\n\n  c\n")
    assert [(record.line, record.text) for record in records_of(path, sample_by=sample_by)] == expected


def test_a_blank_text_file_gives_no_record(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(" \n")
    assert records_of(tmp_path) == []


def test_folders_and_globs_expand_sorted_once_and_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.md", "a.txt", ".git/x.txt", "b/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    both = (str(tmp_path / "b" / "*.txt"), str(tmp_path), str(tmp_path / "a.txt"))
    found = [str(source.path.relative_to(tmp_path)) for source in find_sources("data.train", both, None)]
    assert found == ["b/2.txt", "a.txt", "b/1.md"]


def test_a_given_format_overrules_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_text('{"text": "x"}\n\n{"text": "y"}')
    assert [(r.line, r.text) for r in records_of(tmp_path / "a.data", data_format="jsonl")] == [(1, "x"), (3, "y")]


def test_a_quoted_newline_does_not_shift_the_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"one\ntwo",a\n\nthree,b\n')
    assert [(r.line, r.text) for r in records_of(tmp_path / "a.csv")] == [(2, "one\ntwo"), (5, "three")]


def test_whole_numbers_are_labels(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1}')
    assert records_of(tmp_path / "a.jsonl", LABELLED)[0].label == "1"


def error_of(call: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


GIVE_FILES = "give files, folders or globs; a relative path starts in the folder where fleetune is run"


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [("no.txt", "does not exist"), ("*.txt", "matches no file"), ("empty", "is a folder without files")],
)
def test_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, rule: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert error_of(lambda: records_of(pattern)) == f"data.train: {pattern} {rule}; {GIVE_FILES}"


LABELS = Columns("sequence_classification", {}, frozenset({"good", "bad"}))
BAD = {
    "unknown suffix": (
        ("a.xyz", b"x", TEXT_ONLY),
        "a.xyz: has a suffix that does not tell its form; "
        "set data.format (text, jsonl, json, csv, tsv, parquet, arrow or conll), or name only the files to read",
    ),
    "text without labels": (
        ("a.txt", b"x", LABELLED),
        "a.txt: is a text file, which holds no records of sequence_classification; give jsonl, csv, tsv or parquet files with its columns, or set data.format",
    ),
    "undecodable byte": (
        ("a.txt", b"fine\nnot \xff fine", TEXT_ONLY),
        "a.txt:2: is not UTF-8 (byte 0xff at byte 5 of the line); save the file as UTF-8",
    ),
    "broken JSON": (
        ("a.jsonl", b'{"text": "x"}\n{"text": "x"\n', TEXT_ONLY),
        "a.jsonl:2: is not JSON (Expecting ',' delimiter at column 1); write one object per line",
    ),
    "JSON that is no object": (
        ("a.jsonl", b"[1]", TEXT_ONLY),
        "a.jsonl:1: [1] is not a JSON object; write one object per line",
    ),
    "missing key": (
        ("a.jsonl", b'{"txet": "x"}', TEXT_ONLY),
        "a.jsonl:1: has no column `text` but txet; did you mean data.columns.text: txet?",
    ),
    "missing column": (
        ("a.csv", b"text,class\nx,good\n", LABELLED),
        "a.csv:1: has no column `label` but text, class; name the columns in the first line, or by data.header",
    ),
    "no text": (
        ("a.jsonl", b'{"text": null}', TEXT_ONLY),
        "a.jsonl:1: text: None is not a text; give a string, or another data.columns.text",
    ),
    "half a surrogate": (
        ("a.jsonl", b'{"text": "\\ud800"}', TEXT_ONLY),
        "a.jsonl:1: text: holds half a surrogate pair; mend the \\ud800 escape",
    ),
    "row too short": (
        ("a.csv", b"text,label\nx,good\ny\n", LABELLED),
        "a.csv:3: has 1 fields where the header has 2; quote or escape the separator inside a field",
    ),
    "empty label": (
        ("a.tsv", b"text\tlabel\nx\t\n", LABELLED),
        "a.tsv:2: label: '' is an empty label; give each record a label, or leave the record out",
    ),
    "missing label": (
        ("a.jsonl", b'{"text": "x", "label": null}', LABELLED),
        "a.jsonl:1: label: None is not a label; give a text or a whole number",
    ),
    "unknown label, near": (
        ("a.csv", b"text,label\nx,goof\n", LABELS),
        "a.csv:2: label: goof is not one of task.labels; did you mean `good`?",
    ),
    "unknown label, far": (
        ("a.csv", b"text,label\nx,7\n", LABELS),
        "a.csv:2: label: 7 is not one of task.labels; task.labels are bad, good",
    ),
    "no gzip": (
        ("a.txt.gz", b"plain", TEXT_ONLY),
        "a.txt.gz: is not a whole gzip file (Not a gzipped file (b'pl')); copy it again, or unzip it",
    ),
    "cut gzip": (
        ("a.txt.gz", gzip.compress(b"text")[:-4], TEXT_ONLY),
        "a.txt.gz: is not a whole gzip file (Compressed file ended before the end-of-stream marker was reached); "
        "copy it again, or unzip it",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_in_a_file_is_said_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (file, content, columns), expected = BAD[name]
    monkeypatch.chdir(tmp_path)
    Path(file).write_bytes(content)
    assert error_of(lambda: records_of(file, columns)) == expected


def test_a_parquet_file_that_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path)
    path.write_bytes(path.read_bytes()[:-10])
    message = error_of(lambda: records_of(path))
    assert message.startswith(f"{path}: is not a whole parquet file (")
    assert message.endswith("); copy it again")


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path)
    message = error_of(lambda: records_of(path, Columns("causal_lm", {"text": "texts"})))
    assert message == f"{path}: has no column `texts` but text, other, label; did you mean data.columns.text: text?"
