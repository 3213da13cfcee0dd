"""A checkpoint exists only when its manifest does, written last. Saved under one topology, loaded under another.

    <output_dir>/checkpoints/step-00000020/
        zero/ or dcp/        the engine's native format: every outside tool reads it
        hf/                  config and tokenizer, so that the folder can be converted alone
        rng/rank-00000.safetensors
        manifest.json        step, cursor, plan, sizes and checksums of all files above
    <output_dir>/checkpoints/latest     the name of the newest

Written as `step-00000020.tmp` and renamed: a killed save leaves a folder that no reader takes for a checkpoint.
`saver.py` says when which part runs; this file knows what is where.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save

from launcher.checksum import file_digest
from launcher.errors import ABSENT, CheckpointError
from launcher.job.spec import CheckpointSection
from launcher.train.agree import decide_on_first
from launcher.train.keep import kept, remove
from launcher.train.manifest import MANIFEST, Manifest, Saved, read_saved

LATEST = "latest"
_STEP_FOLDER = re.compile(r"step-(\d{8})")


def folders_of(root: Path, step: int) -> tuple[Path, Path]:
    """(where a step's checkpoint is written, what it is renamed to)."""
    final = root / f"step-{step:08d}"
    return final.with_suffix(".tmp"), final


def fresh_folder(folder: Path) -> None:
    if folder.exists():  # left by a save that was killed
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def random_state() -> bytes:
    """This rank's generators, as a safetensors file."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return save(state)


def write_random_state(partial: Path, rank: int, state: bytes) -> None:
    folder = partial / "rng"
    folder.mkdir(exist_ok=True)
    (folder / f"rank-{rank:05d}.safetensors").write_bytes(state)


def digest_and_sync(partial: Path, share: slice) -> dict[str, dict[str, Any]]:
    """Size and checksum of this rank's share of the files, which are on disk when this returns."""
    names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    entries = {}
    for name in names[share]:
        path = partial / name
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries[name] = {"size": path.stat().st_size, "blake2b": file_digest(path)}
    return entries


def seal(partial: Path, final: Path, manifest: Manifest, files: dict[str, dict[str, Any]]) -> None:
    """Manifest, rename, `latest`: each on disk before the next begins."""
    write_synced(partial / MANIFEST, json.dumps({**asdict(manifest), "files": files}, indent=1))
    for folder in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync_folder(folder)
    replaced = final.with_suffix(".old")
    if final.exists():  # saved before and trained again from an earlier one: the newer replaces it
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)
    write_synced(final.parent / f"{LATEST}.tmp", final.name)
    (final.parent / f"{LATEST}.tmp").rename(final.parent / LATEST)
    if replaced.exists():
        shutil.rmtree(replaced)


def write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(root: Path, rule: CheckpointSection, best_step: int | None = None, greater_is_better: bool = True) -> None:
    """Deletes what the rule does not keep, but for `best_step`; one that is being read stays until the next save."""
    complete = {_step_of(folder): folder for folder in _step_folders(root) if (folder / MANIFEST).is_file()}
    scores = {step: _score(folder) for step, folder in complete.items()}
    for step in sorted(complete.keys() - kept(scores, rule, greater_is_better) - {best_step}):
        remove(complete[step])


def _score(folder: Path) -> float | None:
    try:
        return read_saved(folder).manifest.score
    except CheckpointError:  # damaged: nothing to prefer it for
        return None


def _step_folders(root: Path) -> list[Path]:
    """Newest first."""
    folders = [path for path in root.glob("step-*") if _STEP_FOLDER.fullmatch(path.name)] if root.is_dir() else []
    return sorted(folders, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def restore_interrupted(root: Path) -> None:
    """A kill between the two renames of a replacement leaves the replaced checkpoint under another name."""
    for old in root.glob("step-*.old"):
        final = old.with_suffix("")
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)


def newest_complete(root: Path, warn: Callable[[str], Any]) -> Saved | None:
    """The newest checkpoint whose files are all there, None when there is none at all.

    One that is incomplete is passed over with a warning; `CheckpointError` when nothing else is left, since starting
    afresh would in time overwrite it.
    """
    broken: CheckpointError | None = None
    for found in _opened(root):
        if isinstance(found, Saved):
            return found
        warn(f"{found}")
        broken = broken or found
    if broken is not None:
        raise broken
    return None


def newest_unaltered(root: Path, warn: Callable[[str], Any]) -> Saved | None:
    """`newest_complete`, and its bytes are those that were saved: each rank reads its share. All ranks together."""
    found = decide_on_first(lambda: list(_opened(root)))
    broken: CheckpointError | None = None
    for saved in found:
        error = saved if isinstance(saved, CheckpointError) else _altered(saved)
        if error is None:
            assert isinstance(saved, Saved)
            return saved
        warn(f"{error}")
        broken = broken or error
    if broken is not None:
        raise broken
    return None


def _opened(root: Path) -> Iterator[Saved | CheckpointError]:
    for folder in _step_folders(root):
        try:
            yield read_saved(folder)
        except CheckpointError as error:
            yield error


def _altered(saved: Saved) -> CheckpointError | None:
    """The same answer on every rank."""
    names = sorted(saved.manifest.files)[dist.get_rank() :: dist.get_world_size()]
    mine = [name for name in names if saved.is_altered(name)]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    altered = sorted(name for share in found for name in share)
    if not altered:
        return None
    rule, way_out = "was altered: its checksum differs", "delete this checkpoint folder"
    return CheckpointError(str(saved.folder / altered[0]), ABSENT, rule, way_out)


def load_rng(saved: Saved) -> None:
    """This rank's random state; a rank that did not exist then keeps the one of its seed."""
    path = saved.folder / "rng" / f"rank-{dist.get_rank():05d}.safetensors"
    if not path.is_file():
        return
    state = load_file(path)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def library_versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "deepspeed", "peft")}
