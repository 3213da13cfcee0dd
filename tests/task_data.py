"""Small records of every task, from Python's own documentation: uneven in length, and with something to learn in them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from tests.support import documentation

Rows = list[dict[str, Any]]


def paragraphs() -> list[str]:
    texts = (part.strip() for text in documentation().values() for part in text.split("\n\n"))
    return [
        " ".join(text[: 20 + 9 * (number % 30)].split()) for number, text in enumerate(t for t in texts if len(t) > 80)
    ]


def rows_of(task: str, count: int = 160) -> Rows:
    draw = random.Random(7)
    texts = paragraphs()[: 2 * count]
    firsts, seconds = texts[:count], texts[count:]
    makers = {
        "causal_lm": lambda a, b: {"text": a},
        "masked_lm": lambda a, b: {"text": a},
        "chat": lambda a, b: {"messages": _talk(a, b, draw)},
        "sequence_classification": lambda a, b: {"text": a, "text_pair": b, "label": _kind(a)},
        "multi_label": lambda a, b: {"text": a, "label": [k for k, mark in _MARKS.items() if mark in a]},
        "regression": lambda a, b: {"text": a, "label": len(a) / 100},
        "token_classification": lambda a, b: _tagged(a),
        "extractive_qa": lambda a, b: _asked(a, b, draw),
        "preference": lambda a, b: {"prompt": a[:60], "chosen": " " + b, "rejected": " " + b[::-1][: 20 + len(b) // 2]},
    }
    return [makers[task](a, b) for a, b in zip(firsts, seconds, strict=True)]


_MARKS = {"code": "`", "call": "(", "long": "the"}


def _kind(text: str) -> str:
    return "code" if "`" in text else "call" if "(" in text else "prose"


def _talk(a: str, b: str, draw: random.Random) -> Rows:
    turns = [{"role": "system", "content": "Be brief."}] if draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 2)):
        turns += [{"role": "user", "content": a[:40]}, {"role": "assistant", "content": b[: draw.randint(10, 60)]}]
    return turns


def _tagged(text: str) -> dict[str, Any]:
    words = text.split()
    tags, was = [], False
    for word in words:
        inside = not word.isalpha()
        tags.append(("I-CODE" if was else "B-CODE") if inside else "B-CAP" if word[0].isupper() else "O")
        was = inside
    return {"tokens": words, "tags": tags}


def _asked(a: str, b: str, draw: random.Random) -> dict[str, Any]:
    context = f"{a} {b}"
    words = [m.span() for m in re.finditer(r"\S+", context)]
    first = draw.randrange(len(words) - 1)
    start, end = words[first][0], words[min(first + draw.randint(0, 2), len(words) - 1)][1]
    near = context[max(0, start - 12) : start].strip()
    return {
        "id": f"q{start}",
        "question": f"What is behind {near or 'nothing'}?",
        "context": context,
        "answers": {"text": [context[start:end]], "answer_start": [start]},
    }


def write_rows(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
