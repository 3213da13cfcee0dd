"""Opens whatever lies behind a path as a `State`, and says how its bytes are proved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from launcher.errors import CheckpointError
from launcher.stored.read_dcp import read_dcp
from launcher.stored.read_zero import read_universal, read_zero
from launcher.stored.state import State
from launcher.stored.tensors import Progress
from launcher.train.manifest import read_saved
from tools.formats.locate import Checkpoint, Kind, locate, verify
from tools.formats.read_hf import read_hf, read_peft
from tools.formats.read_torch import read_torch

READERS = {
    "zero": read_zero, "universal": read_universal, "dcp": read_dcp, "hf": read_hf, "torch": read_torch,
    "peft": read_peft,
}  # fmt: skip
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was found whole."""

    checkpoint: Checkpoint
    state: State
    base: dict[str, Any] | None
    """Reference to the frozen weights that the checkpoint does not hold."""

    @property
    def where(self) -> str:
        return str(self.checkpoint.folder)

    @property
    def is_proved(self) -> bool:
        """By the checksums of a manifest, before anything was read; else record by record while it is."""
        return self.checkpoint.step_dir is not None


def open_state(source: str, base_dir: str | Path | None, report: Progress) -> Opened:
    """`source` is `KIND:PATH` or a recognisable PATH. Raises `CheckpointError`."""
    kind, path = split_kind(source, KINDS)
    checkpoint = locate(Path(path), cast(Kind | None, kind))
    if checkpoint.step_dir is not None:
        verify(checkpoint, report)
    state = READERS[checkpoint.kind](checkpoint.folder)
    return Opened(checkpoint, state, _base(checkpoint, base_dir))


def locate_source(source: str) -> Opened:
    """The same without reading a value: only what the metadata says is checked."""
    kind, path = split_kind(source, KINDS)
    checkpoint = locate(Path(path), cast(Kind | None, kind))
    return Opened(checkpoint, READERS[checkpoint.kind](checkpoint.folder), None)


def _base(checkpoint: Checkpoint, given: str | Path | None) -> dict[str, Any] | None:
    base = read_saved(checkpoint.step_dir).manifest.base if checkpoint.step_dir is not None else None
    if base is None and given is not None and checkpoint.kind != "peft":
        raise CheckpointError("--base", str(given), "is not needed: the checkpoint holds every weight", "leave it out")
    return {**base, "folder": str(given)} if base and given else base


def split_kind(text: str, known: tuple[str, ...]) -> tuple[str | None, str]:
    """`zero:DIR` -> ("zero", "DIR"); without a prefix (None, text)."""
    prefix, colon, rest = text.partition(":")
    if colon and prefix in known:
        return prefix, rest
    if colon and re.fullmatch(r"[a-z0-9_]+", prefix) and not Path(text).exists():
        raise CheckpointError(text, prefix, "is not a format that can stand here", f"use {' or '.join(known)}")
    return None, text


def read_rename(file: str | None) -> Mapping[str, str]:
    """A JSON object, old name -> new name."""
    import json

    if file is None:
        return {}
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(isinstance(name, str) for pair in found.items() for name in pair):
            raise ValueError("no object of names")
    except (OSError, ValueError) as error:
        way_out = 'write {"old.name": "new.name"}'
        raise CheckpointError("--rename", file, f"is not a JSON object of names ({error})", way_out) from None
    return found


def check_renamed(state: State, names: Mapping[str, str]) -> None:
    unknown = [name for name in names if name not in state.tensors and name not in state.aliases]
    if unknown:
        raise CheckpointError("--rename", unknown[0], "is not in the checkpoint", "fleetune inspect lists its names")
