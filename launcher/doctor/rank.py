"""Body of each measuring rank: `torchrun ... -m launcher.doctor.rank REQUEST.json`; rank 0 writes the answer.

All ranks of the node measure the same at the same time, since that is how they will work: they share memory, links to
the host, and on a CPU the cores. The request names the kind of device, the cores of a rank, sizes, a folder on the disk
to be measured and the file for the answer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.doctor import kernels, links
from launcher.doctor.clock import agreed
from launcher.doctor.kernels import SIZES, Sizes
from launcher.doctor.values import Machine, Sample
from launcher.job.cluster import machine_memory_bytes
from launcher.units import GIB


def main(argv: list[str]) -> None:
    request = json.loads(Path(argv[0]).read_text())
    context_bytes = _libraries_bytes() if request["kind"] == "cpu" else 0
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")  # as in train/zero.py
    dist.init_process_group("gloo" if request["kind"] == "cpu" else "cpu:gloo,cuda:nccl")
    device = torch.device("cpu" if request["kind"] == "cpu" else f"cuda:{dist.get_rank()}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False  # as the cluster file's fp32 is meant
    sizes = Sizes(**request["sizes"]) if request["sizes"] else SIZES[request["kind"]]
    found = _measure(device, sizes, request)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        machine = _machine(request, device, merged(everyone), context_bytes or _held_outside(device))
        Path(request["answer"]).write_text(json.dumps(machine.to_json()))
    dist.barrier()
    dist.destroy_process_group()


def _measure(device: torch.device, sizes: Sizes, request: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"products": {}, "attention": {}}
    for precision in kernels.DTYPES:
        _say(f"products in {precision}")
        found["products"][precision] = kernels.products(device, sizes, precision)
        if _is_fast(found["products"], precision):
            _say(f"attention in {precision}")
            found["attention"][precision] = kernels.attention(device, sizes, precision)
    _say("memory")
    found["add"], found["copy"] = kernels.add(device, sizes), kernels.copy(device, sizes)
    found["launch"] = kernels.launch(device)
    _say("host memory and copies")
    found["to_device"], found["to_host"] = kernels.host_copies(device, sizes)
    found["host_add"] = kernels.add(torch.device("cpu"), SIZES["cpu"] if device.type == "cuda" else sizes)
    if dist.get_world_size() > 1:
        _say("collectives")
        found["gather"], found["latency"] = links.gather(device, sizes), links.latency(device)
        found["overlap"] = links.overlap(device, sizes)
    _say("disk")
    if dist.get_rank() == 0:
        found |= _disks(sizes, request["disk"], request["nvme"])
    dist.barrier()
    return found


def _disks(sizes: Sizes, disk_folder: str, nvme_folder: str | None) -> dict[str, Any]:
    """Rank 0's: the disks are shared."""
    write, read = kernels.disk(Path(disk_folder), sizes)
    found: dict[str, Any] = {"disk_write": write, "disk_read": read}
    if nvme_folder:
        found["nvme_bytes"] = shutil.disk_usage(nvme_folder).free
        found["nvme"] = min(kernels.disk(Path(nvme_folder), sizes), key=lambda sample: sample.value)
    return found


def _is_fast(products: dict[str, dict[int, Sample]], precision: str) -> bool:
    """Attention in a precision that is emulated would take minutes and tell nothing; all ranks must decide alike."""
    reached = max(sample.value for sample in products[precision].values())
    slow = reached < max(sample.value for sample in products["fp32"].values()) / 4
    return not agreed(int(slow))


def merged(everyone: list[dict[str, Any]]) -> dict[str, Any]:
    """One node's figures from its ranks': the median rank; the sum for the host's memory; the disk is rank 0's."""

    def of(
        pick: Callable[[dict[str, Any]], Sample], join: Callable[[list[float]], float] = statistics.median
    ) -> Sample:
        samples = [pick(found) for found in everyone]
        return dataclasses.replace(
            samples[0], value=join([s.value for s in samples]), spread=max(s.spread for s in samples)
        )

    first = everyone[0]
    whole: dict[str, Any] = {
        "products": {
            precision: {
                width: of(lambda f, p=precision, w=width: f["products"][p][w])  # type: ignore[misc]
                for width in widths
            }
            for precision, widths in first["products"].items()
        },
        "attention": {
            precision: of(lambda f, p=precision: f["attention"][p])  # type: ignore[misc]
            for precision in first["attention"]
        },
        "host_add": of(lambda found: found["host_add"], sum),
    }
    for key in first.keys() - whole.keys():
        alone = key.startswith(("disk_", "nvme"))
        whole[key] = first[key] if alone else of(lambda found, k=key: found[k])  # type: ignore[misc]
    return whole


def _machine(request: dict[str, Any], device: torch.device, found: dict[str, Any], context_bytes: int) -> Machine:
    on_cuda = device.type == "cuda"
    return Machine(
        name=torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        kind=device.type,
        num_ranks=dist.get_world_size(),
        threads=request["threads"],
        torch_version=torch.__version__,
        cores=len(os.sched_getaffinity(0)),
        host_memory_bytes=machine_memory_bytes(),
        device_memory_bytes=torch.cuda.get_device_properties(device).total_memory if on_cuda else None,
        context_bytes=context_bytes,
        notes=_notes(device),
        **found,
    )


def _libraries_bytes() -> int:
    """Resident memory of a rank that has imported what a rank imports and holds no tensor yet."""
    import deepspeed  # noqa: F401
    import psutil
    from transformers import AutoModelForCausalLM  # noqa: F401

    return int(psutil.Process().memory_info().rss)


def _held_outside(device: torch.device) -> int:
    """CUDA context, kernels' images and communicators: what is used of the device and is not the allocator's."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device))


def _notes(device: torch.device) -> list[str]:
    if device.type == "cuda" and _held_outside(device) > 4 * GIB:
        return ["another process seems to use this device: its memory is counted in the context"]
    return []


def _cpu_name() -> str:
    """The model as Linux names it, else the architecture."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _say(what: str) -> None:
    if dist.get_rank() == 0:
        sys.stderr.write(f"measuring {what}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
