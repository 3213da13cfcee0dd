"""What the ranks of test_conversion_loads do: DeepSpeed and FSDP2 open what was converted for them, and go on.

Started as `torchrun --nproc-per-node N convert_loads.py CASES.json`. Each case is loaded as its library loads its own
folders, its weights, moments and group settings are compared with the truth, and two more steps are made.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from convert_ranks import VOCAB, gathered, make_model, moments_3, moments_12, param_groups
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard


def batch() -> dict[str, torch.Tensor]:
    """The same on every rank: the mean over any number of them is that of one."""
    ids = (torch.arange(20).reshape(2, 10) * 5) % VOCAB
    return {"input_ids": ids, "labels": ids}


def zero_losses(case: dict[str, Any], truth: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> list[float]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = make_model(case["model"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # whatever is right afterwards was loaded
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.5)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": case["stage"], "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "checkpoint": {"load_universal": case["universal"]},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    path, _ = engine.load_checkpoint(case["folder"])
    assert path is not None
    assert engine.global_steps == 1
    for name, tensor in gathered(engine.module, case["stage"]).items():
        assert torch.equal(tensor, truth[name]), name
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(parameter), truth[name]), name
    held = moments_3(engine) if case["stage"] == 3 else moments_12(engine)
    assert held.keys() == moments.keys()
    for name, tensor in held.items():
        assert torch.equal(tensor, moments[name]), name
    if not (case["universal"] and case["stage"] == 3):  # there DeepSpeed gives every group the settings of the first
        assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [0.1, 0.0]
        assert [group["lr"] for group in engine.optimizer.param_groups] == [1e-2, 1e-2]
    losses = []
    for _ in range(2):
        loss = engine(**batch()).loss
        losses.append(float(loss))
        engine.backward(loss)
        engine.step()
    losses.append(float(engine(**batch()).loss))
    engine.destroy()
    return losses


def fsdp_losses(case: dict[str, Any], truth: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> list[float]:
    model = make_model(case["model"])
    for block in model.transformer.h if case["model"] == "gpt2" else model.model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.5)
    model_state, optim_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optim_state}
    dcp.load(state, checkpoint_id=case["folder"])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optim_state = get_state_dict(model, optimizer, options=whole)
    if dist.get_rank() == 0:
        for name, tensor in model_state.items():
            assert torch.equal(tensor, truth[name]), name
        for name, states in optim_state["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(states[key], moments[f"{name}/{key}"]), (name, key)
        assert [group["weight_decay"] for group in optim_state["param_groups"]] == [0.1, 0.0]
    losses = []
    for _ in range(2):
        loss = model(**batch()).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, float(model(**batch()).loss)]


def main(cases_file: Path) -> None:
    os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name, case in json.loads(cases_file.read_text()).items():
        truth, moments = load_file(case["truth"]), load_file(case["moments"])
        losses = (fsdp_losses if case["stage"] == 0 else zero_losses)(case, truth, moments)
        found[name] = losses
    if dist.get_rank() == 0:
        cases_file.with_suffix(".losses").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
