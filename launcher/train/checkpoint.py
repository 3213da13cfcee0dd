"""A checkpoint exists only when its manifest does, written last. Saved under one topology, loaded under another.

    <output_dir>/checkpoints/step-00000020/
        zero/ or dcp/        the engine's native format: every outside tool reads it
        hf/                  config and tokenizer, so that the folder can be converted alone
        rng/rank-00000.safetensors
        manifest.json        step, cursor, plan, sizes and checksums of all files above

Written as `step-00000020.tmp` and renamed: a killed save leaves a folder that no reader takes for a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from launcher.checksum import file_digest
from launcher.errors import ABSENT, CheckpointError
from launcher.train.agree import decide_on_first
from launcher.train.engine import Engine
from launcher.train.manifest import MANIFEST, Manifest, Saved, read_saved

_STEP_FOLDER = re.compile(r"step-(\d{8})")


def save_checkpoint(
    root: Path, engine: Engine, manifest: Manifest, hf_files: Path, keep_last: int, best_step: int | None = None
) -> Path:
    """All ranks together; returns the folder once it is complete. `manifest.files` is filled in here.

    best_step: a step whose checkpoint is kept beside the last ones.
    """
    final = root / f"step-{manifest.step:08d}"
    partial = final.with_suffix(".tmp")
    decide_on_first(lambda: _fresh_folder(partial))
    engine.save(partial, with_frozen=manifest.base is None)
    _save_rng(partial)
    decide_on_first(lambda: _copy_hf(hf_files, partial))
    files = _checksums(partial)
    decide_on_first(lambda: _seal(partial, final, manifest, files))
    decide_on_first(lambda: _prune(root, keep_last, best_step))
    return final


def _fresh_folder(folder: Path) -> None:
    if folder.exists():  # left by a save that was killed
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _copy_hf(hf_files: Path, partial: Path) -> None:
    shutil.copytree(hf_files, partial / "hf")


def _save_rng(partial: Path) -> None:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    folder = partial / "rng"
    folder.mkdir(exist_ok=True)
    save_file(state, folder / f"rank-{dist.get_rank():05d}.safetensors")


def _checksums(partial: Path) -> dict[str, dict[str, Any]]:
    """Every rank hashes and syncs its share of the files; rank 0 gets them all."""
    dist.barrier()  # every rank has written
    names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    mine = {name: _digest_and_sync(partial / name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return dict(sorted((name, entry) for share in shares for name, entry in share.items()))


def _digest_and_sync(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "blake2b": file_digest(path)}


def _seal(partial: Path, final: Path, manifest: Manifest, files: dict[str, dict[str, Any]]) -> None:
    """Manifest, rename, both on disk before this returns."""
    with (partial / MANIFEST).open("w") as file:
        json.dump({**asdict(manifest), "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():  # saved before and trained again from an earlier one: the newer replaces it
        shutil.rmtree(final)
    partial.rename(final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(root: Path, keep_last: int, best_step: int | None = None) -> None:
    for folder in _step_folders(root)[keep_last:]:
        if folder.name != f"step-{best_step or 0:08d}" and (folder / MANIFEST).is_file():
            (folder / MANIFEST).unlink()  # first no checkpoint any more, then gone
            shutil.rmtree(folder)


def _step_folders(root: Path) -> list[Path]:
    """Newest first."""
    folders = [path for path in root.glob("step-*") if _STEP_FOLDER.fullmatch(path.name)] if root.is_dir() else []
    return sorted(folders, reverse=True)


def newest_complete(root: Path, warn: Any) -> Saved | None:
    """The newest checkpoint whose files are all there, None when there is none at all.

    One that is incomplete is passed over with a warning; `CheckpointError` when nothing else is left, since starting
    afresh would in time overwrite it.
    """
    broken: CheckpointError | None = None
    for folder in _step_folders(root):
        try:
            return read_saved(folder)
        except CheckpointError as error:
            warn(f"{error}")
            broken = broken or error
    if broken is not None:
        raise broken
    return None


def verify_checksums(saved: Saved) -> None:
    """Every rank reads its share of the files; all raise `CheckpointError` when any byte was altered."""
    names = sorted(saved.manifest.files)[dist.get_rank() :: dist.get_world_size()]
    mine = [name for name in names if saved.is_altered(name)]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    for name in sorted(name for share in found for name in share):
        raise CheckpointError(
            str(saved.folder / name), ABSENT, "was altered: its checksum differs", "delete this checkpoint folder"
        )


def check_same_layout(saved: Saved, strategy: str, engine: str, num_ranks: int) -> None:
    """torch DCP reshards; DeepSpeed's folders are read by the stage and the number of ranks that wrote them."""
    manifest = saved.manifest
    same = manifest.engine == engine and (
        engine == "torch" or (manifest.strategy == strategy and manifest.num_ranks == num_ranks)
    )
    if not same:
        was, now = f"{manifest.strategy} on {manifest.num_ranks} ranks", f"{strategy} on {num_ranks} ranks"
        way_out = f"resume with {was}, or convert it (python -m tools.convert) and start from the weights"
        raise CheckpointError(str(saved.folder), ABSENT, f"was saved by {was} and cannot be resumed by {now}", way_out)


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
