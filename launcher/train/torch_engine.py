"""torch's own engines: DDP, and FSDP2 (also hybrid: HSDP) with one group per transformer block. Checkpoints are torch DCP folders."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from launcher.cost.architecture import blocks_of
from launcher.emit.fsdp import STRATEGIES, fsdp_settings
from launcher.job.spec import JobSpec
from launcher.plan.values import Plan
from launcher.stored.state import State
from launcher.task import Batch, Task, logits_of
from launcher.train.engine import ModelInputs
from launcher.train.into_torch import fill_model, fill_optimizer
from launcher.train.prove import is_plain
from launcher.train.update import Update


class TorchEngine:
    folder_name = "dcp"
    can_copy = True

    def __init__(self, plan: Plan, spec: JobSpec, model: Any, task: Task, device: torch.device) -> None:
        self._task = task
        self._inputs = ModelInputs(plan, spec, model)
        self._device = device
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
        self._frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        # what is not yet unfrozen has no moments in a checkpoint; everything else must be there
        self._planner = DefaultLoadPlanner(allow_partial_load=spec.method.unfreeze_every_steps is not None)
        self._update = Update(model, spec, device)  # by the names of the model itself, not of what wraps it

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
        logits = self._logits(batch)
        self._model.train()
        return logits

    def staged(self, folder: Path, with_frozen: bool, copy: bool) -> Callable[[Any], None]:
        state: dict[str, Any] = self._state(with_frozen)
        if copy:
            state = BlockingAsyncStager().stage(state)
        place = str(folder / self.folder_name)
        return lambda group: dcp.save(state, checkpoint_id=place, process_group=group)

    def save(self, folder: Path, with_frozen: bool = True) -> None:
        self.staged(folder, with_frozen, copy=False)(None)

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        named = self._model.named_parameters()
        return {name.removeprefix("module."): tuple(p.shape) for name, p in named if p.requires_grad}

    def has_plain_optimizer(self) -> bool:
        return all(is_plain(optimizer) for optimizer in self._update.optimizers)

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

    def adopt(self, state: State, step: int, with_frozen: bool = True, with_optimizer: bool = True) -> None:
        own = self._state(with_frozen)
        if not with_frozen:  # torch leaves out frozen parameters, but not the second names of tied ones
            own["model"] = {name: own["model"][name] for name in own["model"].keys() - self._frozen_names()}
        fill_model(own["model"], state)
        strict = StateDictOptions(strict=with_frozen)
        if with_optimizer:
            fill_optimizer(own["optim"], state)
            set_state_dict(
                self._model,
                self._update.optimizers,
                model_state_dict=own["model"],
                optim_state_dict=own["optim"],
                options=strict,
            )
        else:
            set_model_state_dict(self._model, own["model"], options=strict)
        if self._update.average is not None:
            self._update.average.restart()

    def _frozen_names(self) -> set[str]:
        named = self._model.named_parameters(remove_duplicate=False)
        return {name.removeprefix("module.") for name, parameter in named if not parameter.requires_grad}

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
    reshard = settings["reshard_after_forward"]
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, offload_policy=offload)
    return fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
