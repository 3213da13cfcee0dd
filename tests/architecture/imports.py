"""The imports of this repository, read from its syntax trees: also those inside functions and type-checking blocks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support import REPO

PACKAGES = ("launcher", "tools")


def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the packages."""
    files = (path for package in PACKAGES for path in sorted((REPO / package).rglob("*.py")))
    return {name_of(path): path for path in files}


def name_of(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path, ours: frozenset[str]) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything the file imports; `from a import b` is `a.b` where that is a module of ours."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield node.lineno, whole if whole in ours else str(node.module)


@cache
def all_imports() -> tuple[tuple[str, int, str], ...]:
    """(importing module, line, imported name)."""
    files = modules()
    ours = frozenset(files)
    return tuple((name, line, imported) for name, path in files.items() for line, imported in imports_of(path, ours))
