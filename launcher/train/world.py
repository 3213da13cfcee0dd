"""Rank facts, and the process group made from them. `World.detect` is the only reader of the launchers' variables."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launcher.errors import ABSENT, UserError

# launcher: (variable that marks it, rank, local rank, ranks, ranks per node); first match wins. torchrun and deepspeed
# may run inside an srun step and inherit SLURM_*, so srun comes after them.
_LAUNCHERS = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    "deepspeed": ("LOCAL_SIZE", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"),
    "srun": ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
    "env": ("WORLD_SIZE", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
}
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
"""Longest wait of one rank for the others: rank 0 may read a large index or write a large manifest meanwhile."""


@dataclass(frozen=True)
class World:
    launcher: str
    rank: int
    local_rank: int
    num_ranks: int
    ranks_per_node: int

    @classmethod
    def detect(cls, env: Mapping[str, str]) -> World:
        """From the environment that a launcher made; without one, a world of one rank."""
        for launcher, (mark, *names) in _LAUNCHERS.items():
            if mark in env:
                world = cls(launcher, *(_number(env, launcher, name) for name in names))
                _check_even(world, env, names[-1])
                return world
        return cls("python", rank=0, local_rank=0, num_ranks=1, ranks_per_node=1)

    @property
    def nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def _check_even(world: World, env: Mapping[str, str], name: str) -> None:
    if world.num_ranks % world.ranks_per_node:
        rule = f"gives nodes unequal numbers of ranks ({world.num_ranks} in all)"
        raise UserError(name, env[name], rule, "start as many ranks on every node")


def _number(env: Mapping[str, str], launcher: str, name: str) -> int:
    text = env.get(name, "")
    first = text.partition("(")[0].partition(",")[0]  # SLURM_STEP_TASKS_PER_NODE is `4(x2)`
    if not first.isdigit():
        found = text or ABSENT
        raise UserError(
            name, found, f"is not a number, though {launcher} started this rank", "start it with fleetune launch"
        )
    return int(first)


def tell_libraries(world: World, env: MutableMapping[str, str]) -> None:
    """Set torch's names for the rank facts where the launcher did not: DeepSpeed and others read them anywhere."""
    names = {"RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.num_ranks}
    for name, value in {**names, "LOCAL_WORLD_SIZE": world.ranks_per_node}.items():
        env.setdefault(name, str(value))


def start_process_group(world: World, device: torch.device) -> None:
    """gloo on CPU, NCCL on CUDA (with gloo for objects). The address comes from the launcher's environment."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if world.launcher == "python":  # nobody to meet: no port is opened
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    dist.init_process_group(backend, rank=world.rank, world_size=world.num_ranks, timeout=COLLECTIVE_TIMEOUT)


def rank_device(world: World, kind: str) -> torch.device:
    """The device of this rank: `cpu`, or the CUDA device of its local rank, made current."""
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        rule = "has CUDA accelerators, but torch sees none on this machine"
        raise UserError("cluster.name", ABSENT, rule, "set cluster.name to cpu, or run on the cluster")
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)
