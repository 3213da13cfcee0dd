"""The weights that adapters were trained beside: named and checksummed in a checkpoint instead of copied into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher.checksum import file_digest
from launcher.errors import ABSENT, CheckpointError

ADAPTER = "adapter"
"""Folder beside a checkpoint's config.json that holds peft's own `adapter_config.json`."""
WEIGHTS = ("*.safetensors", "*.bin")


def base_folder(path: str) -> Path:
    """The folder of `model.path`; of a hub id, its snapshot in the local cache, where transformers has put it."""
    if Path(path).is_dir():
        return Path(path).absolute()
    from transformers.utils import cached_file

    return Path(str(cached_file(path, "config.json"))).parent


def base_reference(path: str) -> dict[str, Any]:
    """Folder, and size and checksum of each weights file. All ranks together, each reads its share of the files."""
    folder = base_folder(path)
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    mine = [_entry(file) for file in files[dist.get_rank() :: dist.get_world_size()]]
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    entries = sorted((entry for share in shares for entry in share), key=lambda entry: entry["name"])
    return {"path": path, "folder": str(folder), "files": entries}


def _entry(file: Path) -> dict[str, Any]:
    return {"name": file.name, "size": file.stat().st_size, "blake2b": file_digest(file)}


def check_same_base(saved: dict[str, Any] | None, now: dict[str, Any] | None, where: str) -> None:
    """Raises `CheckpointError` when the adapters of a checkpoint belong to other weights than those of this run."""
    if (saved or {}).get("files") != (now or {}).get("files"):
        rule = f"was trained beside other weights than those of model.path ({(saved or {}).get('folder', 'its own')})"
        raise CheckpointError(where, ABSENT, rule, "give these weights back, or name another output_dir")


def check_base_files(base: dict[str, Any]) -> Path:
    """The folder of a reference, its files read and found unaltered. Raises `CheckpointError`."""
    folder = Path(str(base["folder"]))
    for entry in base["files"]:
        file = folder / str(entry["name"])
        if not file.is_file():
            rule = "is missing, and the adapters were trained beside it"
            raise CheckpointError(str(file), ABSENT, rule, "put the base model back, or name its folder with --base")
        if _entry(file) != entry:
            rule = "is not the file that the adapters were trained beside: its checksum differs"
            raise CheckpointError(str(file), ABSENT, rule, "put that one back, or name its folder with --base")
    return folder
