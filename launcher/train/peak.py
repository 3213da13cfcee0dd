"""The most memory that any rank held, of its device and of the host, for the records of a run.

A CPU has no account of what is allocated on it as a device, and none is made up.
"""

from __future__ import annotations

import resource

import torch
import torch.distributed as dist


def device_peaks(device: torch.device) -> dict[str, int]:
    """Bytes, largest over the ranks, since the process began; {} on a CPU. A collective on CUDA: all ranks call it.

    peak_allocated_bytes and peak_reserved_bytes are the caching allocator's, live tensors and what it keeps of the
    driver; context_bytes is what the device holds outside it now: driver, kernels, communicators, and any other
    process that uses the device.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    found = [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), max(0, outside)]
    largest = torch.tensor(found, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    names = ("peak_allocated_bytes", "peak_reserved_bytes", "context_bytes")
    return dict(zip(names, largest.tolist(), strict=True))


def host_peak(device: torch.device) -> dict[str, int]:
    """Bytes of host memory that the largest rank's process has held at most. A collective: all ranks call it."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    largest = torch.tensor(most, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return {"peak_host_bytes": int(largest)}
