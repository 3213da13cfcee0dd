"""DeepSpeed ZeRO-1, -2 and -3, hpZ, offload. Checkpoints are DeepSpeed's own folders, under the tag `zero`."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from torch import Tensor

from launcher.cost.architecture import blocks_of
from launcher.emit.deepspeed_json import STAGES, deepspeed_config, load_preset
from launcher.errors import ABSENT, CheckpointError
from launcher.job.spec import JobSpec
from launcher.plan.values import Plan
from launcher.task import Batch, Task, TokenScores, logits_of
from launcher.train.chunked import StepLoss
from launcher.train.engine import COMPUTED_IN, ModelInputs
from launcher.train.handout import HandOut
from launcher.train.host_optim import check_nvme, host_adamw
from launcher.train.optim import make_optimizer, parameter_groups, take_shares

TAG = "zero"


class ZeroEngine:
    folder_name = "zero"
    first_nonfinite = None  # DeepSpeed has dropped the gradients when it says that they overflowed

    def __init__(self, plan: Plan, spec: JobSpec, model: Any, task: Task, device: torch.device) -> None:
        self._inputs = ModelInputs(plan, spec, model)
        self.loss = StepLoss(plan, spec, model, task)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls collectives by names that torch 2.13 deprecates, in every step: not this run's business
        warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
        if device.type == "cpu":
            # DeepSpeed compiles this op for 40 s and more before the first CPU run; only its inference all-reduce,
            # which training never calls, would use it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        layout = plan.chosen.layout
        check_nvme(layout)
        config = deepspeed_config(plan, spec, load_preset(spec, layout))
        grouped, on_host = placed(model, plan, spec, device, config), layout.offload_optimizer != "none"
        self._shares = take_shares(grouped)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=host_adamw(grouped, spec.training) if on_host else make_optimizer(grouped, spec.training, device),
            config=config,
            dist_init_required=False,
        )
        self._scales_loss = layout.precision == "fp16"

    def accumulate(self, batch: Batch, scale: float, is_last: bool) -> Tensor:
        """DeepSpeed counts the micro-batches itself, as its configuration tells it; the scale is already the step's."""
        loss_sum = self.loss.of(lambda: self._engine(**self._inputs(batch)), batch)
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

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor | TokenScores:
        self._engine.eval()
        scores = self.loss.scores(lambda: self._engine(**self._inputs(batch)), batch)
        self._engine.train()
        return scores

    def save(self, folder: Path, with_frozen: bool = True) -> None:
        path = str(folder / self.folder_name)
        self._engine.save_checkpoint(path, tag=TAG, exclude_frozen_parameters=not with_frozen)

    def load(self, folder: Path, with_frozen: bool = True) -> None:
        path = folder / self.folder_name
        loaded, _ = self._engine.load_checkpoint(str(path), tag=TAG, load_module_strict=with_frozen)
        if loaded is None:  # DeepSpeed warns and would go on with fresh weights
            raise CheckpointError(str(path), ABSENT, "was not loaded by DeepSpeed", "see the log of this rank")

    def close(self) -> None:
        self._engine.destroy()


def placed(model: Any, plan: Plan, spec: JobSpec, device: torch.device, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Hand the model out, for stage 3 in pieces; returns its parameter groups, told by shapes that pieces do not have.

    Left to itself DeepSpeed would move the whole model to the device before it cuts it.
    """
    layout = plan.chosen.layout
    if STAGES[layout.strategy] < 3:
        return parameter_groups(HandOut(model, device).whole(), spec.training)
    deepspeed.init_distributed(dist_init_required=False)  # the group that is there: without, it counts one rank
    convert: Any = None
    for part in HandOut(model, device, COMPUTED_IN[layout.precision]).parts(blocks_of(model)):
        if convert is None:
            made = groups._get_zero_param_intra_parallel_group()  # hpz: for the whole process, and only once
            deepspeed.zero.Init(module=part, config_dict_or_path=config, zero_param_parallel_group=made)
            convert = getattr(next(part.parameters()), "convert_to_zero_parameters")  # noqa: B009
        else:
            convert(param_list=part.parameters())
    return parameter_groups(model, spec.training)
