"""torch's own engines: DDP, and FSDP2 (also hybrid: HSDP) with one group per transformer block. Checkpoints are torch DCP folders."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from launcher.cost.architecture import blocks_of
from launcher.emit.fsdp import STRATEGIES, fsdp_settings
from launcher.job.spec import JobSpec
from launcher.plan.values import Plan
from launcher.task import Batch, Task, TokenScores, logits_of
from launcher.train.chunked import StepLoss
from launcher.train.engine import ModelInputs
from launcher.train.handout import HandOut
from launcher.train.update import Update


class TorchEngine:
    folder_name = "dcp"

    def __init__(self, plan: Plan, spec: JobSpec, model: Any, task: Task, device: torch.device) -> None:
        self._inputs = ModelInputs(plan, spec, model)
        self.loss = StepLoss(plan, spec, model, task)
        self._device = device
        layout = plan.chosen.layout
        sharded = layout.strategy in STRATEGIES
        self._autocast_bf16 = layout.precision == "bf16" and not sharded
        if layout.precision == "pure_bf16":
            model.to(torch.bfloat16)  # before the optimiser: its moments take the parameters' type
        if sharded:
            self._model = _shard(model, plan, device)
        elif plan.num_ranks > 1:
            whole = HandOut(model, device).whole()
            self._model = DistributedDataParallel(whole, gradient_as_bucket_view=True, init_sync=False)
        else:
            self._model = HandOut(model, device).whole()
        self._frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        # what is not yet unfrozen has no moments in a checkpoint; everything else must be there
        self._planner = DefaultLoadPlanner(allow_partial_load=spec.method.unfreeze_every_steps is not None)
        self._update = Update(model, spec, device)  # by the names of the model itself, not of what wraps it

    def _called(self, batch: Batch) -> Any:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast_bf16):
            return self._model(**self._inputs(batch))

    def accumulate(self, batch: Batch, scale: float, is_last: bool) -> Tensor:
        """DDP reduces with the last micro-batch only; FSDP with each, which is what keeps its gradients sharded."""
        is_ddp = isinstance(self._model, DistributedDataParallel)
        with contextlib.nullcontext() if is_last or not is_ddp else self._model.no_sync():
            loss_sum = self.loss.of(lambda: self._called(batch), batch)
            (loss_sum * scale).backward()
        return loss_sum.detach()

    @property
    def num_skipped(self) -> int:
        return self._update.num_skipped

    @property
    def first_nonfinite(self) -> str | None:
        return self._update.first_nonfinite

    def step(self, lr: float, number: int) -> float:
        return self._update.step(lr, number)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        self._model.eval()
        logits = logits_of(self._called(batch))
        self._model.train()
        return logits

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor | TokenScores:
        self._model.eval()
        scores = self.loss.scores(lambda: self._called(batch), batch)
        self._model.train()
        return scores

    def save(self, folder: Path, with_frozen: bool = True) -> None:
        dcp.save(self._state(with_frozen), checkpoint_id=str(folder / self.folder_name))

    def load(self, folder: Path, with_frozen: bool = True) -> None:
        """Into this world's sharding, whatever the one that saved: DCP reshards."""
        state, path = self._state(with_frozen), str(folder / self.folder_name)
        average = state.get("ema")
        if average and not any(name.startswith("ema.") for name in _stored_names(path)):
            del state["ema"]  # asked for since: it starts at the weights that are loaded
        dcp.load(state, checkpoint_id=path, planner=self._planner)
        set_state_dict(
            self._model,
            self._update.optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
            options=StateDictOptions(strict=with_frozen),
        )
        if self._update.average is not None and "ema" not in state:
            self._update.average.restart()

    def _state(self, with_frozen: bool) -> dict[str, Any]:
        """By parameter name, so that it can be read under another sharding."""
        options = StateDictOptions(ignore_frozen_params=not with_frozen)
        model, optim = get_state_dict(self._model, self._update.optimizers, options=options)
        if not with_frozen:  # the scales of quantised weights are neither parameters nor buffers
            model = {name: tensor for name, tensor in model.items() if not self._belongs_to_frozen(name)}
        average = {"ema": self._update.average.tensors} if self._update.average is not None else {}
        return {"model": model, "optim": optim, **average}

    def _belongs_to_frozen(self, name: str) -> bool:
        return any(name.startswith(f"{frozen}.") for frozen in self._frozen)

    def close(self) -> None:
        self._model = None


def _stored_names(path: str) -> list[str]:
    return list(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)


def _shard(model: Any, plan: Plan, device: torch.device) -> Any:
    settings = fsdp_settings(plan)
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, settings["param_dtype"]), reduce_dtype=getattr(torch, settings["reduce_dtype"])
    )
    sizes = settings["mesh"]
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    pinned = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    offload: OffloadPolicy = pinned if settings["cpu_offload"] else OffloadPolicy()
    for part in HandOut(model, device).parts(blocks_of(model)):
        kept = {} if part is model else {"reshard_after_forward": settings["reshard_after_forward"]}
        fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=offload, **kept)
    return model
