"""The command line and environment that start the ranks of a plan on this machine."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.plan.values import Plan

RUN_FILE = Path(__file__).resolve().parents[1] / "run.py"


@dataclass(frozen=True)
class Launch:
    argv: tuple[str, ...]
    environment: dict[str, str]
    """Added to the caller's."""

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.environment.items()] + list(self.argv)
        return shlex.join(words)


Via = Literal["torchrun", "deepspeed"]


def launch_command(
    plan: Plan, spec_path: str, overrides: tuple[str, ...], num_cores: int, port: int, via: Via = "torchrun"
) -> Launch:
    """One machine: plain Python for a single rank, else torchrun, or the deepspeed launcher, for either engine.

    num_cores: of the machine; on CPU the ranks share them evenly, or torch gives every rank all of them.
    port: free on this machine, so that two jobs never meet.
    """
    job = [str(RUN_FILE), "--spec", spec_path]
    for override in overrides:
        job += ["--set", override]
    return Launch((*_starter(plan, port, via), *job), _environment(plan, num_cores))


def _starter(plan: Plan, port: int, via: Via) -> list[str]:
    ranks = str(plan.gpus_per_node)
    if plan.num_ranks == 1:
        return [sys.executable]
    if via == "deepspeed":
        # `-m` and not the `deepspeed` script, which need not be on the PATH of this interpreter
        runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
        return [*runner, "--num_gpus", ranks, "--master_port", str(port)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", ranks]
    return [
        *torchrun,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
        "--rdzv-id",
        f"fleetune-{port}",
    ]


def _environment(plan: Plan, num_cores: int) -> dict[str, str]:
    if plan.device != "cpu":
        return {}
    threads = {"OMP_NUM_THREADS": str(max(1, num_cores // plan.gpus_per_node))}
    return {**threads, "DS_ACCELERATOR": "cpu"} if plan.engine == "deepspeed" else threads
