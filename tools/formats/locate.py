"""Finds the engine's folder behind the path a user names, and proves that the checkpoint is whole.

A fleetune run is `<run>/checkpoints/step-00000020/` with `manifest.json` (written last: sizes and BLAKE2b checksums of
all files), `zero/` or `dcp/`, and `hf/` (config and tokenizer). A folder of DeepSpeed or DCP alone has no manifest.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.records import USE_ANOTHER
from launcher.stored.tensors import Progress, safe_relative
from launcher.train.base import ADAPTER
from launcher.train.manifest import MANIFEST, read_saved

Kind = Literal["zero", "universal", "dcp", "hf", "torch", "peft"]
KINDS: tuple[Kind, ...] = ("zero", "dcp")
"""Of fleetune's own runs: the names of their folders."""

WANTED: dict[Kind, str] = {
    "zero": "a DeepSpeed folder (no `latest`, no *_optim_states.pt)",
    "universal": "a universal DeepSpeed folder (no zero/optimizer_state.pt)",
    "dcp": "a DCP folder (no `.metadata`)",
    "hf": "a model's folder (no model.safetensors, no index of it)",
    "torch": "a file of torch.save",
    "peft": "a PEFT folder (no adapter_model.safetensors)",
}

STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found."""

    kind: Kind
    folder: Path
    """What the engine wrote: DeepSpeed's tag folder, or the DCP folder."""
    config_dir: Path | None
    """Where config.json lies, if anywhere near."""
    step_dir: Path | None
    """The fleetune checkpoint it belongs to, whose manifest vouches for its files."""


def has_adapter(config_dir: Path) -> bool:
    """Whether a run with this folder of configurations trained adapters."""
    return (config_dir / ADAPTER / "adapter_config.json").is_file()


def locate(path: Path, kind: Kind | None) -> Checkpoint:
    """`path` may be a fleetune run, its `checkpoints/`, one step, or a folder that DeepSpeed or DCP wrote."""
    path = Path(os.path.abspath(path))  # its parents are looked at
    if path.is_file() and (kind == "torch" or (kind is None and _is_archive(path))):
        return Checkpoint("torch", path, _config_dir(path.parent, None), None)
    if not path.is_dir():
        rule = "is a file, not a folder" if path.exists() else "does not exist"
        raise CheckpointError(str(path), ABSENT, rule, "name the folder of a checkpoint or of a run")
    if not any(path.iterdir()):
        raise CheckpointError(str(path), ABSENT, "is empty", "name the folder of a checkpoint or of a run")
    if (found := _model_folder(path, kind)) is not None:
        return found
    step_dir = _step_dir(path)
    if step_dir is None:
        return _engine_folder(path, kind, None)
    read_saved(step_dir)  # complete, or refused
    inner = path if step_dir in path.parents else _inner(step_dir, kind)
    return _engine_folder(inner, kind, step_dir)


