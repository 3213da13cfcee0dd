"""Body of the ranks of the parity tests: train every job named on the command line, one after the other."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from launcher.cost.cache import cached_cost
from launcher.job import JobSpec, load_cluster, load_spec
from launcher.plan import Plan, make_plan
from launcher.train.agree import decide_on_first
from launcher.train.loop import train
from launcher.train.preempt import StopFlag
from launcher.train.world import World, start_process_group


def planned(spec: JobSpec) -> Plan:
    """The planner's plan with the layout that the spec asks for in every key."""
    asked = {key: value for key, value in spec.parallel.model_dump().items() if value not in ("auto", None)}
    base = {"hsdp": "fsdp", "hpz": "zero3"}.get(asked["strategy"], asked["strategy"])
    parallel = {"strategy": base, "micro_batch_size": asked["micro_batch_size"]}
    simple = spec.model_copy(update={"parallel": spec.parallel.__class__(**parallel)})
    plan = make_plan(simple, cached_cost(spec), load_cluster("cpu"))
    layout = replace(plan.chosen.layout, **asked)
    return replace(plan, chosen=replace(plan.chosen, layout=layout))


def main() -> None:
    world = World.detect(os.environ)
    device = torch.device("cpu")
    start_process_group(world, device)
    for path in sys.argv[1:]:
        spec = load_spec(Path(path))
        plan = decide_on_first(lambda: planned(spec))  # noqa: B023
        train(spec, plan, world, device, StopFlag())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
