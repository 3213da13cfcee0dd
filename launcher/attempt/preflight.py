"""Nodes compare what they see before a rank starts: a difference that a collective would hang on, or train through, is one line.

A node's facts are small, so the first node compares those of a thousand in milliseconds.
"""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launcher.cost.cache import cached_cost
from launcher.errors import UserError
from launcher.job import load_cluster, load_spec
from launcher.plan import make_plan
from launcher.spawn import count_gpus

_PACKAGES = ("torch", "transformers", "deepspeed", "peft", "safetensors", "numpy")
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Facts:
    """What has to be alike on all nodes."""

    host: str
    spec: str
    """Digest of the spec as it was read, overrides included."""
    plan: str
    code: str
    """fleetune's own sources and the versions of the packages that compute."""
    data: str
    """Digest of the prepared data's index; `absent` where none can be read."""
    gpus: int | None
    """Accelerators that a rank could take; None on CPU."""
    problem: str = ""
    """Why this node cannot start at all."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_WORDS = {
    "spec": "another job spec",
    "plan": "another plan",
    "code": "another version of the code or its packages",
    "data": "other prepared data",
    "gpus": "another number of GPUs",
}
_WAYS_OUT = {
    "spec": "put the spec on a filesystem that all nodes share",
    "plan": "name a cluster file with fixed figures, and keep the cost cache on a shared filesystem",
    "code": "install fleetune once, where all nodes see it",
    "data": "prepare once, on a filesystem that all nodes share",
    "gpus": "leave the node out (--exclude in slurm.extra, launch.exclude), or have it mended",
}


def facts_of_this_node(spec_path: str, overrides: list[str], nodes: int, ranks_per_node: int) -> Facts:
    """A mistake of the user's is a problem in words: the other nodes have to hear of it."""
    host = platform.node()
    try:
        spec = load_spec(spec_path, overrides)
        sizes = {"nodes": nodes, "gpus_per_node": ranks_per_node}
        spec = spec.model_copy(update={"cluster": spec.cluster.model_copy(update=sizes)})
        cluster = load_cluster(spec.cluster.name)
        plan = make_plan(spec, cached_cost(spec), cluster, advise=False).digest()
    except UserError as error:
        return Facts(host, "", "", "", "", None, str(error))
    gpus = count_gpus() if cluster.gpu.kind == "cuda" else None
    problem = ""
    if gpus is not None and gpus < ranks_per_node:
        problem = f"cluster.gpus_per_node: {ranks_per_node} is more than the {gpus} GPUs there; {_WAYS_OUT['gpus']}"
    index = Path(spec.prepared_dir) / "index.json"
    return Facts(
        host, _digest(spec.model_dump_json().encode()), plan, code_digest(), _file_digest(index), gpus, problem
    )


def code_digest() -> str:
    """Of every file of the package, and of the versions that compute; what lies in caches is left out."""
    parts = [platform.python_version(), *(f"{name} {_version(name)}" for name in _PACKAGES)]
    parts += [f"{path.relative_to(_ROOT)} {_digest(path.read_bytes())}" for path in sorted(_ROOT.rglob("*.py"))]
    return _digest("\n".join(parts).encode())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _file_digest(path: Path) -> str:
    try:
        return _digest(path.read_bytes())
    except OSError:
        return "absent"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=6).hexdigest()


def disagreement(all_facts: list[Facts]) -> str | None:
    """One line where nodes cannot start or differ, None where they agree. all_facts: in the order of the nodes."""
    for facts in all_facts:
        if facts.problem:
            return f"{facts.host}: {facts.problem}"
    for key, words in _WORDS.items():
        values = [getattr(facts, key) for facts in all_facts]
        usual = Counter(values).most_common(1)[0][0]
        odd = [facts for facts in all_facts if getattr(facts, key) != usual]
        if odd:
            names = ", ".join(facts.host for facts in odd[:8]) + (f" and {len(odd) - 8} more" if len(odd) > 8 else "")
            found = (
                f"{getattr(odd[0], key)} and not {usual}, as {len(all_facts) - len(odd)} of {len(all_facts)} nodes do"
            )
            return f"{names}: sees {words} ({found}); {_WAYS_OUT[key]}"
    return None