def _is_archive(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _model_folder(path: Path, kind: Kind | None) -> Checkpoint | None:
    """Folders that carry their own names and no run: a model's, peft's, and DeepSpeed's universal one."""
    if kind in (None, "universal") and (found := _universal(path)) is not None:
        return Checkpoint("universal", found, _config_dir(path, None), None)
    if kind in (None, "peft") and (path / "adapter_model.safetensors").is_file():
        return Checkpoint("peft", path, _config_dir(path, None), None)
    if kind in (None, "hf") and any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        return Checkpoint("hf", path, _config_dir(path, None), None)
    return None


def _universal(path: Path) -> Path | None:
    """The folder that holds `zero/optimizer_state.pt`; `latest_universal` may point to it."""
    if (path / "latest_universal").is_file():
        path = safe_relative(path, (path / "latest_universal").read_text(encoding="utf-8").strip())
    return path if (path / "zero" / "optimizer_state.pt").is_file() else None


def _step_dir(path: Path) -> Path | None:
    """The step folder that `path` is, lies in (`zero/`, its tag), or contains (the newest complete one)."""
    for folder in (path, path.parent, path.parent.parent):
        if STEP.fullmatch(folder.name) and _is_step(folder):
            return folder
    if (path / MANIFEST).is_file():  # a step that was copied under another name
        return path
    holder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = {int(match[1]): child for child in holder.iterdir() if (match := STEP.fullmatch(child.name))}
    newest_first = [steps[step] for step in sorted(steps, reverse=True) if _is_step(steps[step])]
    complete = [step for step in newest_first if (step / MANIFEST).is_file()]
    return next(iter(complete or newest_first), None)


def steps_of(run: Path) -> list[Path]:
    """The complete checkpoints of a fleetune run, newest first."""
    holder = run / "checkpoints"
    folders = [path for path in holder.glob("step-*") if STEP.fullmatch(path.name)] if holder.is_dir() else []
    return sorted((path for path in folders if (path / MANIFEST).is_file()), reverse=True)


def _is_step(folder: Path) -> bool:
    """A step folder of ours, finished or not, rather than a folder of DeepSpeed's that is called like one."""
    return any((folder / name).exists() for name in (MANIFEST, "hf", *KINDS))


def _inner(step_dir: Path, kind: Kind | None) -> Path:
    found = [step_dir / name for name in KINDS if (step_dir / name).is_dir() and kind in (None, name)]
    if not found:
        rule = f"holds no {kind or 'zero'}/ folder" if kind else "holds neither zero/ nor dcp/"
        raise CheckpointError(str(step_dir), ABSENT, rule, "leave the prefix out, or name another step")
    return found[0]


def _engine_folder(path: Path, kind: Kind | None, step_dir: Path | None) -> Checkpoint:
    config_dir = _config_dir(path, step_dir)
    if kind in (None, "dcp") and (path / ".metadata").is_file():
        return Checkpoint("dcp", path, config_dir, step_dir)
    if kind in (None, "zero"):
        if (path / "latest").is_file():
            return Checkpoint("zero", _tagged(path), config_dir, step_dir)
        if any(path.glob("*_optim_states.pt")) or any(path.glob("*_model_states.pt")):
            return Checkpoint("zero", path, config_dir, step_dir)
    rule = f"is not {WANTED[kind]}" if kind else "is no checkpoint of a known format (DeepSpeed, DCP, a model's folder)"
    raise CheckpointError(str(path), ABSENT, rule, "name the folder of a checkpoint or of a run")


def _tagged(path: Path) -> Path:
    """The folder that DeepSpeed's `latest` points to."""
    tag = (path / "latest").read_text(encoding="utf-8").strip()
    folder = safe_relative(path, tag)
    if not folder.is_dir():
        raise CheckpointError(str(path / "latest"), tag, "names a folder that is missing", "name a tag folder directly")
    return folder


def _config_dir(path: Path, step_dir: Path | None) -> Path | None:
    near = ([step_dir / "hf"] if step_dir else []) + [path, path / "hf", path.parent]
    return next((folder for folder in near if (folder / "config.json").is_file()), None)


def verify(checkpoint: Checkpoint, progress: Progress) -> None:
    """Compares the size, then the checksum, of every file in the manifest. Reads everything once."""
    assert checkpoint.step_dir is not None
    folder = checkpoint.step_dir
    saved = read_saved(folder)
    files = saved.manifest.files
    done, total = 0, sum(entry["size"] for entry in files.values())
    for name, entry in files.items():
        if saved.is_altered(name):
            raise CheckpointError(str(folder / name), ABSENT, "has changed since it was saved (checksum)", USE_ANOTHER)
        done += entry["size"]
        progress("checking", done, total)
    unlisted = [file for file in checkpoint.folder.rglob("*") if file.is_file() and _name(folder, file) not in files]
    needed = [file for file in unlisted if file.name.endswith((".pt", ".distcp", ".metadata"))]
    if needed:
        raise CheckpointError(str(needed[0]), ABSENT, "is not listed in the manifest", "remove the foreign file")


def _name(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()
