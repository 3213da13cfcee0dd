"""The generated files and commands, compared whole."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any

import pytest

from launcher.emit import accelerate_config, deepspeed_config, fsdp_settings, launch_command, load_preset
from launcher.emit.argv import RUN_FILE
from launcher.plan import Plan, make_plan
from launcher.plan.explain import explain
from tests.golden.compare import Golden
from tests.unit.costs import DEEPSPEED_LAYOUTS, cluster_of, laid_out, llama_405b, small_cost, spec_of


def planned(strategy: str, kind: str = "cuda", **changes: Any) -> tuple[Any, Plan]:
    """2 ranks, 8 samples a step."""
    spec = spec_of(**{"parallel": {"strategy": strategy, "micro_batch_size": 2, "precision": "bf16"}, **changes})
    return spec, make_plan(spec, small_cost(), cluster_of(10**9, kind=kind))


@pytest.mark.parametrize("case", DEEPSPEED_LAYOUTS)
def test_deepspeed_configuration(case: str, golden: Golden) -> None:
    """The shipped preset and what the plan derives."""
    spec, plan = planned("zero3", parallel__nvme_path="/scratch/nvme")
    plan = laid_out(plan, **DEEPSPEED_LAYOUTS[case])
    config = deepspeed_config(plan, spec, load_preset(spec, plan.chosen.layout))
    golden.check(f"deepspeed-{case}.json", json.dumps(config, indent=2) + "\n")


FSDP = {
    "fsdp": {"strategy": "fsdp"},
    "fsdp-offload": {"strategy": "fsdp", "offload_params": "cpu", "offload_optimizer": "cpu"},
    "hsdp-kept": {"strategy": "hsdp", "shard_group_size": 8, "reshard_after_forward": False},
    "hsdp-pure-bf16": {"strategy": "hsdp", "shard_group_size": 4, "precision": "pure_bf16"},
}


@pytest.mark.parametrize("case", FSDP)
def test_fsdp_settings(case: str, golden: Golden) -> None:
    """On two nodes of eight ranks."""
    plan = laid_out(planned("fsdp")[1], nodes=2, ranks_per_node=8, **FSDP[case])
    golden.check(f"fsdp-{case}.json", json.dumps(fsdp_settings(plan), indent=2) + "\n")


NODES = {"nodes": 2, "ranks_per_node": 8}
ACCELERATE: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp", "recompute": "full"},
    "ddp-one-rank": {"strategy": "ddp", "ranks_per_node": 1, "precision": "pure_bf16"},
    "fsdp": {"strategy": "fsdp", "offload_params": "cpu", "offload_optimizer": "cpu", "recompute": "full"},
    "hsdp-nodes": {"strategy": "hsdp", "shard_group_size": 8, "reshard_after_forward": False, **NODES},
    "zero2": {"strategy": "zero2"},
    "zero3-nodes": {"strategy": "zero3", **NODES},
}


@pytest.mark.parametrize("case", ACCELERATE)
def test_accelerate_configuration(case: str, golden: Golden) -> None:
    """For `accelerate launch --config_file`."""
    plan = laid_out(planned("ddp")[1], **ACCELERATE[case])
    golden.check(f"accelerate-{case}.yaml", str(accelerate_config(plan, "/plans/deepspeed.json")))


def test_plan_json(golden: Golden) -> None:
    """What `fleetune plan --json` prints."""
    _, plan = planned("auto", parallel="auto")
    golden.check("plan.json", json.dumps(plan.to_json(), indent=2) + "\n")


def test_explanation(golden: Golden) -> None:
    """What `fleetune plan` prints: for a small job on one node, and for 405 billion parameters on 1,280."""
    _, small = planned("auto", parallel="auto")
    spec = spec_of(
        cluster={"name": "h100-80", "nodes": 1280, "gpus_per_node": 8},
        training={"seq_len": 4096, "global_batch_size": 10_240, "max_steps": 1},
    )
    large = make_plan(spec, llama_405b(), cluster_of(78 * 2**30, bf16=True))
    golden.check("explain.txt", f"{explain(small)}\n\n\n{explain(large)}\n")


def commands() -> dict[str, str]:
    """Case -> command line, without the paths of this checkout and interpreter."""
    one = {"cluster__gpus_per_node": 1}
    cases = {
        "one rank on CPU": launch(planned("ddp", "cpu", **one)[1]),
        "one rank on CUDA": launch(planned("ddp", **one)[1]),
        "ddp on CPU": launch(planned("ddp", "cpu")[1]),
        "fsdp on CUDA": launch(planned("fsdp")[1]),
        "zero2 on CPU": launch(planned("zero2", "cpu")[1]),
        "zero2 on CUDA": launch(planned("zero2")[1]),
        "zero2 on CUDA by the deepspeed launcher": launch(planned("zero2")[1], via="deepspeed"),
        "zero2 on CPU by the deepspeed launcher": launch(planned("zero2", "cpu")[1], via="deepspeed"),
        "a path with spaces and overrides": launch(
            planned("ddp", **one)[1], "my jobs/$HOME/it's.yaml", ("a.b=[1, 2]", "c=x y")
        ),
    }
    return {
        case: text.replace(str(RUN_FILE), "launcher/run.py").replace(sys.executable, "python")
        for case, text in cases.items()
    }


def launch(plan: Plan, spec_path: str = "job.yaml", overrides: tuple[str, ...] = (), **options: Any) -> str:
    command = launch_command(plan, spec_path, overrides, num_cores=5, port=29511, **options)
    words = shlex.split(str(command))
    assert words[len(command.environment) :] == list(command.argv), "what is shown is what a shell would run"
    return str(command)


def test_commands(golden: Golden) -> None:
    """What `fleetune launch --dry-run` shows, and runs."""
    golden.check("commands.txt", "\n".join(f"# {case}\n{text}\n" for case, text in commands().items()))


def test_cpu_ranks_share_the_cores() -> None:
    """Torch would give each rank all of them, and they would stand in each other's way; never less than one."""
    _, plan = planned("ddp", "cpu")
    for num_cores, threads in ((1, "1"), (2, "1"), (5, "2"), (64, "32")):
        assert launch_command(plan, "j", (), num_cores, 1).environment["OMP_NUM_THREADS"] == threads
