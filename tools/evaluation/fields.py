"""What the questions of evaluation read from a record: columns by their names, prompts filled from them, and slices."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import ABSENT, DataError
from launcher.task import Record

OF_THE_RUN = ("length", "source")
"""Slices that need no column: by tokens, and by file."""


@dataclass(frozen=True)
class Fields:
    names: Mapping[str, str] = field(default_factory=dict)
    """What is read -> name of its column, where that is another."""
    slices: tuple[str, ...] = ()
    prompt: str | None = None
    """With `{column}` where a column's text goes."""
    delimiter: str = " "
    """Between a prompt and what is to follow it."""

    def name(self, field: str) -> str:
        return self.names.get(field, field)

    def value(self, field: str, record: Record) -> Any:
        return column(record, self.name(field))

    def text(self, field: str, record: Record) -> str:
        value = self.value(field, record)
        if not isinstance(value, str) or not value.strip():
            where = f"{record.where}: {self.name(field)}"
            raise DataError(where, value, "is not a text with something in it", "give each record one")
        return value

    def listed(self, field: str, record: Record) -> list[Any]:
        value = self.value(field, record)
        if isinstance(value, str):
            try:
                value = json.loads(value)  # csv and tsv files hold lists in no other way
            except ValueError:
                value = None
        if not isinstance(value, list):
            where = f"{record.where}: {self.name(field)}"
            raise DataError(where, ABSENT, "is not a list", "give a list, or one written as JSON")
        return value

    def facts(self, record: Record) -> dict[str, Any]:
        """`where` the record stands, and what slices it belongs to."""
        slices: dict[str, Any] = {}
        for name in self.slices:
            if name == "source":
                slices["slice:source"] = record.file
            elif name != "length":
                slices[f"slice:{name}"] = _kind(record, name)
        return {"where": record.where, **slices}


def _kind(record: Record, name: str) -> str | float:
    value = column(record, name)
    if value is None:
        return "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return value


def column(record: Record, name: str) -> Any:
    """What the record's row holds under this name. DataError where there is no such column."""
    row = record.parts.get("row")
    if row is None:
        way_out = "give jsonl, csv, tsv or parquet files"
        raise DataError(record.where, ABSENT, f"is a text, which has no column `{name}`", way_out)
    if name not in row:
        close = difflib.get_close_matches(name, list(row), n=1, cutoff=0.5)
        way_out = f"did you mean `{close[0]}`?" if close else "name it with --column FIELD=NAME"
        raise DataError(record.where, ABSENT, f"has no column `{name}` but {', '.join(row)}", way_out)
    return row[name]


def filled(template: str, fields: Fields, record: Record) -> str:
    """The template with each `{name}` replaced by that column's text; nothing in it is executed."""
    return re.sub(r"\{(\w+)\}", lambda match: fields.text(match[1], record), template)


def placeholders(template: str) -> Sequence[str]:
    return re.findall(r"\{(\w+)\}", template)
