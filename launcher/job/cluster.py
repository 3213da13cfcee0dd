"""The machines: facts that a site can own, one YAML file per kind of node, each figure with its source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from launcher.errors import SpecError
from launcher.job.load import decode, read_yaml
from launcher.job.resources import resource_dir
from launcher.job.spec import Bool, Number, Section, Text
from launcher.units import GIB


class Gpu(Section):
    """One accelerator, or on a CPU cluster the share of a machine that one rank gets."""

    name: Text
    """What it is called by its maker."""
    kind: Literal["cuda", "cpu"]
    """How torch calls it."""
    memory_gib: Annotated[Number, Field(gt=0, lt=100_000)] | Literal["machine"]
    """Memory that a job can allocate, in GiB; `machine`: this machine's RAM, shared by its ranks."""
    context_gib: Annotated[Number, Field(ge=0, lt=100)]
    """Memory that the driver, the kernels' images and the communicators hold outside the allocator, in GiB."""
    bf16: Bool
    """Whether bf16 products run at full speed in hardware."""


class Link(Section):
    """How ranks are joined."""

    intra_node_gb_per_s: Annotated[Number, Field(gt=0)]
    """Bandwidth between two ranks of a node, one direction, in 1e9 bytes per second."""
    inter_node_gb_per_s: Annotated[Number, Field(gt=0)]
    """Bandwidth of a node's network per rank, one direction, in 1e9 bytes per second."""


class Cluster(Section):
    """Facts of a homogeneous cluster. `sources` names where every figure of `gpu` and `link` comes from."""

    gpu: Gpu
    """The accelerator."""
    link: Link
    """The interconnect."""
    sources: dict[str, str]
    """For each figure, `gpu.memory_gib` say: where it was read or how it was measured."""

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> Cluster:
        figures = {f"gpu.{key}" for key in ("memory_gib", "context_gib", "bf16")} | {
            f"link.{key}" for key in Link.model_fields
        }
        missing = sorted(figures - set(self.sources))
        if missing:
            raise ValueError(f"`sources` says nothing of {', '.join(missing)}")
        return self

    def memory_bytes_per_rank(self, ranks_per_node: int) -> int:
        """What a rank may use, in bytes, the context taken off."""
        if self.gpu.memory_gib == "machine":
            return machine_memory_bytes() // ranks_per_node - int(self.gpu.context_gib * GIB)
        return int((self.gpu.memory_gib - self.gpu.context_gib) * GIB)


def machine_memory_bytes() -> int:
    """RAM of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def load_cluster(name: str) -> Cluster:
    """Facts of a cluster by the name of a file in `slurm/clusters/` or by path; raises `SpecError`."""
    folder = resource_dir("slurm") / "clusters"
    path = Path(name) if "/" in name or name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise SpecError(
            "cluster.name", name, "names no cluster file", f"known: {known}; or give the path of a YAML file"
        )
    return decode(Cluster, read_yaml(path, what="cluster file"), prefix=f"{path}: ")
