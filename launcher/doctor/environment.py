"""Looks at what a run needs of this machine, one check at a time: ok, a warning, or a problem with what to do about it.

Nothing is changed and nothing is compiled; torch is imported, the other libraries are asked for their versions only.
"""

from __future__ import annotations

import platform
import resource
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from launcher.job.cluster import machine_memory_bytes
from launcher.job.resources import cache_dir
from launcher.spawn import free_port
from launcher.units import GIB, show_bytes

Status = Literal["ok", "warning", "problem"]
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")
OPTIONAL = {"peft": "needed for method: lora"}
SMALL_SHARED_MEMORY = 1 * GIB
"""NCCL and gloo pass messages of local ranks through /dev/shm: a container's usual 64 MB end in a bus error."""
SMALL_DISK = 20 * GIB
"""A few checkpoints of a model of one billion parameters, 16 bytes each."""
DEFAULT_PORT = 29500
"""torchrun's own, taken by a second job that names none; `fleetune launch` picks a free one."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    found: str
    advice: str = ""
    """What to do; empty when all is well."""


def examine(folder: Path) -> list[Check]:
    """The whole report; `folder` is where a run would write."""
    return [
        *_python(),
        *_packages(),
        *_accelerators(),
        *_compilers(),
        *_memory_and_disk(folder),
        *_network(),
        *_slurm(),
    ]


def _python() -> Iterator[Check]:
    """Too old a one could not have imported this."""
    yield Check("python", "ok", f"{platform.python_version()}, {platform.platform()}")


def _packages() -> Iterator[Check]:
    """Versions against the lower bounds of our own package's metadata."""
    from packaging.requirements import Requirement

    try:
        needed = {need.name: need.specifier for need in map(Requirement, requires("fleetune") or [])}
    except PackageNotFoundError:  # a checkout that was never installed
        needed = {}
    for name in PACKAGES:
        found = _version(name)
        if found is None:
            yield Check(name, "problem", "not installed", f"pip install '{name}{needed.get(name, '')}'")
        elif name in needed and not needed[name].contains(found, prereleases=True):
            yield Check(name, "problem", found, f"pip install '{name}{needed[name]}'")
        else:
            yield Check(name, "ok", found)
    for name, purpose in OPTIONAL.items():
        found = _version(name)
        advice = "" if found else f"{purpose}: pip install {name}"
        yield Check(name, "ok" if found else "warning", found or "not installed", advice)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _accelerators() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a build for another CUDA, a library that is missing
        yield Check("accelerator", "problem", f"torch cannot be imported ({error})", "install torch again")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
        yield Check("accelerator", "ok", f"{devices} seen, torch built for {build}, NCCL {nccl}")
        yield from (_device(torch, number) for number in range(devices))
    elif torch.version.cuda or torch.version.hip:
        yield Check("accelerator", "warning", f"none seen, torch built for {build}", "see nvidia-smi and the driver")
    elif shutil.which("nvidia-smi") or shutil.which("rocm-smi"):
        advice = "install a torch built for them: https://pytorch.org/get-started"
        yield Check("accelerator", "problem", "torch is a CPU build, yet the machine has accelerators", advice)
    else:
        yield Check("accelerator", "warning", "none, torch is a CPU build", "well enough for trials: cluster cpu")


def _device(torch: Any, number: int) -> Check:
    free, total = torch.cuda.mem_get_info(number)
    found = f"{torch.cuda.get_device_name(number)}, {show_bytes(free)} free of {show_bytes(total)}"
    if free < 0.9 * total:
        return Check(f"device {number}", "warning", found, "another process uses it: see nvidia-smi")
    return Check(f"device {number}", "ok", found)


def _compilers() -> Iterator[Check]:
    """DeepSpeed compiles its ops at first use: CPU Adam for offload, async I/O for NVMe, fused kernels with nvcc."""
    compiler = shutil.which("c++") or shutil.which("g++")
    advice = "needed by offload to the host: install g++ (build-essential)"
    yield Check("C++ compiler", "ok" if compiler else "warning", compiler or "not found", "" if compiler else advice)
    ninja = shutil.which("ninja")
    yield Check(
        "ninja",
        "ok" if ninja else "warning",
        ninja or "not found",
        "" if ninja else "needed by offload to the host: pip install ninja",
    )
    aio = Path("/usr/include/libaio.h").is_file()
    yield Check(
        "libaio",
        "ok" if aio else "warning",
        "found" if aio else "libaio.h not found",
        "" if aio else "needed by offload to NVMe: install libaio-dev",
    )
    nvcc = shutil.which("nvcc")
    needed = "needed only by fused CUDA kernels and CPU Adam on CUDA: install the toolkit of torch's CUDA version"
    yield Check("nvcc", "ok" if nvcc else "warning", nvcc or "not found", "" if nvcc else needed)


def _memory_and_disk(folder: Path) -> Iterator[Check]:
    import psutil

    free = psutil.virtual_memory().available
    found = f"{show_bytes(free)} free of {show_bytes(machine_memory_bytes())}"
    yield Check("memory", "ok" if free > 2 * GIB else "warning", found, "" if free > 2 * GIB else "end other programs")
    for name, place in (("disk", folder), ("cache", cache_dir())):
        yield _disk(name, place)
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        small = size < SMALL_SHARED_MEMORY
        advice = "ranks of a node talk through it: docker run --shm-size=8g, or --ipc=host" if small else ""
        yield Check("shared memory", "warning" if small else "ok", show_bytes(size), advice)


def _disk(name: str, folder: Path) -> Check:
    """Of the nearest folder that is there already."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    found = f"{show_bytes(free)} free at {place}"
    if name == "disk" and free < SMALL_DISK:
        return Check(name, "warning", found, "checkpoints take up to 16 bytes per parameter: choose another output_dir")
    return Check(name, "ok", found)


def _network() -> Iterator[Check]:
    yield Check("ports", "ok", f"{free_port()} can be opened")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", DEFAULT_PORT))
        except OSError:
            advice = "another job runs here: give --master-port to a bare torchrun; fleetune launch picks a free one"
            yield Check(f"port {DEFAULT_PORT}", "warning", "taken", advice)
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        yield Check("host name", "warning", f"{name} does not resolve", "ranks of other nodes cannot find this one")
        return
    if address.startswith("127."):
        advice = "on many CPU nodes set GLOO_SOCKET_IFNAME in the cluster file's slurm.setup"
        yield Check("host name", "ok", f"{name} is {address}, this machine only; {advice}")
    else:
        yield Check("host name", "ok", f"{name} is {address}")
    yield from _infiniband()


def _infiniband() -> Iterator[Check]:
    devices = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if not devices:
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limited = soft != resource.RLIM_INFINITY
    advice = "RDMA must pin memory: set `ulimit -l unlimited` (Slurm: PropagateResourceLimitsExcept=MEMLOCK)"
    yield Check("InfiniBand", "warning" if limited else "ok", ", ".join(devices), advice if limited else "")


def _slurm() -> Iterator[Check]:
    sbatch = shutil.which("sbatch")
    yield Check("Slurm", "ok", sbatch or "no sbatch on the PATH: jobs are launched on this machine")
