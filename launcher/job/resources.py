"""Where the files that are not Python lie: beside the packages in a checkout, inside `launcher` in a wheel."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.errors import FleetuneError

_PACKAGE = Path(__file__).resolve().parents[1]


def resource_dir(name: str) -> Path:
    """Folder `ds_configs`, `slurm` or `jobs`. Raises `FleetuneError` when the installation lost it."""
    for root in (_PACKAGE.parent, _PACKAGE / "_resources"):
        if (root / name).is_dir():
            return root / name
    raise FleetuneError(f"the installation has no folder {name!r}; install fleetune again")


def cache_dir() -> Path:
    """Where what can be computed again is kept: `$XDG_CACHE_HOME/fleetune`, by default `~/.cache/fleetune`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fleetune"
