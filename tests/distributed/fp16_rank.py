"""Rank of test_fp16: six fp16 steps of each ZeRO stage, two of them with a scale that overflows; prints JSON.

DeepSpeed says that its CPU accelerator has no fp16, though torch computes in it; only that answer is replaced here.
"""

from __future__ import annotations

import json
import os

import torch
import torch.distributed as dist

OVERFLOWING = (0, 3)


def main() -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update({**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: [torch.float32, torch.bfloat16, torch.float16]
    print(json.dumps({strategy: steps(strategy) for strategy in ("zero1", "zero2", "zero3")}))


def steps(strategy: str) -> list[list[object]]:
    """(was skipped, skipped so far, loss scale after it) of each step."""
    from launcher.plan import make_plan
    from launcher.task import task_of
    from launcher.train.zero import ZeroEngine
    from tests.unit.costs import cluster_of, laid_out, small_cost, spec_of
    from tests.unit.test_torch_engine import batch, model

    parallel = {"strategy": strategy, "micro_batch_size": 2}
    spec = spec_of(cluster={"gpus_per_node": 1}, parallel=parallel, training__global_batch_size=2)
    plan = laid_out(make_plan(spec, small_cost(), cluster_of(10**9)), precision="fp16")
    engine = ZeroEngine(plan, spec, model(), task_of(spec), torch.device("cpu"))
    seen: list[list[object]] = []
    for step in range(6):
        engine.accumulate(batch(step), 60.0 if step in OVERFLOWING else 1 / 22, is_last=True)
        norm = engine.step(1e-2, 0)
        seen.append([norm is None, engine.num_skipped, float(engine._engine.optimizer.loss_scale)])
    return seen


if __name__ == "__main__":
    main()
