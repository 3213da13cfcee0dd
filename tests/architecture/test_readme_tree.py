"""The README's last fenced block is the tree of this repository, and it is true."""

from __future__ import annotations

import subprocess

import pytest

from tests.support import REPO

INDENT = 2
# Folders whose direct children are all named: files and the folders that hold Python.
OPENED = ("launcher", "tools")
FIRST_LINE = "fleetune/"
# Markers for tools, which tell a reader nothing of the project.
MARKERS = {"__init__.py", "py.typed", ".gitignore"}


def tracked() -> set[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True)
    return {name for name in listing.stdout.split("\0") if name and (REPO / name).exists()}


def tree_lines(readme: str) -> list[str]:
    """The lines of the last fenced block, after its first, `fleetune/`."""
    blocks = readme.split("```")[1::2]
    assert blocks, "the README has no fenced block"
    lines = blocks[-1].strip("\n").splitlines()[1:]  # the first is the language after the fence, often empty
    assert lines, "the README's last fenced block is empty"
    assert lines[0].split()[0] == FIRST_LINE, f"the README's last fenced block does not start with {FIRST_LINE}"
    return [line for line in lines[1:] if line.strip()]


def entries(lines: list[str]) -> dict[str, str]:
    """Path -> words: `  run.py   what every rank starts` under `launcher/` is `launcher/run.py`."""
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in lines:
        name, _, words = line.strip().partition(" ")
        spaces = len(line) - len(line.lstrip(" "))
        assert spaces % INDENT == 0, f"indented by {spaces}: {line!r}"
        assert spaces // INDENT <= len(folders), f"deeper than the folder above it: {line!r}"
        del folders[spaces // INDENT :]
        path = "".join([*folders, name])
        assert path not in found, f"named twice: {path}"
        found[path] = words.strip()
        if name.endswith("/"):
            folders.append(name)
    return found


def expected(files: set[str]) -> set[str]:
    """What must be named: every top-level entry, and what lies directly in the opened folders. Folders end in `/`."""
    names = set()
    for file in sorted(file for file in files if file.rsplit("/", 1)[-1] not in MARKERS):
        top, *rest = file.split("/")
        names.add(f"{top}/" if rest else top)
        if top in OPENED and rest:
            names.add(f"{top}/{rest[0]}/" if len(rest) > 1 else file)
    return names


@pytest.fixture(scope="module")
def named() -> dict[str, str]:
    return entries(tree_lines((REPO / "README.md").read_text(encoding="utf-8")))


def test_everything_is_named(named: dict[str, str]) -> None:
    """Every top-level entry, every module directly under launcher/ and tools/, every room."""
    assert sorted(expected(tracked()) - set(named)) == []


def test_nothing_named_is_missing(named: dict[str, str]) -> None:
    files = tracked()
    folders = {
        "/".join(parts[:depth]) + "/" for parts in (f.split("/") for f in files) for depth in range(1, len(parts))
    }
    assert sorted(set(named) - files - folders) == []


def test_each_has_a_word(named: dict[str, str]) -> None:
    assert [path for path, words in named.items() if not words] == []


def test_the_reading_of_a_tree() -> None:
    """Two spaces a level; a folder ends in a slash; the words follow the name."""
    lines = tree_lines(
        "x\n```\nother\n```\n```text\nfleetune/\na/     rooms\n  b/   room\n    c.py one word\n  d.py two\ne  end\n```\n"
    )
    assert entries(lines) == {"a/": "rooms", "a/b/": "room", "a/b/c.py": "one word", "a/d.py": "two", "e": "end"}
    assert expected({"launcher/a.py", "launcher/b/c.py", "launcher/__init__.py", "slurm/x/y.yaml", "R"}) == {
        "R",
        "launcher/",
        "launcher/a.py",
        "launcher/b/",
        "slurm/",
    }
