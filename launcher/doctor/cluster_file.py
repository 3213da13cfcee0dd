"""What was measured, as a cluster file: every figure of `launcher.job.cluster`, each with how it came about.

Peaks of accelerators that we ship a file for are the data sheet's, so that MFU means what it means elsewhere; of others
the highest rate that was measured stands for the peak. What one node cannot tell is `assumed`, and its source says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from launcher.doctor.fit import width_law
from launcher.doctor.values import Machine, Sample
from launcher.job.cluster import Cluster, load_cluster
from launcher.job.load import decode
from launcher.units import GIB

DATA_SHEETS = {
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100-80",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "Tesla V100-SXM2-32GB": "v100-32",
    "AMD Instinct MI300X": "mi300x",
}
"""As torch names the device, and nothing like it: an H100 PCIe is another part than an H100 SXM."""
FAST = 1.5
"""A half precision that is this much faster than fp32 has units of its own."""
TEN_GIGABIT = 1.25
"""GB/s of the plainest network of a cluster, assumed where neither option nor data sheet says more."""


@dataclass(frozen=True)
class Told:
    """What the user says that no measurement on one node can find."""

    date: str
    inter_node_gb_per_s: float | None = None
    price_per_gpu_hour: float | None = None


def cluster_file(machine: Machine, told: Told) -> str:
    """YAML text that `load_cluster` reads; raises `SpecError` when a measured figure is absurd."""
    facts = _Facts(machine, told)
    raw = facts.raw()
    decode(Cluster, raw, prefix="measured: ")
    head = f"# {machine.name}: measured on {told.date} by fleetune doctor on {machine.num_ranks} ranks of {machine.threads} threads."
    notes = [f"# {note}" for note in machine.notes]
    return "\n".join([head, *notes, yaml.safe_dump(raw, sort_keys=False, width=10_000, allow_unicode=True)])


class _Facts:
    """Figures and sources, filled section by section."""

    def __init__(self, machine: Machine, told: Told) -> None:
        self._machine, self._told = machine, told
        sheet = DATA_SHEETS.get(machine.name)
        self._sheet_name = f"{sheet}.yaml"
        self._sheet = load_cluster(sheet) if sheet else None
        self._figures: dict[str, dict[str, Any]] = {
            "gpu": {"name": machine.name, "kind": machine.kind},
            "link": {},
            "host": {},
        }
        self._sources: dict[str, str] = {}

    def raw(self) -> dict[str, Any]:
        self._memory()
        self._arithmetic()
        self._traffic()
        self._links()
        self._host()
        raw: dict[str, Any] = dict(self._figures)
        if self._told.price_per_gpu_hour is not None:
            raw["price_per_gpu_hour"] = self._told.price_per_gpu_hour
            self._sources["price_per_gpu_hour"] = "given to fleetune doctor"
        return {**raw, "sources": self._sources}

    def _set(self, key: str, value: Any, source: str) -> None:
        section, _, name = key.partition(".")
        self._figures[section][name] = _three_digits(value) if isinstance(value, float) else value
        self._sources[key] = source

    def _measured(self, what: str, sample: Sample | None = None) -> str:
        words = f", {sample.words()}" if sample else ""
        return f"measured on {self._told.date} with fleetune doctor, torch {self._machine.torch_version}{words}: {what}"

    def _memory(self) -> None:
        machine = self._machine
        if machine.device_memory_bytes is None:
            self._set("gpu.memory_gib", "machine", "RAM of the machine that plans, by sysconf, shared by its ranks")
            outside = "resident memory of a rank that has imported torch, transformers and deepspeed"
        else:
            source = self._measured("memory of the device as torch reports it")
            self._set("gpu.memory_gib", machine.device_memory_bytes / GIB, source)
            outside = "memory used on the device outside torch's allocator, after every kernel below had run"
        self._set("gpu.context_gib", machine.context_bytes / GIB, self._measured(outside))

    def _arithmetic(self) -> None:
        machine = self._machine
        best = {precision: max(s.value for s in widths.values()) for precision, widths in machine.products.items()}
        fast = {precision: best[precision] > FAST * best["fp32"] for precision in ("bf16", "fp16")}
        for precision, is_fast in fast.items():
            times = best[precision] / best["fp32"]
            self._set(f"gpu.{precision}", is_fast, self._measured(f"products ran at {times:.3g} times the fp32 rate"))
        half = "fp16" if fast["fp16"] and not fast["bf16"] else "bf16"
        main = half if fast[half] else "fp32"
        reached, half_width = width_law({width: sample.value for width, sample in machine.products[main].items()})
        self._peak("gpu.peak_bf16_tflops", best[half], half, reached if main == half else 0.0)
        self._peak("gpu.peak_fp32_tflops", best["fp32"], "fp32", reached if main == "fp32" else 0.0)
        peak = 1e12 * self._figures["gpu"]["peak_fp32_tflops" if main == "fp32" else "peak_bf16_tflops"]
        self._shares(main, reached, half_width, peak)

    def _peak(self, key: str, best: float, precision: str, reached: float) -> None:
        """The data sheet's where we have it, else the highest rate measured, or what the width law says lies above."""
        if self._sheet is not None:
            name = key.partition(".")[2]
            self._set(key, getattr(self._sheet.gpu, name), f"data sheet, as in {self._sheet_name}")
            return
        what = f"the highest rate of products in {precision} stands for the peak, so MFU is against what was reached"
        self._set(key, max(best, reached) / 1e12, self._measured(what))

    def _shares(self, main: str, reached: float, half_width: float, peak: float) -> None:
        widths = self._machine.products[main]
        widest = widths[max(widths)]
        what = f"products of a linear layer in {main}, widths {min(widths)} to {max(widths)}, extended to great width"
        self._set("gpu.matmul_share", min(1.0, reached / peak), self._measured(what, widest))
        self._set("gpu.matmul_half_width", float(half_width), self._measured("the same products", widest))
        kernel = self._machine.attention[main]
        what = f"torch's scaled_dot_product_attention in {main}, causal, forward and backward"
        self._set("gpu.attention_share", min(1.0, kernel.value / peak), self._measured(what, kernel))

    def _traffic(self) -> None:
        machine = self._machine
        if self._sheet is not None:
            fastest = self._sheet.gpu.memory_gb_per_s * 1e9
            self._set("gpu.memory_gb_per_s", fastest / 1e9, f"data sheet, as in {self._sheet_name}")
        else:
            sample = max(machine.add, machine.copy, key=lambda s: s.value)
            fastest = sample.value
            self._set("gpu.memory_gb_per_s", fastest / 1e9, self._measured("the faster of copy and addition", sample))
        share = min(1.0, machine.add.value / fastest)
        self._set("gpu.memory_share", share, self._measured("addition of two large tensors", machine.add))
        if machine.overlap is not None:
            self._set(
                "gpu.overlap_share",
                machine.overlap.value,
                self._measured("all-reduce beside products", machine.overlap),
            )
        else:
            assumed = self._sheet.gpu.overlap_share if self._sheet else 0.0
            self._set("gpu.overlap_share", assumed, self._assumed("gpu.overlap_share", "nothing is hidden"))
        launch = machine.launch
        self._set("gpu.launch_us", launch.value * 1e6, self._measured("tiny kernels one after another", launch))

    def _assumed(self, key: str, otherwise: str) -> str:
        """Why a figure that could not be measured has its value."""
        if self._sheet is not None:
            return f"assumed, as in {self._sheet_name}: {self._sheet.sources[key]}"
        return f"assumed: {otherwise}; one rank was measured"

    def _links(self) -> None:
        machine, sheet = self._machine, self._sheet
        if machine.gather is None:
            intra = sheet.link.intra_node_gb_per_s if sheet else machine.to_host.value / 1e9
            self._set(
                "link.intra_node_gb_per_s",
                intra,
                self._assumed("link.intra_node_gb_per_s", "the rate of copies to the host"),
            )
            share = sheet.link.link_share if sheet else 1.0
            self._set("link.link_share", share, self._assumed("link.link_share", "the figures are of what is reached"))
        else:
            reached = machine.gather.value / 1e9
            words = self._measured(f"all-gather over {machine.num_ranks} ranks of this node", machine.gather)
            intra = max(reached, sheet.link.intra_node_gb_per_s) if sheet else reached
            named = f"data sheet, as in {self._sheet_name}" if sheet else words
            self._set("link.intra_node_gb_per_s", intra, named)
            of = "; taken for the links between nodes too"
            self._set("link.link_share", reached / intra, words + of if sheet else f"the figure above was reached{of}")
        self._inter_node()
        if machine.latency is not None:
            words = self._measured("all-reduce of one number", machine.latency)
            self._set("link.latency_us", machine.latency.value * 1e6, words)
        else:
            assumed = sheet.link.latency_us if sheet else 200.0 if machine.kind == "cpu" else 30.0
            self._set("link.latency_us", assumed, self._assumed("link.latency_us", "usual of such ranks"))

    def _inter_node(self) -> None:
        key, told = "link.inter_node_gb_per_s", self._told.inter_node_gb_per_s
        if told is not None:
            self._set(key, told, "given to fleetune doctor, which measures one node")
        elif self._sheet is not None:
            self._set(key, self._sheet.link.inter_node_gb_per_s, self._assumed(key, ""))
        else:
            self._set(key, TEN_GIGABIT, "assumed: 10 Gbit Ethernet per rank; one node was measured, put in your own")

    def _host(self) -> None:
        machine = self._machine
        if machine.kind == "cpu":
            self._set("host.memory_gib", "machine", "RAM of the machine that plans, by sysconf")
        else:
            self._set("host.memory_gib", machine.host_memory_bytes / GIB, self._measured("RAM by sysconf"))
        added = machine.host_add
        what = f"addition of large tensors in host memory, {machine.num_ranks} x {machine.threads} threads"
        self._set("host.memory_gb_per_s", added.value / 1e9, self._measured(what, added))
        slower = min(machine.to_device, machine.to_host, key=lambda s: s.value)
        what = "the slower direction of copies between host and device, all ranks at once"
        self._set("host.device_gb_per_s", slower.value / 1e9, self._measured(what, slower))
        written = machine.disk_write
        self._set("host.disk_gb_per_s", written.value / 1e9, self._measured("one file, written until synced", written))
        if machine.nvme_bytes is not None and machine.nvme is not None:
            self._set("host.nvme_gib", machine.nvme_bytes / GIB, self._measured("free room in the folder given"))
            words = self._measured("the slower of writing and reading one file there", machine.nvme)
            self._set("host.nvme_gb_per_s", machine.nvme.value / 1e9, words)


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")
