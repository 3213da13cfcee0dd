"""A complete checkpoint, copied to another folder or an object store; its manifest goes last there too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.errors import ABSENT, CheckpointError
from launcher.train.manifest import MANIFEST


def copy_out(folder: Path, target: str, files: Mapping[str, Any] | None, share: slice) -> None:
    """This rank's share of the files; with None the manifest alone, once every rank has copied."""
    from fsspec.core import url_to_fs

    try:
        store, root = url_to_fs(target)
        for name in sorted(files)[share] if files is not None else [MANIFEST]:
            place = f"{root.rstrip('/')}/{folder.name}/{name}"
            store.makedirs(place.rpartition("/")[0], exist_ok=True)
            store.put_file(str(folder / name), place)
    except (OSError, ValueError, ImportError) as error:  # no such store, no access, a protocol that is not installed
        words = str(error).strip().partition("\n")[0]
        way_out = "mend checkpoint.copy_to; the checkpoint itself is complete"
        raise CheckpointError(target, ABSENT, f"could not take {folder.name} ({words})", way_out) from error
