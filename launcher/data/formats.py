"""A row of a file -> a `Record`, as the task needs it: which columns are read, what they may hold, and what is said if not.

Texts and labels are here; conversations in `turns.py`, tokens with tags and questions with answers in `spans.py`.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import ABSENT, DataError
from launcher.job.spec import JobSpec
from launcher.job.tasks import FIELDS
from launcher.task import Record

ROWS = "rows"
"""In place of a task: whatever a table holds, for evaluation's own tasks, which training does not know."""


@dataclass(frozen=True)
class Columns:
    """What to take from a row: the task whose records these are, and the columns that are not called as usual."""

    task: str
    names: Mapping[str, str]
    """What is read -> name of its column, where that is another."""
    labels: frozenset[str] | None = None
    """The only labels allowed; None while they are still to be found."""
    header: tuple[str, ...] | None = None
    """Names of the columns of csv and tsv files that do not begin with them."""
    multi_label: bool = False
    label_separator: str | None = None
    no_answer: bool = False
    """Whether a question may have no answer."""
    token_dtype: str = "uint16"
    """Of token ids in files that do not say it."""
    keep_rows: bool = False
    """Whether a record also carries its whole row, in `parts["row"]`: evaluation looks at any column."""

    @classmethod
    def of(cls, spec: JobSpec) -> Columns:
        labels = frozenset(spec.task.labels or ()) or None
        separator = spec.data.label_separator
        return cls(
            spec.task.name,
            spec.data.columns,
            labels,
            spec.data.header,
            spec.task.multi_label,
            separator,
            spec.task.no_answer,
            spec.data.token_dtype,
        )

    def name(self, field: str) -> str:
        return self.names.get(field, field)

    def wanted(self, found: Iterable[str]) -> list[str]:
        """Those of a table's columns that the task may read."""
        if self.keep_rows:
            return list(found)
        ours = {self.name(field) for field in FIELDS[self.task]}
        return [name for name in found if name in ours]


@dataclass(frozen=True)
class Cells:
    """One row, and where it stands."""

    file: str
    line: int
    """From 1; 0 where the file's name already says the place."""
    values: Mapping[str, Any]
    columns: Columns

    def has(self, field: str) -> bool:
        """Whether there is such a column with something in it; null and an absent column are the same."""
        return self.values.get(self.columns.name(field)) is not None

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    def where(self, field: str) -> str:
        return f"{self.place}: {self.columns.name(field)}"

    def value(self, field: str) -> Any:
        """What the column holds; DataError where there is none."""
        check_columns(self.place, self.columns, [field], list(self.values), "every row needs it")
        return self.values[self.columns.name(field)]

    def text(self, field: str) -> str:
        return checked_text(self.where(field), self.value(field), f"give a string, or another data.columns.{field}")

    def decoded(self, field: str) -> Any:
        """The value, read as JSON where it is a text: csv and tsv files hold lists in no other way."""
        value = self.value(field)
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError:
            rule = "is a text that is not JSON"
            raise DataError(self.where(field), value, rule, "give a list, or one written as JSON") from None

    def record(self, text: str, label: str | None = None, **parts: Any) -> Record:
        return Record(text, label, self.file, self.line, parts)


def record_of(file: str, line: int, values: Mapping[str, Any], columns: Columns) -> Record:
    """The record in a row. DataError naming file, line and column for what will not do."""
    record = _readers()[columns.task](Cells(file, line, values, columns))
    return record._replace(parts={**record.parts, "row": dict(values)}) if columns.keep_rows else record


def _readers() -> dict[str, Callable[[Cells], Record]]:
    from launcher.data.spans import question, tagged
    from launcher.data.turns import conversation, preference

    return {
        "causal_lm": _text,
        "chat": conversation,
        "masked_lm": _text,
        "sequence_classification": _labelled,
        "regression": _measured,
        "token_classification": tagged,
        "extractive_qa": question,
        "preference": preference,
        ROWS: lambda cells: cells.record(""),
    }


def required(task: str) -> tuple[str, ...]:
    """Fields that every table of the task has a column for; none where one of several will do."""
    return {
        "causal_lm": ("text",),
        "masked_lm": ("text",),
        "sequence_classification": ("text", "label"),
        "regression": ("text", "label"),
        "token_classification": ("tokens", "tags"),
        "extractive_qa": ("question", "context"),
        "preference": ("chosen", "rejected"),
    }.get(task, ())


def check_columns(where: str, columns: Columns, fields: Sequence[str], found: Sequence[str], otherwise: str) -> None:
    for field in fields:
        name = columns.name(field)
        if name not in found:
            close = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
            way_out = f"did you mean data.columns.{field}: {close[0]}?" if close else otherwise
            raise DataError(where, ABSENT, f"has no column `{name}` but {', '.join(found)}", way_out)


def checked_text(where: str, value: Any, way_out: str) -> str:
    if not isinstance(value, str):
        raise DataError(where, value, "is not a text", way_out)
    if not _is_unicode(value):
        raise DataError(where, ABSENT, "holds half a surrogate pair", "mend the \\ud800 escape")
    return value


def _is_unicode(text: str) -> bool:
    """JSON can spell a lone surrogate, which no encoding and no tokenizer takes."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(cells: Cells) -> Record:
    return cells.record(cells.text("text"))


def _labelled(cells: Cells) -> Record:
    text, pair = _texts(cells)
    where, value, allowed = cells.where("label"), cells.value("label"), cells.columns.labels
    if not cells.columns.multi_label:
        return cells.record(text, checked_label(where, value, allowed), **pair)
    labels = tuple(
        checked_label(where, label, allowed) for label in _several(where, value, cells.columns.label_separator)
    )
    return cells.record(text, None, labels=labels, **pair)


def _several(where: str, value: Any, separator: str | None) -> list[Any]:
    """The labels of a text: a list, or one string of them; an empty one has none."""
    if isinstance(value, list):
        return value
    if isinstance(value, str) and separator is not None:
        return [label.strip() for label in value.split(separator) if label.strip()]
    way_out = "give a list of labels, or set data.label_separator"
    raise DataError(where, value, "is not a list of labels, which task.multi_label wants", way_out)


def _measured(cells: Cells) -> Record:
    text, pair = _texts(cells)
    return cells.record(text, None, target=checked_number(cells.where("label"), cells.value("label")), **pair)


def _texts(cells: Cells) -> tuple[str, dict[str, Any]]:
    """The text of the record, and where it is a pair, both; a pair is what has a column for the second."""
    first = cells.text("text")
    if not ("text_pair" in cells.columns.names or cells.has("text_pair")):
        return first, {}
    second = cells.text("text_pair")
    return f"{first}\n{second}", {"pair": (first, second)}


def checked_label(where: str, value: Any, allowed: frozenset[str] | None) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(where, value, "is not a label", "give a text or a whole number")
    label = str(value)
    if not label:
        raise DataError(where, value, "is an empty label", "give each record a label, or leave the record out")
    if allowed is not None and label not in allowed:
        close = difflib.get_close_matches(label, sorted(allowed), n=1, cutoff=0.5)
        way_out = f"did you mean `{close[0]}`?" if close else f"task.labels are {', '.join(sorted(allowed))}"
        raise DataError(where, label, "is not one of task.labels", way_out)
    return label


def checked_number(where: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(where, value, "is not a finite number", "give each record a number, or leave the record out")
    return number
