"""Which files a `data` section names, in an order that does not depend on the machine."""

from __future__ import annotations

import glob
import json
import re
from dataclasses import dataclass
from pathlib import Path

from launcher.data import remote
from launcher.data.tokenised import SUFFIXES
from launcher.errors import ABSENT, DataError
from launcher.job.spec import is_url

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
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """One file to read. `path` is as the user may recognise it: relative where the spec is."""

    path: Path
    """Where it lies; of a remote file, where its copy lies once it was fetched."""
    format: str
    compression: str | None = None
    url: str | None = None
    """Of a remote file."""

    @property
    def name(self) -> str:
        return self.url or str(self.path)


def find_sources(option: str, patterns: str | tuple[str, ...], data_format: str | None) -> list[Source]:
    """The files of `data.train` or `data.validation` (`option`), each once: patterns as given, what they expand to sorted.

    DataError for a file that does not exist, a pattern or folder with nothing in it, and a suffix that tells no form.
    """
    sources: dict[str, Source] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for source in _expand(option, pattern, data_format):
            sources.setdefault(source.name, source)
    return list(sources.values())


def _expand(option: str, pattern: str, data_format: str | None) -> list[Source]:
    if is_url(pattern):
        return [_source(Path(url), data_format, url) for url in remote.expand(option, pattern)]
    path = Path(pattern).expanduser()
    if path.is_dir():
        saved = _saved_dataset(option, path)
        if saved is not None:
            return [Source(file, "arrow") for file in saved]
        return [
            _source(file, data_format)
            for file in _without_indices(_files_below(path)) or _nothing(option, pattern, "is a folder without files")
        ]
    if path.is_file():
        return [_source(path, data_format)]
    if glob.has_magic(pattern):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [file for match in found for file in (_files_below(match) if match.is_dir() else [match])]
        return [_source(file, data_format) for file in files or _nothing(option, pattern, "matches no file")]
    if _HUB_ID.fullmatch(pattern) and not path.suffix and not path.parent.exists():
        return [Source(file, "arrow") for file in remote.hub_dataset(option, pattern)]
    return [_source(file, data_format) for file in _nothing(option, pattern, "does not exist")]


def _files_below(folder: Path) -> list[Path]:
    """Every file at any depth, sorted, but hidden ones: `.git`, `.DS_Store`."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _without_indices(files: list[Path]) -> list[Path]:
    """Without what lies beside token ids only to describe them."""
    shards = {file.parent for file in files if file.suffix == ".mds"}
    beside = {path for file in files for path in (file.with_suffix(".idx"), file.with_name(f"{file.name}.index"))}
    return [file for file in files if file not in beside and not (file.name == "index.json" and file.parent in shards)]


def _saved_dataset(option: str, folder: Path) -> list[Path] | None:
    """The Arrow files of what `datasets.save_to_disk` left here, in its order; None if this is no such folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        wanted = ("validation", "test") if option == "data.validation" else ("train",)
        split = next((name for name in wanted if name in splits), None)
        if split is None:
            rule = f"is a dataset with the splits {', '.join(splits)}, none of them {' or '.join(wanted)}"
            raise DataError(option, str(folder), rule, "name the folder of one split")
        folder /= split
    if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return None
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [folder / file["filename"] for file in state["_data_files"]]


def _nothing(option: str, pattern: str, rule: str) -> list[Path]:
    way_out = "give files, folders or globs; a relative path starts in the folder where fleetune is run"
    raise DataError(option, pattern, rule, way_out)


def _source(path: Path, data_format: str | None, url: str | None = None) -> Source:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if data_format is None and suffixes and suffixes[-1] in SUFFIXES:
        has_index = suffixes[-1] == ".bin" and path.with_suffix(".idx").is_file()
        return Source(path, "megatron" if has_index else SUFFIXES[suffixes[-1]], None, url)
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    told = _FORMATS.get(suffixes[-2 if compression else -1] if len(suffixes) > bool(compression) else "")
    if data_format is None and told is None:
        way_out = (
            "set data.format (text, jsonl, json, csv, tsv, parquet, arrow or conll), or name only the files to read"
        )
        raise DataError(url or str(path), ABSENT, "has a suffix that does not tell its form", way_out)
    return Source(path, data_format or str(told), compression, url)
