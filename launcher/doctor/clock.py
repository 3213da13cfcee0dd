"""Timing of work on one device, in step with the other ranks of the node."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from launcher.doctor.values import Sample

REPETITIONS = 5
REPETITION_SECONDS = 0.05
"""Work is repeated until a repetition takes this long, so that the clock's own error is below a per mille."""
LONGEST_CALL_SECONDS = 1.0
"""A call that takes longer is timed once: precisions that the hardware emulates are up to a hundred times slower."""
MOST_CALLS = 1000


def synchronize(device: torch.device) -> None:
    """Wait for what was started; a CPU has finished when the call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of one call of `work`, one number per repetition; every rank of the process group must call this."""
    work()  # kernels are loaded and workspaces made
    synchronize(device)
    first = _slowest_rank(_seconds(work, device, 1))
    if first > LONGEST_CALL_SECONDS:
        return [first]
    calls = max(1, min(MOST_CALLS, int(REPETITION_SECONDS / max(first, 1e-7))))
    return [_seconds(work, device, calls) for _ in range(REPETITIONS)]


def _seconds(work: Callable[[], object], device: torch.device, calls: int) -> float:
    dist.barrier()
    started = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def _slowest_rank(seconds: float) -> float:
    """So that all ranks decide alike how often to call."""
    slowest = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def sample(values: list[float]) -> Sample:
    middle = statistics.median(values)
    return Sample(middle, (max(values) - min(values)) / middle if middle else 0.0, len(values))


def rate(amount: float, seconds: list[float]) -> Sample:
    """`amount` per second: FLOPs or bytes of one call over its time."""
    return sample([amount / second for second in seconds])


def agreed(number: int) -> int:
    """Rank 0's word, on every rank."""
    told = torch.tensor([number])
    dist.broadcast(told, src=0)
    return int(told)
