"""One rank alone in this process, for benchmarks that need a process group and nobody to meet."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from launcher.train.world import World, start_process_group, tell_libraries


@contextmanager
def alone() -> Iterator[None]:
    """A process group of one, on the CPU."""
    warnings.simplefilter("ignore")
    world = World("python", rank=0, local_rank=0, num_ranks=1, ranks_per_node=1)
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    told = {**os.environ, **names}
    tell_libraries(world, told)
    os.environ.update(told)
    start_process_group(world, torch.device("cpu"))
    try:
        yield
    finally:
        dist.destroy_process_group()
