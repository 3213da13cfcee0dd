"""Command lines and environments that start the ranks of a plan: on this machine, or one node of several."""

from __future__ import annotations

import base64
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.emit.hosts import Host
from launcher.plan.values import Plan

RUN_FILE = Path(__file__).resolve().parents[1] / "run.py"
NODE_FILE = Path(__file__).resolve().parents[1] / "node.py"
# Torchrun's settings by environment, so that a torchrun that does not know one passes it over. Not TERM among the signals
# it handles: ranks are told to stop themselves, and torchrun would kill them while they save. A rank that hangs because
# another died gets some seconds, not the usual 30.
_TORCHRUN = {"PET_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT", "PET_SHUTDOWN_TIMEOUT": "10"}


@dataclass(frozen=True)
class Launch:
    argv: tuple[str, ...]
    environment: dict[str, str]
    """Added to the caller's."""

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.environment.items()] + list(self.argv)
        return shlex.join(words)


Via = Literal["torchrun", "deepspeed"]


@dataclass(frozen=True)
class NodeStart:
    """One node's part of an attempt on several machines."""

    nodes: str
    """How many, or MIN:MAX."""
    node: int
    """Number of this one."""
    ranks_per_node: int
    head: str
    """The first node, as the others reach it."""
    port: int
    """For the launcher; the next one is for the nodes themselves."""
    run_id: str
    launcher: Via = "torchrun"
    world_info: str = ""
    """DeepSpeed's: host -> slots, as base64 of JSON."""
    max_restarts: int = 0
    """MIN:MAX nodes: how often torchrun starts ranks again that failed; nodes that come and go do not count."""

    @property
    def is_elastic(self) -> bool:
        return ":" in self.nodes

    def argv(self, python: str, job: tuple[str, ...], node: str | None = None) -> list[str]:
        """The command that starts `node.py` there. job: `--spec S --set K=V`."""
        words = [python, str(NODE_FILE), "--nodes", self.nodes, "--node", node or str(self.node)]
        words += ["--ranks-per-node", str(self.ranks_per_node), "--head", self.head, "--port", str(self.port)]
        words += ["--id", self.run_id, "--launcher", self.launcher]
        if self.world_info:
            words += ["--world-info", self.world_info]
        return [*words, *job]


def job_words(spec_path: str, overrides: tuple[str, ...]) -> tuple[str, ...]:
    return ("--spec", spec_path, *(word for override in overrides for word in ("--set", override)))


def world_info(hosts: tuple[Host, ...]) -> str:
    """As DeepSpeed's runner hands it to its node launcher (`encode_world_info`)."""
    told = {host.address: list(host.slots) for host in hosts}
    return base64.urlsafe_b64encode(json.dumps(told).encode()).decode()


def node_launcher(start: NodeStart, spec_path: str, overrides: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) of the launcher that one node runs."""
    job = [str(RUN_FILE), *job_words(spec_path, overrides)]
    if start.launcher == "deepspeed":
        words = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={start.world_info}"]
        words += [f"--node_rank={start.node}", f"--master_addr={start.head}", f"--master_port={start.port}"]
        return [*words, "--log_level=warning", *job], {}
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", start.nodes]
    words += ["--nproc-per-node", str(start.ranks_per_node), "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", f"{start.head}:{start.port}", "--rdzv-id", start.run_id]
    if start.is_elastic:
        words += ["--max-restarts", str(start.max_restarts)]
    # The first node keeps the rendezvous by its number: torchrun would compare names, which fails where a node has two.
    # 600 s: Python may take minutes to load on many nodes at once, and nobody may give up meanwhile.
    conf = f"is_host={int(start.node == 0)},join_timeout=600,read_timeout=600"
    return [*words, *job], {**_TORCHRUN, "PET_RDZV_CONF": conf}


def launch_command(
    plan: Plan, spec_path: str, overrides: tuple[str, ...], num_cores: int, port: int, via: Via = "torchrun"
) -> Launch:
    """One machine: plain Python for a single rank, else torchrun, or the deepspeed launcher, for either engine.

    num_cores: of the machine; on CPU the ranks share them evenly, or torch gives every rank all of them.
    port: free on this machine, so that two jobs never meet.
    """
    job = [str(RUN_FILE), *job_words(spec_path, overrides)]
    environment = rank_environment(plan, num_cores)
    if plan.num_ranks > 1 and via == "torchrun":
        environment |= _TORCHRUN
    return Launch((*_starter(plan, port, via), *job), environment)


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


def rank_environment(plan: Plan, num_cores: int) -> dict[str, str]:
    """What ranks are told beside the launcher's own: on CPU they share the cores evenly."""
    if plan.device != "cpu":
        return {}
    threads = {"OMP_NUM_THREADS": str(max(1, num_cores // plan.gpus_per_node))}
    return {**threads, "DS_ACCELERATOR": "cpu"} if plan.engine == "deepspeed" else threads
