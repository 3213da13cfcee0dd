"""AdamW in host memory, for ZeRO-Offload: DeepSpeed's vectorised one where its op can be compiled, else torch's."""

from __future__ import annotations

from typing import Any

import torch

from launcher.errors import UserError
from launcher.job.spec import TrainingSection
from launcher.plan.layout import Layout
from launcher.train.optim import adamw, setting
from launcher.train.report import LOG


def host_adamw(groups: list[dict[str, Any]], training: TrainingSection) -> torch.optim.Optimizer:
    """The log says which. The numbers agree to fp32 rounding, the speed does not."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    betas, eps = (setting(training, "beta1"), setting(training, "beta2")), setting(training, "eps")
    try:
        optimizer = DeepSpeedCPUAdam(groups, lr=training.lr, betas=betas, eps=eps, adamw_mode=True)
    except (RuntimeError, OSError, ImportError) as error:  # no compiler, no headers, an op that does not load
        reason = str(error).strip().partition("\n")[0]
        LOG.warning("optimiser on the host: torch AdamW, since DeepSpeedCPUAdam cannot be built here (%s)", reason)
        return adamw(groups, training, torch.device("cpu"))
    LOG.info("optimiser on the host: DeepSpeedCPUAdam")
    return optimizer


def check_nvme(layout: Layout) -> None:
    """Raises `UserError` where the plan keeps state on NVMe and DeepSpeed cannot read and write there."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    for key in ("offload_optimizer", "offload_params"):
        if getattr(layout, key) == "nvme" and not AsyncIOBuilder().is_compatible():
            rule = "needs DeepSpeed's async_io op, which cannot be built on this machine: libaio is missing"
            raise UserError(f"parallel.{key}", "nvme", rule, "install libaio's headers (libaio-dev), or offload to cpu")
