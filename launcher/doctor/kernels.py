"""What one rank computes and moves by itself: products, attention, memory, launches, copies, disk.

The same bodies run on CUDA and on a CPU; `Sizes` is all that differs. Products are the three of a linear layer
(h -> 4 h on n rows: forward, gradient of the input, gradient of the weight), since those are what a step consists of.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional

from launcher.doctor.clock import LONGEST_CALL_SECONDS, agreed, rate, sample, timed
from launcher.doctor.values import Sample
from launcher.units import MIB

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sizes:
    """How much is computed: enough to fill the device, little enough for two minutes in all."""

    rows: int
    """Tokens of a product."""
    widths: tuple[int, ...]
    """Widths of the products' input, ascending."""
    attention: tuple[int, int, int, int]
    """Samples, heads, length, width of a head."""
    vector_bytes: int
    """Tensors of the memory and link tests: far above any cache."""
    disk_bytes: int


SIZES = {
    "cuda": Sizes(8192, (512, 1024, 2048, 4096, 8192), (4, 16, 4096, 128), 1024 * MIB, 1024 * MIB),
    "cpu": Sizes(1024, (64, 128, 256, 512, 1024), (1, 4, 512, 64), 128 * MIB, 256 * MIB),
}


def products(device: torch.device, sizes: Sizes, precision: str) -> dict[int, Sample]:
    """FLOP/s by width; wider products are left out once one takes longer than a second."""
    found: dict[int, Sample] = {}
    for width in sizes.widths:
        shapes = ((sizes.rows, width), (width, 4 * width), (sizes.rows, 4 * width))
        inputs, weight, gradient = (torch.randn(shape, device=device, dtype=DTYPES[precision]) for shape in shapes)

        def work(x: torch.Tensor = inputs, w: torch.Tensor = weight, g: torch.Tensor = gradient) -> None:
            torch.mm(x, w)
            torch.mm(g, w.t())
            torch.mm(x.t(), g)

        flops = 3 * 2 * sizes.rows * width * 4 * width
        found[width] = rate(flops, timed(work, device))
        if agreed(int(flops * 4 / found[width].value > LONGEST_CALL_SECONDS)):
            break  # the next is twice as wide: four times the work
    return found


def attention(device: torch.device, sizes: Sizes, precision: str) -> Sample:
    """FLOP/s of the unmasked half, forward and backward: two and five products of T^2 d (FlashAttention-2, sec. 4.1)."""
    samples, heads, length, width = sizes.attention
    shape = (samples, heads, length, width)
    query, key, value = (
        torch.randn(shape, device=device, dtype=DTYPES[precision], requires_grad=True) for _ in range(3)
    )
    gradient = torch.randn(shape, device=device, dtype=DTYPES[precision])

    def work() -> None:
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, (query, key, value), gradient)

    half = 0.5
    return rate(half * 7 * 2 * samples * heads * length * length * width, timed(work, device))


def add(device: torch.device, sizes: Sizes) -> Sample:
    """Bytes/s of `c = a + b`: two read, one written."""
    first, second, out = (torch.ones(sizes.vector_bytes // 4, device=device) for _ in range(3))
    return rate(3 * sizes.vector_bytes, timed(lambda: torch.add(first, second, out=out), device))


def copy(device: torch.device, sizes: Sizes) -> Sample:
    """Bytes/s of a copy within the device: read and written."""
    source, target = (torch.ones(sizes.vector_bytes // 4, device=device) for _ in range(2))
    return rate(2 * sizes.vector_bytes, timed(lambda: target.copy_(source), device))


def launch(device: torch.device) -> Sample:
    """Seconds per tiny kernel: the host's share, since such a kernel runs in less than it takes to start."""
    small = torch.ones(4, device=device)
    kernels = 200

    def work() -> None:
        for _ in range(kernels):
            small.add_(1)

    return sample([seconds / kernels for seconds in timed(work, device)])


def host_copies(device: torch.device, sizes: Sizes) -> tuple[Sample, Sample]:
    """Bytes/s to the device and back; host memory is pinned where that means something."""
    host = torch.ones(sizes.vector_bytes // 4, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device)
    to_device = timed(lambda: there.copy_(host, non_blocking=True), device)
    to_host = timed(lambda: host.copy_(there, non_blocking=True), device)
    return rate(sizes.vector_bytes, to_device), rate(sizes.vector_bytes, to_host)


def disk(folder: Path, sizes: Sizes, repetitions: int = 2) -> tuple[Sample, Sample]:
    """Bytes/s written, until the disk has them, and read. Of one rank: the disk is shared. The file is removed."""
    content = os.urandom(min(sizes.disk_bytes, 16 * MIB))  # a disk that compresses gains nothing
    path = folder / f".fleetune-doctor-{os.getpid()}"
    written, read = [], []
    try:
        for _ in range(repetitions):
            written.append(_write(path, content, sizes.disk_bytes // len(content)))
            read.append(_read(path, len(content)))
    finally:
        path.unlink(missing_ok=True)
    return rate(sizes.disk_bytes, written), rate(sizes.disk_bytes, read)


def _write(path: Path, content: bytes, times: int) -> float:
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(times):
            file.write(content)
        os.fsync(file.fileno())
    return time.perf_counter() - started


def _read(path: Path, num_bytes: int) -> float:
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # a hint: some file systems ignore it
        started = time.perf_counter()
        while file.read(num_bytes):
            pass
    return time.perf_counter() - started
