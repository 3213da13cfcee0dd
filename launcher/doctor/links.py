"""What ranks of one node do together: a large all-gather, a small all-reduce, and a collective beside products."""

from __future__ import annotations

import torch
import torch.distributed as dist

from launcher.doctor.clock import agreed, rate, sample, timed
from launcher.doctor.kernels import Sizes
from launcher.doctor.values import Sample


def gather(device: torch.device, sizes: Sizes) -> Sample:
    """Bytes/s that one rank of a ring sends: (N-1)/N of the gathered vector (nccl-tests' bus bandwidth)."""
    ranks = dist.get_world_size()
    whole = torch.empty(sizes.vector_bytes // 4 // ranks * ranks, device=device)
    part = torch.ones(whole.numel() // ranks, device=device)
    sent = 4 * whole.numel() * (ranks - 1) / ranks
    return rate(sent, timed(lambda: dist.all_gather_into_tensor(whole, part), device))


def latency(device: torch.device) -> Sample:
    """Seconds of an all-reduce of one number."""
    number = torch.ones(1, device=device)
    return sample(timed(lambda: dist.all_reduce(number), device))


def overlap(device: torch.device, sizes: Sizes) -> Sample:
    """Share of an all-reduce's time that hides behind products of about the same length, 0 to 1."""
    vector = torch.ones(sizes.vector_bytes // 16, device=device)
    left, right = (torch.randn(sizes.rows, sizes.rows, device=device) for _ in range(2))
    reduce_seconds = sample(timed(lambda: dist.all_reduce(vector), device)).value
    product_seconds = sample(timed(lambda: torch.mm(left, right), device)).value
    times = agreed(max(1, round(reduce_seconds / product_seconds)))

    def both() -> None:
        pending = dist.all_reduce(vector, async_op=True)
        for _ in range(times):
            torch.mm(left, right)
        assert pending is not None
        pending.wait()

    alone = reduce_seconds + times * product_seconds
    hidden = [(alone - together) / reduce_seconds for together in timed(both, device)]
    return sample([min(1.0, max(0.0, share)) for share in hidden])
