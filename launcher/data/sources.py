"""Which files a `data` section names, in an order that does not depend on the machine."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ABSENT, DataError

_TEXT = (
    "txt text md rst log tex html xml py pyi ipynb c h cc cpp hpp cu java js ts go rs rb sh sql yaml yml toml cfg ini"
)
_FORMATS = {
    **{f".{suffix}": "text" for suffix in _TEXT.split()},
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Source:
    """One file to read. `path` is as the user may recognise it: relative where the spec is."""

    path: Path
    format: str
    is_gzip: bool


def find_sources(option: str, patterns: str | tuple[str, ...], data_format: str | None) -> list[Source]:
    """The files of `data.train` or `data.validation` (`option`), each once: patterns as given, what they expand to sorted.

    DataError for a file that does not exist, a pattern or folder with nothing in it, and a suffix that tells no form.
    """
    paths: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        paths.update(dict.fromkeys(_expand(option, pattern)))
    return [_source(path, data_format) for path in paths]


def _expand(option: str, pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_below(path) or _nothing(option, pattern, "is a folder without files")
    if not glob.has_magic(pattern):
        return _nothing(option, pattern, "does not exist")
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    files = [file for match in found for file in (_files_below(match) if match.is_dir() else [match])]
    return files or _nothing(option, pattern, "matches no file")


def _files_below(folder: Path) -> list[Path]:
    """Every file at any depth, sorted, but hidden ones: `.git`, `.DS_Store`."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _nothing(option: str, pattern: str, rule: str) -> list[Path]:
    way_out = "give files, folders or globs; a relative path starts in the folder where fleetune is run"
    raise DataError(option, pattern, rule, way_out)


def _source(path: Path, data_format: str | None) -> Source:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_gzip = suffixes[-1:] == [".gz"]
    told = _FORMATS.get(suffixes[-2 if is_gzip else -1] if len(suffixes) > is_gzip else "")
    if data_format is None and told is None:
        way_out = "set data.format (text, jsonl, json, csv, tsv, parquet or conll), or name only the files to read"
        raise DataError(str(path), ABSENT, "has a suffix that does not tell its form", way_out)
    return Source(path, data_format or str(told), is_gzip)
