"""Body of the ranks of test_handout: build every case as a run does, and hold what each rank got against the whole model.

Takes a folder with the models, and a file for the findings of rank 0.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from launcher.job import JobSpec, parse_spec
from launcher.plan import make_plan
from launcher.task import task_of
from launcher.train.engine import make_engine
from launcher.train.model import build_model, whole_model
from launcher.train.world import World, start_process_group
from tests.unit.costs import cluster_of, laid_out, small_cost

DATA: Any = SimpleNamespace(vocab_size=96, pad_id=1, eos_id=2)
CLASSIFY = {"name": "sequence_classification", "labels": ["one", "other", "third"]}
CASES: dict[str, dict[str, Any]] = {
    "tied": {"model": {"path": "gpt2"}},
    "untied": {"model": {"path": "llama"}},
    "untied by its weights": {"model": {"path": "untied"}},
    "new head": {"model": {"path": "bert"}, "task": CLASSIFY},
    "random": {"model": {"from_config": "llama"}},
    "adapters": {"model": {"path": "llama"}, "method": "lora"},
    "adapters and a head": {"model": {"path": "bert"}, "task": CLASSIFY, "method": {"name": "lora", "use_dora": True}},
}
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")


def spec_of(case: str, strategy: str, models: Path, out: Path) -> JobSpec:
    raw = {"task": "causal_lm", **CASES[case]}
    raw["model"] = {key: str(models / name) for key, name in raw["model"].items()}
    return parse_spec(
        {
            **raw,
            "output_dir": str(out / case / strategy),
            "data": {"train": "none.txt"},
            "training": {"seq_len": 16, "global_batch_size": 2, "max_steps": 1},
            "parallel": {"strategy": strategy, "micro_batch_size": 1, "recompute": "none", "precision": "fp32"},
            "cluster": {"name": "cpu", "gpus_per_node": 2},
            "seed": 7,
        }
    )


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name, and what modules keep beside both."""
    found = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, module in model.named_modules():
        beside = {key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
        found |= {f"{name}.{key}": value for key, value in beside.items()}
    return found


def gathered(tensor: Any) -> torch.Tensor:
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):
        with deepspeed.zero.GatheredParameters(tensor):
            return tensor.detach().clone()
    return tensor


def findings(case: str, strategy: str, models: Path, out: Path) -> dict[str, Any]:
    spec = spec_of(case, strategy, models, out)
    task = task_of(spec)
    built = build_model(spec, task, DATA)
    real = sum(t.numel() for t in tensors_of(built.model).values() if not t.is_meta)
    trained = {name for name, p in built.model.named_parameters(remove_duplicate=False) if p.requires_grad}
    plan = laid_out(make_plan(spec, small_cost(), cluster_of(10**12, kind="cpu")), precision="fp32")
    engine: Any = make_engine(plan, spec, built.model, task, torch.device("cpu"))
    ours = {name: gathered(tensor) for name, tensor in tensors_of(built.model).items()}
    engine.close()
    whole, _ = whole_model(spec, task, DATA)
    theirs = tensors_of(whole)
    return {
        "real": real,
        "names": sorted(ours) == sorted(theirs),
        "trained": trained == {n for n, p in whole.named_parameters(remove_duplicate=False) if p.requires_grad},
        "unequal": [n for n in theirs if theirs[n].dtype != ours[n].dtype or not torch.equal(theirs[n], ours[n])],
        "shared": shared(whole) == shared(built.model),
    }


def shared(model: Any) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


def main() -> None:
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    start_process_group(World.detect(os.environ), torch.device("cpu"))
    found = {f"{c}/{s}": findings(c, s, models, out.parent) for c, s in product(CASES, STRATEGIES)}
    out.with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
