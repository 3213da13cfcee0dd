"""Body of the ranks of test_state_bytes: build every job's engine, take one step, write down what it really holds.

Takes a folder per number of ranks. Imports once and forks the ranks of each: imports are most of the time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from launcher.cost.architecture import head_class, model_config
from launcher.cost.trainable import apply_method
from launcher.job import JobSpec, load_spec
from launcher.spawn import free_port
from launcher.task import task_of
from launcher.train.engine import make_engine
from launcher.train.world import World, start_process_group
from tests.distributed.parity_ranks import planned


def main() -> int:
    """The first exit code of a rank that is not 0."""
    import deepspeed  # noqa: F401 - here, and not once in every rank

    for argument in sys.argv[1:]:
        folder = Path(argument)
        num_ranks, port = int(folder.name), free_port()
        ranks = [
            multiprocessing.get_context("fork").Process(target=run, args=(folder, rank, num_ranks, port))
            for rank in range(num_ranks)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if failed := [rank.exitcode for rank in ranks if rank.exitcode]:
            return abs(failed[0] or 1)
    return 0


def run(folder: Path, rank: int, num_ranks: int, port: int) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ.update({name: str(value) for name, value in {**names, "MASTER_PORT": port}.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    start_process_group(World.detect(os.environ), torch.device("cpu"))
    # hpz last: DeepSpeed keeps its groups for the whole process, and would make secondary copies for zero3 as well
    for path in sorted(folder.glob("*.yaml"), key=lambda path: ("hpz" in path.name, path.name)):
        held = held_bytes(load_spec(path), num_ranks)
        path.with_suffix(f".{rank}.json").write_text(json.dumps(held))
    torch.distributed.destroy_process_group()


def held_bytes(spec: JobSpec, num_ranks: int) -> dict[str, int]:
    """Bytes of the storages behind parameters and gradients after a backward pass, and behind the state after a step."""
    task = task_of(spec)
    config = model_config(spec, None, task.config_overrides)
    torch.manual_seed(spec.seed)
    model = head_class(task.auto_class).from_config(config, dtype=torch.float32, trust_remote_code=False).train()
    engine: Any = make_engine(planned(spec), spec, apply_method(model, spec.method), task, torch.device("cpu"))
    row = {"input_ids": list(range(3, 3 + spec.training.seq_len)), "label": 1, "sample": 0}
    batch = task.collate([row], 0)
    engine.accumulate(batch, 1.0, is_last=True)
    look = zero_state if hasattr(engine, "_engine") else torch_state
    before = look(engine)
    engine.step(1e-3, 0)
    after = look(engine)
    engine.close()
    return {**before, **{name: after[name] for name in ("optimiser", "persistent parameters") if name in after}}


def torch_state(engine: Any) -> dict[str, int]:
    params = list(engine._model.parameters())
    return {
        "parameters": size(params),
        "gradients": size(p.grad for p in params if p.grad is not None),
        "optimiser": size(
            value
            for optimizer in engine._update.optimizers
            for state in optimizer.state.values()
            for value in state.values()
        ),
    }


def zero_state(engine: Any) -> dict[str, int]:
    optimizer, params = engine._engine.optimizer, list(engine._engine.module.parameters())
    state = size(value for kept in optimizer.optimizer.state.values() for value in kept.values())
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return {
            "parameters": size(params),
            "fp32 masters": size(optimizer.single_partition_of_fp32_groups),
            "optimiser": state,
        }
    return {
        "parameters": size(p.ds_tensor for p in params),
        "persistent parameters": size(p.data for p in params if p.ds_persist),
        "fp32 masters": size(optimizer.fp32_partitioned_groups_flat),
        "gradients": size([optimizer.grad_partitions_flat_buffer]),
        "reduction bucket": size(bucket.buffer for bucket in optimizer.ipg_buckets.values()),
        "secondary copy": size(p.ds_secondary_tensor for p in params if p.ds_secondary_tensor is not None),
        "optimiser": state,
    }


def size(tensors: Iterable[Any]) -> int:
    """Of the distinct storages, in bytes; of a sharded tensor this rank's part."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local if torch.is_tensor(t)}.values()
    )


if __name__ == "__main__":
    raise SystemExit(main())
