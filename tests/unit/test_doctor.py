"""`fleetune doctor`: its report, the width law, and the cluster file made of measurements."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from launcher import cli
from launcher.doctor import environment
from launcher.doctor.cluster_file import DATA_SHEETS, Told, cluster_file
from launcher.doctor.environment import Check, examine
from launcher.doctor.fit import width_law
from launcher.doctor.rank import merged
from launcher.doctor.values import Machine, Sample
from launcher.errors import SpecError
from launcher.job import load_cluster
from launcher.job.cluster import Cluster
from launcher.plan.layout import Layout
from launcher.plan.step_time import step_time
from launcher.units import GIB
from tests.unit.costs import small_cost

WIDTHS = (512, 1024, 2048, 4096)


def at(value: float) -> Sample:
    return Sample(value, 0.02, 5)


def law(rate: float, half_width: float) -> dict[int, Sample]:
    return {width: at(rate * width / (width + half_width)) for width in WIDTHS}


MACHINE = Machine(
    name="Some GPU",
    kind="cuda",
    num_ranks=4,
    threads=8,
    torch_version="2.13.0",
    cores=32,
    host_memory_bytes=512 * GIB,
    device_memory_bytes=80 * GIB,
    context_bytes=GIB,
    products={"fp32": law(50e12, 100), "bf16": law(700e12, 400), "fp16": law(690e12, 400)},
    attention={"fp32": at(30e12), "bf16": at(350e12), "fp16": at(350e12)},
    add=at(2.8e12),
    copy=at(3.0e12),
    launch=at(4.5e-6),
    to_device=at(50e9),
    to_host=at(45e9),
    host_add=at(250e9),
    disk_write=at(2e9),
    disk_read=at(3e9),
    gather=at(350e9),
    latency=at(25e-6),
    overlap=at(0.8),
)


def written(machine: Machine, folder: Path, **told: float) -> Cluster:
    """The file, read back as any cluster file is."""
    path = folder / "machine.yaml"
    path.write_text(cluster_file(machine, Told("2026-11-22", **told)))
    return load_cluster(str(path))


@pytest.mark.parametrize(("rate", "half_width"), [(989e12 * 0.75, 670), (80e9, 10), (1e12, 0)])
def test_the_width_law_is_found_again(rate: float, half_width: float) -> None:
    """Without noise to nine digits; with 5% of it, the rate to 5%."""
    exact = {width: rate * width / (width + half_width) for width in WIDTHS}
    assert width_law(exact) == pytest.approx((rate, half_width), rel=1e-6, abs=1e-6)
    noisy = {width: value * (1.05 if number % 2 else 0.95) for number, (width, value) in enumerate(exact.items())}
    assert width_law(noisy)[0] == pytest.approx(rate, rel=0.15)


def test_a_law_that_falls_with_the_width_is_no_law() -> None:
    """A CPU whose cache a wide product leaves: the mean rate at every width; one width tells no law at all."""
    reached, half_width = width_law({64: 100.0, 128: 90.0, 256: 80.0})
    assert half_width == 0
    assert 80 < reached < 100
    assert width_law({64: 100.0}) == (100.0, 0.0)


def test_what_was_measured_is_what_the_file_says(tmp_path: Path) -> None:
    """An accelerator that we know no data sheet of: its best rates are the peaks."""
    cluster = written(MACHINE, tmp_path)
    gpu, link, host = cluster.gpu, cluster.link, cluster.host
    assert (gpu.name, gpu.kind, gpu.memory_gib, gpu.context_gib) == ("Some GPU", "cuda", 80, 1)
    assert (gpu.bf16, gpu.fp16) == (True, True)
    assert gpu.peak_bf16_tflops * gpu.matmul_share == pytest.approx(700, rel=0.01)
    assert gpu.matmul_half_width == pytest.approx(400, rel=0.01)
    assert gpu.peak_bf16_tflops * gpu.attention_share == pytest.approx(350, rel=0.01)
    assert (gpu.memory_gb_per_s, gpu.memory_share) == (3000, pytest.approx(2.8 / 3, rel=0.01))
    assert (gpu.launch_us, gpu.overlap_share) == (4.5, 0.8)
    assert (link.intra_node_gb_per_s, link.link_share, link.latency_us) == (350, 1, 25)
    assert (host.memory_gib, host.memory_gb_per_s, host.device_gb_per_s, host.disk_gb_per_s) == (512, 250, 45, 2)
    assert (host.nvme_gib, host.nvme_gb_per_s) == (None, None)


def test_each_figure_says_how_it_came_about(tmp_path: Path) -> None:
    """Measured: the date, torch's version, repetitions and spread. Not measured: assumed, in that word."""
    sources = written(MACHINE, tmp_path).sources
    assert sources["gpu.attention_share"].startswith(
        "measured on 2026-11-22 with fleetune doctor, torch 2.13.0, 5 repetitions, spread 2%: "
    )
    assert sources["link.inter_node_gb_per_s"].startswith("assumed: ")
    alone = dataclasses.replace(MACHINE, num_ranks=1, gather=None, latency=None, overlap=None)
    cluster = written(alone, tmp_path)
    for key in ("link.intra_node_gb_per_s", "link.latency_us", "gpu.overlap_share"):
        assert cluster.sources[key].startswith("assumed: ")
    assert cluster.link.intra_node_gb_per_s == 45


