"""torch's own engines: DDP, and FSDP2 (also hybrid: HSDP) with one group per transformer block. Checkpoints are torch DCP folders."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from launcher.cost.architecture import blocks_of
from launcher.emit.fsdp import STRATEGIES, fsdp_settings
from launcher.job.spec import JobSpec
from launcher.plan.values import Plan
from launcher.task import Batch, Task, logits_of
from launcher.train.engine import ModelInputs
from launcher.train.optim import adamw, parameter_groups


class TorchEngine:
    folder_name = "dcp"
    num_skipped = 0

    def __init__(self, plan: Plan, spec: JobSpec, model: Any, task: Task, device: torch.device) -> None:
        self._task = task
        self._inputs = ModelInputs(plan, spec, model)
        self._device = device
        self._max_norm = spec.training.max_grad_norm
        layout = plan.chosen.layout
        sharded = layout.strategy in STRATEGIES
        self._autocast_bf16 = layout.precision == "bf16" and not sharded
        if layout.precision == "pure_bf16":
            model.to(torch.bfloat16)  # before the optimiser: its moments take the parameters' type
        if sharded:
            self._model = _shard(model, plan, device)  # moves it block by block: no rank ever holds all of it
        elif plan.num_ranks > 1:
            self._model = DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
        else:
            self._model = model.to(device)
        self._optimizer = adamw(parameter_groups(self._model, spec.training.weight_decay), spec.training, device)

    def _logits(self, batch: Batch) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast_bf16):
            return logits_of(self._model(**self._inputs(batch)))

    def accumulate(self, batch: Batch, scale: float, is_last: bool) -> Tensor:
        """DDP reduces with the last micro-batch only; FSDP with each, which is what keeps its gradients sharded."""
        is_ddp = isinstance(self._model, DistributedDataParallel)
        with contextlib.nullcontext() if is_last or not is_ddp else self._model.no_sync():
            loss_sum = self._task.loss_sum(self._logits(batch), batch)
            (loss_sum * scale).backward()
        return loss_sum.detach()

    def step(self, lr: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._max_norm or float("inf"))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor holds this rank's share
        return float(whole)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        self._model.eval()
        logits = self._logits(batch)
        self._model.train()
        return logits

    def save(self, folder: Path, with_frozen: bool = True) -> None:
        dcp.save(self._state(with_frozen), checkpoint_id=str(folder / self.folder_name))

    def load(self, folder: Path, with_frozen: bool = True) -> None:
        """Into this world's sharding, whatever the one that saved: DCP reshards."""
        state = self._state(with_frozen)
        dcp.load(state, checkpoint_id=str(folder / self.folder_name))
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
            options=StateDictOptions(strict=with_frozen),
        )

    def _state(self, with_frozen: bool) -> dict[str, Any]:
        """By parameter name, so that it can be read under another sharding."""
        options = StateDictOptions(ignore_frozen_params=not with_frozen)
        model, optim = get_state_dict(self._model, self._optimizer, options=options)
        return {"model": model, "optim": optim}

    def close(self) -> None:
        self._model = None


def _shard(model: Any, plan: Plan, device: torch.device) -> Any:
    settings = fsdp_settings(plan)
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, settings["param_dtype"]), reduce_dtype=getattr(torch, settings["reduce_dtype"])
    )
    sizes = settings["mesh"]
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    pinned = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    offload: OffloadPolicy = pinned if settings["cpu_offload"] else OffloadPolicy()
    reshard = settings["reshard_after_forward"]
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, offload_policy=offload)
    return fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
