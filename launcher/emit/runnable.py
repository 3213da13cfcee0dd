"""What a plan may say and no engine does yet: refused by name, or a run would silently be another one."""

from __future__ import annotations

from launcher.errors import SpecError
from launcher.job.spec import JobSpec

NOT_BUILT = {
    "strategy": ("hsdp", "hpz"),
    "offload_optimizer": ("cpu", "nvme"),
    "offload_params": ("cpu", "nvme"),
    "precision": ("fp16", "pure_bf16"),
    "reshard_after_forward": (False,),
}


def check_runnable(spec: JobSpec) -> None:
    """Raises `SpecError` for what the engines cannot do."""
    for key, values in NOT_BUILT.items():
        if (value := getattr(spec.parallel, key)) in values and value is not None:
            raise SpecError(
                f"parallel.{key}", value, "is planned, but no engine runs it yet", "leave it to the planner"
            )