def test_of_a_known_accelerator_the_peaks_are_the_data_sheets(tmp_path: Path) -> None:
    """So that MFU means what it means elsewhere; shares are of those peaks, and links it has no rank for are as shipped."""
    known = dataclasses.replace(
        MACHINE, name="NVIDIA H100 80GB HBM3", num_ranks=1, gather=None, latency=None, overlap=None
    )
    cluster, shipped = written(known, tmp_path), load_cluster("h100-80")
    assert cluster.gpu.peak_bf16_tflops == shipped.gpu.peak_bf16_tflops
    assert cluster.gpu.matmul_share == pytest.approx(700 / shipped.gpu.peak_bf16_tflops, rel=0.01)
    assert cluster.gpu.memory_share == pytest.approx(2800 / shipped.gpu.memory_gb_per_s, rel=0.01)
    assert cluster.link == shipped.link
    assert cluster.sources["link.latency_us"].startswith("assumed, as in h100-80.yaml: ")


def test_what_the_user_says_is_taken(tmp_path: Path) -> None:
    told = written(MACHINE, tmp_path, inter_node_gb_per_s=50.0, price_per_gpu_hour=2.5)
    assert (told.link.inter_node_gb_per_s, told.price_per_gpu_hour) == (50, 2.5)


def test_a_half_precision_that_is_emulated_is_none(tmp_path: Path) -> None:
    """fp32 then carries the law; and where fp16 alone has units, its peak stands where bf16's would."""
    slow = {"fp32": law(80e9, 10), "bf16": {512: at(0.2e9)}, "fp16": {512: at(0.2e9)}}
    on_cpu = dataclasses.replace(
        MACHINE, kind="cpu", device_memory_bytes=None, products=slow, attention={"fp32": at(20e9)}
    )
    gpu = written(on_cpu, tmp_path).gpu
    assert (gpu.memory_gib, gpu.bf16, gpu.fp16, gpu.peak_bf16_tflops) == ("machine", False, False, 0.0002)
    assert gpu.peak_fp32_tflops * gpu.matmul_share == pytest.approx(0.08, rel=0.01)
    volta = {"fp32": law(14e12, 100), "bf16": law(13e12, 100), "fp16": law(100e12, 400)}
    gpu = written(dataclasses.replace(MACHINE, products=volta), tmp_path).gpu
    assert (gpu.bf16, gpu.fp16) == (False, True)
    assert gpu.peak_bf16_tflops * gpu.matmul_share == pytest.approx(100, rel=0.01)


def test_an_absurd_measurement_is_not_written() -> None:
    broken = dataclasses.replace(MACHINE, to_host=at(0.0))
    with pytest.raises(SpecError, match=r"measured: host\.device_gb_per_s"):
        cluster_file(broken, Told("2026-11-22"))


def test_a_plan_can_be_made_with_it(tmp_path: Path) -> None:
    layout = Layout("fsdp", 1, 4, 1, 1, 512, "none", "bf16")
    assert step_time(small_cost(), written(MACHINE, tmp_path), layout).seconds > 0


def test_every_data_sheet_is_a_file_of_ours() -> None:
    assert {load_cluster(name).gpu.kind for name in DATA_SHEETS.values()} == {"cuda"}


def test_machine_survives_json() -> None:
    machine = dataclasses.replace(MACHINE, nvme=at(5e9), nvme_bytes=GIB, notes=["a note"])
    assert Machine.from_json(json.loads(json.dumps(machine.to_json()))) == machine


def test_ranks_are_merged() -> None:
    """The median rank's rate with the widest spread, the host's memory summed, the disk as rank 0 found it."""
    ranks = [
        {
            "products": {"fp32": {64: Sample(float(rank), 0.1 * rank, 5)}},
            "attention": {"fp32": at(10.0 * rank)},
            "host_add": at(100.0),
            "add": at(float(rank)),
        }
        for rank in (1, 2, 3)
    ]
    ranks[0]["disk_write"] = at(7.0)
    whole = merged(ranks)
    assert whole["products"]["fp32"][64] == Sample(2.0, pytest.approx(0.3), 5)
    assert (whole["attention"]["fp32"].value, whole["add"].value) == (20, 2)
    assert (whole["host_add"].value, whole["disk_write"].value) == (300, 7)


def test_the_report_has_a_way_out_for_whatever_is_not_well(tmp_path: Path) -> None:
    """On the machine that runs the tests, which has all that a run needs."""
    checks = examine(tmp_path / "not-there-yet")
    assert {"python", "torch", "deepspeed", "C++ compiler", "disk", "shared memory", "Slurm"} <= {
        c.name for c in checks
    }
    assert [check for check in checks if check.status != "ok" and not check.advice] == []
    assert [check for check in checks if check.status == "problem"] == []


def test_a_library_that_is_missing_or_too_old_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"torch": "1.13.0", "deepspeed": None}
    monkeypatch.setattr(environment, "_version", lambda name: found.get(name, "99.0"))
    monkeypatch.setattr(environment, "requires", lambda _: ["torch>=2.9", "deepspeed>=0.18.3"])
    checks = {check.name: check for check in environment._packages()}
    assert checks["torch"] == Check("torch", "problem", "1.13.0", "pip install 'torch>=2.9'")
    assert checks["deepspeed"] == Check("deepspeed", "problem", "not installed", "pip install 'deepspeed>=0.18.3'")
    assert checks["transformers"].status == "ok"


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("problem", 2)])
def test_the_command_leaves_with_2_only_for_a_problem(
    status: environment.Status, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "examine", lambda _: [Check("thing", status, "found", "do this")])
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor"])
    assert left.value.code == code
    assert capsys.readouterr().out.splitlines()[:2] == [f"{status:<8} thing  found", f"{'':<14}  -> do this"]
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out) == [
        {"name": "thing", "status": status, "found": "found", "advice": "do this"}
    ]


def test_the_file_is_plain_yaml() -> None:
    """One document, in the order in which people read it."""
    raw = yaml.safe_load(cluster_file(MACHINE, Told("2026-11-22")))
    assert list(raw) == ["gpu", "link", "host", "sources"]
