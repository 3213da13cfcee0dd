"""The proof that a checkpoint exists, read by the trainer and by the tools. No torch: it is a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checksum import file_digest
from launcher.errors import ABSENT, CheckpointError

MANIFEST = "manifest.json"
VERSION = 1
WAY_OUT = "restore it, or delete this checkpoint and take an earlier one"


@dataclass(frozen=True)
class Manifest:
    """Written last: what is needed to go on from a checkpoint, and what its files must be."""

    version: int
    step: int
    strategy: str
    engine: str
    num_ranks: int
    cursor: dict[str, Any]
    plan_digest: str
    spec: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    """Relative path -> `size` in bytes and `blake2b`."""
    base: dict[str, Any] | None = None
    """Where the frozen weights lie that this checkpoint does not hold: `path`, `folder`, `files` with checksums."""
    best: dict[str, Any] | None = None
    """The best held-out score until then: `metric`, `value`, `step`, and `stale`, the evaluations since."""
    skipped_steps: int = 0
    """Steps until then that updated nothing."""
    score: float | None = None
    """Of `evaluation.metric`, where it was measured at this step."""


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint on disk."""

    folder: Path
    manifest: Manifest

    def is_altered(self, name: str) -> bool:
        """Whether the bytes of a file are others than those that were saved."""
        return file_digest(self.folder / name) != str(self.manifest.files[name]["blake2b"])


def read_saved(folder: Path) -> Saved:
    """Open a checkpoint folder; `CheckpointError` when its manifest or a file is missing or has another size."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(str(folder), ABSENT, f"is incomplete: it has no {MANIFEST}", WAY_OUT)
    manifest = _parse(path)
    for name, size in _wrong_sizes(folder, manifest):
        rule = (
            f"has {size} bytes where the manifest says {manifest.files[name]['size']}"
            if size is not None
            else "is missing"
        )
        raise CheckpointError(str(folder / name), ABSENT, rule, WAY_OUT)
    return Saved(folder, manifest)


def _parse(path: Path) -> Manifest:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["version"]
        manifest = Manifest(**raw) if version == VERSION else None
        outside = [name for name, entry in raw["files"].items() if _checked(entry) and not _is_inside(name)]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(str(path), ABSENT, "is not a manifest of fleetune", WAY_OUT) from None
    if manifest is None:
        rule = f"is of a manifest version other than {VERSION}"
        raise CheckpointError(str(path), version, rule, "open it with the fleetune that wrote it")
    if outside:
        raise CheckpointError(str(path), outside[0], "names a file outside its own folder", WAY_OUT)
    return manifest


def _is_inside(name: str) -> bool:
    """A path that stays in the checkpoint's folder."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def _checked(entry: Any) -> bool:
    if type(entry["size"]) is not int or type(entry["blake2b"]) is not str:
        raise ValueError("a file's entry is a size and a checksum")
    return True


def _wrong_sizes(folder: Path, manifest: Manifest) -> Iterator[tuple[str, int | None]]:
    """Files that are missing (None) or have another size."""
    for name, entry in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["size"]:
            yield name, size
