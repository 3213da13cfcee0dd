"""DeepSpeed ZeRO-1, -2 and -3, hpZ, offload. Checkpoints are DeepSpeed's own folders, under the tag `zero`."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from launcher.emit.deepspeed_json import STAGES, deepspeed_config, load_preset
from launcher.errors import ABSENT, CheckpointError
from launcher.job.spec import JobSpec
from launcher.plan.values import Plan
from launcher.stored.state import State
from launcher.task import Batch, Task, logits_of
from launcher.train.engine import ModelInputs
from launcher.train.held_files import HeldFiles
from launcher.train.host_optim import check_nvme, host_adamw
from launcher.train.into_zero import fill_engine
from launcher.train.optim import make_optimizer, parameter_groups, take_shares
from launcher.train.prove import is_plain

TAG = "zero"


class ZeroEngine:
    folder_name = "zero"
    first_nonfinite = None  # DeepSpeed has dropped the gradients when it says that they overflowed

    def __init__(self, plan: Plan, spec: JobSpec, model: Any, task: Task, device: torch.device) -> None:
        self._task = task
        self._inputs = ModelInputs(plan, spec, model)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls collectives by names that torch 2.13 deprecates, in every step: not this run's business
        warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
        if device.type == "cpu":
            # DeepSpeed compiles this op for 40 s and more before the first CPU run; only its inference all-reduce,
            # which training never calls, would use it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        layout = plan.chosen.layout
        check_nvme(layout)
        groups, on_host = parameter_groups(model, spec.training), layout.offload_optimizer != "none"
        self._shares = take_shares(groups)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model.to(device) if STAGES[layout.strategy] < 3 else model,
            optimizer=host_adamw(groups, spec.training) if on_host else make_optimizer(groups, spec.training, device),
            config=deepspeed_config(plan, spec, load_preset(spec, layout)),
            dist_init_required=False,
        )
        self._scales_loss = layout.precision == "fp16"

    def accumulate(self, batch: Batch, scale: float, is_last: bool) -> Tensor:
        """DeepSpeed counts the micro-batches itself, as its configuration tells it; the scale is already the step's."""
        loss_sum = self._task.loss_sum(logits_of(self._engine(**self._inputs(batch))), batch)
        self._engine.backward(loss_sum * scale, scale_wrt_gas=False)
        if not is_last:
            self._engine.step()  # moves its counter; it updates at the boundary only
        return loss_sum.detach()

    @property
    def num_skipped(self) -> int:
        return int(self._engine.skipped_steps)

    def step(self, lr: float, number: int) -> float | None:
        for group, share in zip(self._optimizer.param_groups, self._shares, strict=True):
            group["lr"] = lr * share
        assert self._engine.is_gradient_accumulation_boundary(), "the plan and DeepSpeed count alike"
        self._engine.step()
        if not self._engine.was_step_applied():  # in fp32 and bf16, too, DeepSpeed skips what is not finite
            return None if self._scales_loss else math.inf
        return float(self._engine.get_global_grad_norm())

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        self._engine.eval()
        logits = logits_of(self._engine(**self._inputs(batch)))
        self._engine.train()
        return logits

    @property
    def can_copy(self) -> bool:
        return not self._engine.zero_nvme_offload_optimizer()

    def staged(self, folder: Path, with_frozen: bool, copy: bool) -> Callable[[Any], None]:
        """DeepSpeed hands each file's content to its checkpoint engine; ours keeps it until it is written."""
        files = HeldFiles(copy)
        own, self._engine.checkpoint_engine = self._engine.checkpoint_engine, files
        try:
            path = str(folder / self.folder_name)
            self._engine.save_checkpoint(path, tag=TAG, exclude_frozen_parameters=not with_frozen)
        finally:
            self._engine.checkpoint_engine = own
        return lambda _group: files.write()

    def save(self, folder: Path, with_frozen: bool = True) -> None:
        self.staged(folder, with_frozen, copy=False)(None)
        torch.distributed.barrier()

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        named = ((name, parameter) for parameter, name in self._engine.param_names.items() if parameter.requires_grad)
        return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in named}

    def has_plain_optimizer(self) -> bool:
        return is_plain(self._engine.optimizer.optimizer) and self.can_copy

    def load(self, folder: Path, with_frozen: bool = True) -> None:
        path = folder / self.folder_name
        loaded, _ = self._engine.load_checkpoint(str(path), tag=TAG, load_module_strict=with_frozen)
        if loaded is None:  # DeepSpeed warns and would go on with fresh weights
            raise CheckpointError(str(path), ABSENT, "was not loaded by DeepSpeed", "see the log of this rank")

    def adopt(self, state: State, step: int, with_frozen: bool = True, with_optimizer: bool = True) -> None:
        fill_engine(self._engine, state, with_frozen, with_optimizer)
        self._engine.global_steps = step
        self._engine.skipped_steps = int(state.kept.get("skipped_steps") or 0) if with_optimizer else 0

    def close(self) -> None:
        self._engine.destroy()
