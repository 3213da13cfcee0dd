"""A corpus that every CPython carries: what the standard library's docstrings and `help()` topics say.

Modules are parsed with `ast`, never imported. `language.jsonl` holds texts for a language model; `packages.jsonl` holds
texts labelled with the package they document. The same Python gives the same bytes.
"""

from __future__ import annotations

import ast
import json
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launcher.errors import ABSENT, DataError

# Names of folders and modules that are left out: the first are split off by Debian or gone from newer Pythons.
ABSENT_SOMEWHERE = {"test", "tests", "idlelib", "tkinter", "turtle", "turtledemo", "lib2to3", "distutils", "ensurepip"}
NOT_THE_LIBRARY = {"venv", "pydoc_data", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
MIN_CHARACTERS = 40  # shorter ones ("Return self.") are the same everywhere
MAX_CHARACTERS = 1500  # of a labelled text: a model of 96 tokens reads about 300
NUM_PACKAGES = 8
MIN_TEXTS_PER_PACKAGE = 80  # Python 3.10 to 3.13 have 95 or more in the eighth package
MAX_TEXTS_PER_PACKAGE = 250  # keeps the most frequent class below a fifth
MIN_LANGUAGE_CHARACTERS = 500_000  # Python 3.10 to 3.13 give 1.4 million or more


class Entry(NamedTuple):
    """One documented thing: `module` as a path below the library, `heading` as `help` shows it."""

    package: str
    heading: str
    docstring: str

    @property
    def text(self) -> str:
        return f"{self.heading}\n{self.docstring}"


@dataclass(frozen=True)
class Corpus:
    """Where the two files lie and what they hold."""

    language: Path
    num_language: int
    packages: Path
    num_packages: dict[str, int]
    """Package -> labelled texts, most first."""


def write_corpus(folder: Path, library: Path | None = None) -> Corpus:
    """Write `language.jsonl` and `packages.jsonl`. DataError when the installation carries too little."""
    library = library or Path(sysconfig.get_path("stdlib"))
    entries = list(read_entries(library))
    texts = [prose(text) for text in (*(entry.docstring for entry in entries), *_topics(library))]
    num_characters = sum(map(len, texts))
    if num_characters < MIN_LANGUAGE_CHARACTERS:
        rule = f"holds {num_characters} characters of documentation, fewer than {MIN_LANGUAGE_CHARACTERS}"
        raise DataError(str(library), ABSENT, rule, "use a Python whose standard library is installed as .py files")
    labelled = _labelled(library, entries)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "language.jsonl", ({"text": text} for text in texts))
    _write(folder / "packages.jsonl", ({"text": e.text[:MAX_CHARACTERS], "label": e.package} for e in labelled))
    counts = dict(Counter(entry.package for entry in labelled).most_common())
    return Corpus(folder / "language.jsonl", len(texts), folder / "packages.jsonl", counts)


def read_entries(library: Path) -> Iterator[Entry]:
    """Every docstring of the library once, by path and then by line."""
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if not (ABSENT_SOMEWHERE | NOT_THE_LIBRARY).isdisjoint(parts) or parts[0].startswith("config-"):
            continue
        for heading, docstring in _documented(path, parts):
            if len(docstring) >= MIN_CHARACTERS and docstring not in seen:
                seen.add(docstring)
                yield Entry(parts[0], heading, docstring)


def _documented(path: Path, parts: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of a module, its classes and functions. The heading leaves out the package: it is the label."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own invalid escapes are not ours to report
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None and _is_plain(docstring):
                yield _heading(node, parts), docstring


def _is_plain(text: str) -> bool:
    """No control characters but newlines and tabs, no lone surrogates."""
    return all(character.isprintable() or character in "\n\t" for character in text)


def _heading(node: ast.AST, parts: tuple[str, ...]) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{node.name}({ast.unparse(node.args)})"
    return f"module {parts[-1]}" if len(parts) > 1 and parts[-1] != "__init__" else "package"


def _topics(library: Path) -> list[str]:
    """The texts behind `help("assignment")` and the like: a dict literal."""
    path = library / "pydoc_data" / "topics.py"
    if not path.is_file():
        return []
    (assignment,) = (node for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.Assign))
    topics: dict[str, str] = ast.literal_eval(assignment.value)
    return [topic for topic in topics.values() if len(topic) >= MIN_CHARACTERS]


def prose(text: str) -> str:
    """One line per paragraph, single spaces: a small model's few steps go into words, not into indentation."""
    return "\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip())


def _labelled(library: Path, entries: list[Entry]) -> list[Entry]:
    """The texts of the packages with most of them; of a large package, evenly spread ones."""
    by_package: dict[str, list[Entry]] = {}
    for entry in entries:
        if not entry.package.startswith("_") and (library / entry.package).is_dir():
            by_package.setdefault(entry.package, []).append(entry)
    largest = sorted(by_package, key=lambda name: (-len(by_package[name]), name))[:NUM_PACKAGES]
    if len(largest) < NUM_PACKAGES or len(by_package[largest[-1]]) < MIN_TEXTS_PER_PACKAGE:
        rule = f"holds fewer than {NUM_PACKAGES} packages with {MIN_TEXTS_PER_PACKAGE} docstrings"
        raise DataError(str(library), ABSENT, rule, "use a Python whose standard library is installed as .py files")
    return [entry for name in sorted(largest) for entry in _spread(by_package[name], MAX_TEXTS_PER_PACKAGE)]


def _spread(entries: list[Entry], count: int) -> list[Entry]:
    if len(entries) <= count:
        return entries
    return [entries[i * len(entries) // count] for i in range(count)]


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
