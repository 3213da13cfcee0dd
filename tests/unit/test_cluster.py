"""Cluster files: the ones we ship, and what a rank may use of a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.errors import SpecError
from launcher.job import cluster as cluster_module
from launcher.job import load_cluster
from launcher.units import GIB
from tests.support import REPO
from tests.unit.costs import cluster_of

SHIPPED = sorted((REPO / "slurm" / "clusters").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_is_valid_and_gives_its_sources(path: Path) -> None:
    """By its name, and by its path; no source is a mere word."""
    cluster = load_cluster(path.stem)
    assert cluster == load_cluster(str(path))
    assert all(len(source.split()) >= 3 for source in cluster.sources.values())


@pytest.mark.parametrize(("name", "gib"), [("a100-40", 40), ("a100-80", 80), ("h100-80", 80), ("h200", 141)])
def test_a_rank_of_a_gpu_uses_less_than_the_data_sheet_says(name: str, gib: int) -> None:
    """The name's gigabytes are the maker's; the driver and the communicators take 1 to 3 of them."""
    usable = load_cluster(name).memory_bytes_per_rank(8)
    assert (gib - 4) * GIB < usable < gib * GIB
    assert usable == load_cluster(name).memory_bytes_per_rank(1)


def test_ranks_of_a_cpu_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GiB, 0.7 of which each rank's libraries hold."""
    monkeypatch.setattr(cluster_module, "machine_memory_bytes", lambda: 16 * GIB)
    cluster = load_cluster("cpu")
    assert cluster.memory_bytes_per_rank(1) == pytest.approx(15.3 * GIB, abs=1)
    assert cluster.memory_bytes_per_rank(4) == pytest.approx(3.3 * GIB, abs=1)
    assert cluster.memory_bytes_per_rank(100) == 0


def test_the_machine_has_memory() -> None:
    """What sysconf says is what /proc/meminfo says."""
    total_kib = int(Path("/proc/meminfo").read_text().split()[1])
    assert cluster_module.machine_memory_bytes() == total_kib * 1024


@pytest.mark.parametrize(
    "figure", ["gpu.memory_gib", "gpu.context_gib", "gpu.bf16", "link.intra_node_gb_per_s", "link.inter_node_gb_per_s"]
)
def test_each_figure_needs_a_source(figure: str, tmp_path: Path) -> None:
    raw: dict[str, Any] = yaml.safe_load(SHIPPED[0].read_text())
    del raw["sources"][figure]
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(SpecError, match=figure):
        load_cluster(str(path))


def test_usable_memory_is_what_is_left_of_the_memory() -> None:
    assert cluster_of(3 * GIB).memory_bytes_per_rank(7) == 3 * GIB


def based(folder: Path, text: str, name: str = "site") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def test_a_site_says_only_what_is_its_own(tmp_path: Path) -> None:
    """Overridden figures with their sources, the rest as the base has them; `slurm` key by key as well."""
    path = based(
        tmp_path,
        "base: h100-80\n"
        "link: {inter_node_gb_per_s: 12.5}\n"
        "price_per_gpu_hour: 2.5\n"
        "slurm: {partition: gpu}\n"
        "sources: {link.inter_node_gb_per_s: 'one 100 Gbit/s port per GPU', price_per_gpu_hour: our contract}\n",
    )
    mine, base = load_cluster(str(path)), load_cluster("h100-80")
    assert mine.gpu == base.gpu
    assert mine.host == base.host
    assert mine.link == base.link.model_copy(update={"inter_node_gb_per_s": 12.5})
    assert (mine.price_per_gpu_hour, mine.slurm.partition) == (2.5, "gpu")
    ours = {"link.inter_node_gb_per_s": "one 100 Gbit/s port per GPU", "price_per_gpu_hour": "our contract"}
    assert mine.sources == {**base.sources, **ours}


def test_a_base_may_have_a_base_and_lies_beside_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of bases are from the file that names them, wherever the command runs; null takes a figure away."""
    folder = tmp_path / "site"
    folder.mkdir()
    based(folder, "base: a100-80\nhost: {nvme_gib: null, nvme_gb_per_s: null}\n", "rack")
    based(folder, "base: ./rack.yaml\nslurm: {account: us}\n", "queue")
    monkeypatch.chdir(tmp_path)
    cluster = load_cluster("site/queue.yaml")
    assert (cluster.host.nvme_gib, cluster.host.nvme_gb_per_s, cluster.slurm.account) == (None, None, "us")
    assert cluster.gpu == load_cluster("a100-80").gpu


def test_an_overridden_figure_loses_the_source_of_its_base(tmp_path: Path) -> None:
    """Or a figure of ours would carry the word of a data sheet."""
    path = based(tmp_path, "base: h100-80\ngpu: {launch_us: 4}\n")
    with pytest.raises(SpecError, match=r"`sources` says nothing of gpu\.launch_us"):
        load_cluster(str(path))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_sources_say_where_or_that_nobody_confirmed(path: Path) -> None:
    """A page that was read, a measurement, arithmetic, or the plain word that it is none of these."""
    words = ("read 2026", "measured", "working value", "not confirmed", "fitted", "extrapolated", "assumed")
    words += ("nominal", "by sysconf", "emulated", "nothing is hidden", "was reached", "amx_bf16", "llm-foundry")
    vague = {key: text for key, text in load_cluster(path.stem).sources.items() if not any(w in text for w in words)}
    assert vague == {}
