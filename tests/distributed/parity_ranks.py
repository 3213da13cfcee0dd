"""Body of the ranks of test_parity: train every job named on the command line, one after the other."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from launcher.cost.cache import cached_cost
from launcher.job import load_cluster, load_spec
from launcher.plan import make_plan
from launcher.train.agree import decide_on_first
from launcher.train.loop import train
from launcher.train.preempt import StopFlag
from launcher.train.world import World, start_process_group


def main() -> None:
    world = World.detect(os.environ)
    device = torch.device("cpu")
    start_process_group(world, device)
    for path in sys.argv[1:]:
        spec = load_spec(Path(path))
        plan = decide_on_first(lambda: make_plan(spec, cached_cost(spec), load_cluster("cpu")))  # noqa: B023
        train(spec, plan, world, device, StopFlag())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
