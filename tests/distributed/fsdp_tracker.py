"""Body of test_fsdp_tracker: what torch's own FSDPMemTracker sees of FSDP2, under fake tensors and a fake process group.

A group per block and one for the rest, as our engine has them. Takes cases on standard input, prints the tracker's bytes
by category at the peak of a forward and backward pass. The optimiser's state is there, its update is not run: under fake tensors it leaves copies behind.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.initialization import no_init_weights

from launcher.cost.architecture import blocks_of, enable_recompute, head_class, model_config
from launcher.cost.kernels import as_on_gpus
from launcher.cost.measure import _batch, _without_values
from launcher.job import JobSpec, parse_spec
from launcher.task import logits_of, task_of


def main() -> None:
    cases = json.load(sys.stdin)
    json.dump([_peak(case["num_ranks"], parse_spec(case["spec"]), case["layout"]) for case in cases], sys.stdout)


def _peak(num_ranks: int, spec: JobSpec, layout: dict[str, Any]) -> dict[str, int]:
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    mesh = dist.device_mesh.init_device_mesh("cpu", (num_ranks,))
    task = task_of(spec)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with no_init_weights():
            model = head_class(task.auto_class).from_config(model_config(spec), dtype=torch.float32).train()
        model.tie_weights()  # part of the initialisation that is left out here
        model.config.use_cache = False
        if layout["recompute"] == "full":
            enable_recompute(model)
        policy = MixedPrecisionPolicy(getattr(torch, layout["param_dtype"]), torch.float32)
        for part in (*blocks_of(model), model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {**moments, "step": torch.zeros(())}
        tracker = FSDPMemTracker(model, optimizer)
        batch = _batch(task, layout["micro_batch_size"], spec.training.seq_len)
        del batch["attention_mask"]
        tracker.track_inputs(tuple(batch.values()))
        with _without_values("none"), as_on_gpus(True, False, lambda flops: None), tracker:
            task.loss_sum(logits_of(model(input_ids=batch["input_ids"], use_cache=False)), batch).backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    dist.destroy_process_group()
    return {str(getattr(category, "value", category)): size for category, size in peak.items()}


if __name__ == "__main__":
    main()
