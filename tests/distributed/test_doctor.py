"""`fleetune doctor --write-cluster` with real ranks: what they measure makes a file that a plan can be made with."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.doctor.cluster_file import Told, cluster_file
from launcher.doctor.kernels import Sizes
from launcher.doctor.measure import measure
from launcher.errors import FleetuneError
from launcher.job import load_cluster
from launcher.units import MIB

SMALL = Sizes(64, (32, 64), (1, 2, 32, 16), 4 * MIB, 4 * MIB)


def test_two_ranks_measure_this_machine(tmp_path: Path) -> None:
    """Every figure is there, and within what any computer of this century reaches; the disk's file is removed."""
    said: list[str] = []
    machine = measure("cpu", 2, 1, tmp_path, tmp_path, said.append, SMALL)
    assert said[0] == "products in fp32"
    assert {"collectives", "disk"} <= set(said)
    assert (machine.kind, machine.num_ranks, machine.threads) == ("cpu", 2, 1)
    assert set(machine.products["fp32"]) == {32, 64}
    assert 1e8 < machine.products["fp32"][64].value < 1e13
    assert 1e8 < machine.add.value < 1e13
    assert 1e-8 < machine.launch.value < 1e-2
    assert machine.gather is not None
    assert machine.overlap is not None
    assert 0 <= machine.overlap.value <= 1
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "here.yaml"
    path.write_text(cluster_file(machine, Told("2026-11-22")))
    cluster = load_cluster(str(path))
    assert cluster.host.nvme_gib is not None
    assert cluster.memory_bytes_per_rank(2) > 0


def test_ranks_that_fail_say_why(tmp_path: Path) -> None:
    with pytest.raises(FleetuneError, match=r"(?s)measuring ranks failed.*No such file or directory"):
        measure("cpu", 1, 1, tmp_path / "nowhere", None, lambda _: None, SMALL)
