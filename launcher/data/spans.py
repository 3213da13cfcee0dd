"""Sentences with a tag per token, and questions with answers in a text: rows -> records, and the files only they have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from launcher.data.formats import Cells, Columns, checked_label, checked_text
from launcher.errors import ABSENT, DataError
from launcher.task import Record

DOCUMENT_START = "-DOCSTART-"
"""Token of a line in CoNLL-2003 that is no token."""


def tagged(cells: Cells) -> Record:
    """`tokens` and `tags`, lists of equal length."""
    tokens, tags = (_list(cells, field) for field in ("tokens", "tags"))
    if len(tokens) != len(tags):
        rule = f"has {len(tags)} tags for {len(tokens)} tokens"
        raise DataError(cells.place, ABSENT, rule, "give each token its tag")
    words = [checked_text(cells.where("tokens"), token, "give a list of strings") for token in tokens]
    labels = tuple(checked_label(cells.where("tags"), tag, cells.columns.labels) for tag in tags)
    return cells.record(" ".join(words), None, tokens=words, labels=labels)


def _list(cells: Cells, field: str) -> list[Any]:
    value = cells.decoded(field)
    if not isinstance(value, list) or not value:
        rule = "is not a list" if not isinstance(value, list) else "is an empty list"
        raise DataError(cells.where(field), value, rule, f"give a list, or another data.columns.{field}")
    return value


def conll_rows(file: str, lines: Iterable[tuple[int, str]], columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """(first line, row) of each sentence: a line per token, fields by tab or spaces, an empty line between sentences.

    The first field is the token and the last its tag; `columns` may give others by number, from 0.
    """
    held: list[list[str]] = []
    first = 1
    for number, line in lines:
        fields = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
        if not any(field.strip() for field in fields):
            yield from _sentence(first, held, columns)
            held = []
        elif fields[0] != DOCUMENT_START:
            if not held:
                first = number
            _check_fields(f"{file}:{number}", fields, held, columns)
            held.append(fields)
    yield from _sentence(first, held, columns)


def _check_fields(where: str, fields: list[str], held: list[list[str]], columns: Columns) -> None:
    if len(fields) < 2:
        raise DataError(where, fields[0], "is a token without a tag", "give a tag behind each token, O for none")
    if held and len(fields) != len(held[0]):
        rule = f"has {len(fields)} fields where the lines before have {len(held[0])}"
        raise DataError(where, ABSENT, rule, "give every line of a sentence as many")
    for name in ("tokens", "tags"):
        number = columns.names.get(name, "0")
        if not number.isdecimal() or int(number) >= len(fields):
            rule = f"is not the number of a field, of which {where} has {len(fields)}"
            raise DataError(f"data.columns.{name}", number, rule, f"give 0 to {len(fields) - 1}")


def _sentence(line: int, held: list[list[str]], columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    if held:
        places = {"tokens": int(columns.names.get("tokens", 0)), "tags": int(columns.names.get("tags", -1))}
        yield line, {columns.name(field): [fields[place] for fields in held] for field, place in places.items()}


def question(cells: Cells) -> Record:
    """`question`, `context` and `answers`: `{"text": [...], "answer_start": [...]}`, or a list of `{"text", "answer_start"}`."""
    asked, context = cells.text("question"), cells.text("context")
    answers = [_answer(cells, context, answer) for answer in _answers(cells)]
    if not answers and not cells.columns.no_answer:
        rule = "has no answer"
        way_out = "set task.no_answer if that is what is to be learnt, or leave the record out"
        raise DataError(cells.place, ABSENT, rule, way_out)
    return cells.record(f"{asked}\n{context}", None, question=asked, context=context, answers=answers)


def _answers(cells: Cells) -> list[Mapping[str, Any]]:
    if not cells.has("answers") and cells.columns.no_answer:
        return []
    value = cells.decoded("answers")
    if isinstance(value, Mapping) and isinstance(value.get("text"), list | tuple):
        texts, starts = list(value["text"]), list(value.get("answer_start", ()))
        if len(texts) != len(starts):
            rule = f"has {len(texts)} texts and {len(starts)} answer_start"
            raise DataError(cells.where("answers"), ABSENT, rule, "give each answer its first character")
        return [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if isinstance(value, list) and all(isinstance(answer, Mapping) for answer in value):
        return value
    way_out = 'give {"text": [...], "answer_start": [...]}'
    raise DataError(cells.where("answers"), value, "is not a list of answers", way_out)


def _answer(cells: Cells, context: str, answer: Mapping[str, Any]) -> tuple[str, int]:
    """(text, first character), which must be in the context there."""
    where = cells.where("answers")
    text, start = checked_text(where, answer.get("text"), "give the answer's words"), answer.get("answer_start")
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= len(context):
        rule = f"is not a place in the context, which has {len(context)} characters"
        raise DataError(f"{where}: answer_start", start, rule, "count characters from 0")
    if not text or context[start : start + len(text)] != text:
        rule = f"is not what stands in the context at character {start}: {context[start : start + len(text)]!r}"
        raise DataError(where, text, rule, "give the words as they are there, and count characters from 0, not bytes")
    return text, start


def squad_rows(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each question of a file as SQuAD 1.1 and 2.0 have it: articles, their paragraphs, their questions."""
    for a, article in enumerate(document["data"]):
        for p, paragraph in enumerate(article["paragraphs"]):
            for q, asked in enumerate(paragraph["qas"]):
                row = {"id": asked.get("id"), "question": asked.get("question"), "context": paragraph.get("context")}
                answers = [] if asked.get("is_impossible") else asked.get("answers", [])
                yield f"data[{a}].paragraphs[{p}].qas[{q}]", {**row, "answers": answers}


def is_squad(document: Any) -> bool:
    articles = document.get("data") if isinstance(document, Mapping) else None
    return isinstance(articles, list) and all(
        isinstance(article, dict) and "paragraphs" in article for article in articles
    )
