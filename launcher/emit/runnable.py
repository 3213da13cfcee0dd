"""The plan does what the spec asks for, key by key: one that the planner passed over would silently be another run."""

from __future__ import annotations

from launcher.errors import SpecError
from launcher.job.spec import JobSpec
from launcher.plan.values import Plan

KEYS = ("strategy", "precision", "recompute", "shard_group_size", "reshard_after_forward")
PLACES = ("offload_optimizer", "offload_params")


def check_runnable(spec: JobSpec, plan: Plan) -> None:
    """Raises `SpecError` for the first key that was fixed and is not what was planned."""
    for key in KEYS + PLACES:
        asked, planned = getattr(spec.parallel, key), getattr(plan.chosen.layout, key)
        if asked not in ("auto", planned):
            raise SpecError(f"parallel.{key}", asked, f"is not what was planned: {planned}", "leave it to the planner")
