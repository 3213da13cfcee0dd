"""Body of the ranks of the load benchmark: build a model and hand it out once; rank 0 watches the RAM of them all.

    _load_rank MODEL STRATEGY WAY

Prints one line of JSON on rank 0: bytes above what the ranks held before, at the peak and at the end.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from launcher.cost.cache import cached_cost
from launcher.job import JobSpec, load_cluster, parse_spec
from launcher.plan import Plan, make_plan
from launcher.task import Task, task_of
from launcher.train.agree import decide_on_first
from launcher.train.engine import make_engine
from launcher.train.model import build_model, whole_model
from launcher.train.world import World, start_process_group

OURS = "fleetune"
_EVERY_SECONDS = 0.01
_DATA: Any = SimpleNamespace(vocab_size=100, pad_id=1, eos_id=2)
"""All that building a model asks of prepared data."""


def held_bytes(pids: list[int]) -> int:
    """Pages that are nobody's file: what is mapped of one, the system can drop and read again."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


class Watch(threading.Thread):
    """The most that some processes hold together, looked at again and again."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self.pids, self.before = pids, held_bytes(pids)
        self.peak, self.is_over = self.before, threading.Event()

    def run(self) -> None:
        while not self.is_over.is_set():
            self.peak = max(self.peak, held_bytes(self.pids))
            time.sleep(_EVERY_SECONDS)

    def result(self) -> dict[str, int]:
        self.is_over.set()
        self.join()
        now = held_bytes(self.pids)
        return {"peak": max(self.peak, now) - self.before, "end": now - self.before}


def spec_of(model: str, strategy: str, num_ranks: int) -> JobSpec:
    return parse_spec(
        {
            "output_dir": f"{model}/run",
            "model": {"path": model},
            "task": "causal_lm",
            "data": {"train": "none.txt"},
            "training": {"seq_len": 16, "global_batch_size": num_ranks, "max_steps": 1},
            "parallel": {"strategy": strategy, "recompute": "none", "precision": "fp32"},
            "cluster": {"name": "cpu", "gpus_per_node": num_ranks},
        }
    )


def _handed_out(plan: Plan, spec: JobSpec, task: Task, model: Any) -> Any:
    """The model as an engine wants it, before DeepSpeed adds the state of its optimiser."""
    device = torch.device("cpu")
    if plan.engine != "deepspeed":
        return make_engine(plan, spec, model, task, device)
    from launcher.emit import deepspeed_config, load_preset
    from launcher.train.zero import placed

    return placed(model, plan, spec, device, deepspeed_config(plan, spec, load_preset(spec, plan.chosen.layout)))


def main() -> None:
    model, strategy, way = sys.argv[1:]
    world = World.detect(os.environ)
    start_process_group(world, torch.device("cpu"))
    spec = spec_of(model, strategy, world.num_ranks)
    plan = decide_on_first(lambda: make_plan(spec, cached_cost(spec), load_cluster("cpu")))
    if plan.engine == "deepspeed":
        import launcher.train.zero
    else:
        import launcher.train.torch_engine  # noqa: F401 - imported before the watch begins
    task = task_of(spec)
    pids: list[Any] = [None] * world.num_ranks
    dist.all_gather_object(pids, os.getpid())
    watch = Watch(pids) if world.is_first else None
    if watch:
        watch.start()
    dist.barrier()
    built = build_model(spec, task, _DATA).model if way == OURS else whole_model(spec, task, _DATA)[0]
    handed_out = _handed_out(plan, spec, task, built)
    dist.barrier()
    if watch:
        print(json.dumps(watch.result()), flush=True)  # noqa: T201
    dist.barrier()
    del handed_out
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
