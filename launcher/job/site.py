"""Cluster files on disk: found by name or path, and put together where one says `base:` and overrides some figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.errors import SpecError
from launcher.job.load import read_yaml
from launcher.job.resources import resource_dir

BASE = "base"


def known_clusters() -> list[str]:
    """Names of the files that come with fleetune."""
    return sorted(file.stem for file in (resource_dir("slurm") / "clusters").glob("*.yaml"))


def cluster_path(name: str, key: str, beside: Path) -> Path:
    """File of a cluster: a name from `slurm/clusters/`, or a path, from `beside` on. Raises `SpecError` that names `key`."""
    folder = resource_dir("slurm") / "clusters"
    path = beside / name if "/" in name or name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(known_clusters())
        raise SpecError(key, name, "names no cluster file", f"known: {known}; or give the path of a YAML file")
    return path


def read_cluster(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a file with its bases' below it. A figure that is overridden loses its base's source.

    above: files whose base this one is. Raises `SpecError` for a file that cannot be read, and for a circle of bases.
    """
    raw = read_yaml(path, what="cluster file")
    if BASE not in raw:
        return raw
    name = raw.pop(BASE)
    key = f"{path}: {BASE}"
    if not isinstance(name, str) or not name:
        raise SpecError(key, name, "must be a non-empty text", "name a file of slurm/clusters/, or give its path")
    below = cluster_path(name, key, path.parent)
    chain = (*above, path)
    if below.resolve() in [file.resolve() for file in chain]:
        words = " -> ".join(file.name for file in (*chain, below))
        raise SpecError(key, name, f"makes a circle: {words}", "base it on another file")
    return overridden(read_cluster(below, chain), raw)


def overridden(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `base`, section by section; what is no section replaces the whole."""
    merged = {
        key: {**base[key], **own[key]}
        if isinstance(base.get(key), dict) and isinstance(own.get(key), dict)
        else own.get(key, base.get(key))
        for key in (*base, *(key for key in own if key not in base))
    }
    told, sources = own.get("sources"), merged.get("sources")
    if isinstance(sources, dict):
        fresh = told if isinstance(told, dict) else {}
        stale = set(_figures(own)) - set(fresh)
        merged["sources"] = {dotted: words for dotted, words in sources.items() if dotted not in stale}
    return merged


def _figures(raw: dict[str, Any]) -> list[str]:
    """Dotted names of what a file says outside `sources`, `slurm` and `kubernetes`."""
    return [
        dotted
        for section, facts in raw.items()
        if section not in ("sources", "slurm", "kubernetes")
        for dotted in ([f"{section}.{key}" for key in facts] if isinstance(facts, dict) else [section])
    ]
