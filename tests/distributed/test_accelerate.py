"""`accelerate` reads the plan's file: whole, by its own classes, and on two ranks with a script of a user's own."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from launcher.emit import accelerate_config
from tests.golden.test_emit import ACCELERATE, planned
from tests.support import rank_environment
from tests.unit.costs import laid_out

SCRIPT = Path(__file__).with_name("accelerate_script.py")


def written(folder: Path, case: str, kind: str = "cuda", **changes: Any) -> Path:
    plan = laid_out(planned("ddp", kind)[1], **{**ACCELERATE[case], **changes})
    path = folder / "accelerate.yaml"
    path.write_text(str(accelerate_config(plan, "/plans/deepspeed.json")))
    return path


def read_by_launch(path: Path) -> Namespace:
    """What `accelerate launch` makes of the file, before it starts anything."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize("case", ACCELERATE)
def test_accelerate_knows_every_key(case: str, tmp_path: Path) -> None:
    """Its own class refuses unknown ones; written back, it says the same."""
    path = written(tmp_path, case)
    read = ClusterConfig.from_yaml_file(path)
    assert (read.num_processes, read.num_machines) == (
        read_by_launch(path).num_processes,
        ACCELERATE[case].get("nodes", 1),
    )


def test_what_the_ranks_are_told(tmp_path: Path) -> None:
    """By the environment that `accelerate launch` gives them: FSDP2 with its mesh, or DeepSpeed's file."""
    environment = prepare_multi_gpu_env(read_by_launch(written(tmp_path, "hsdp-nodes")))
    told = {
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }
    assert {key: environment[key] for key in told} == told
    environment = prepare_multi_gpu_env(read_by_launch(written(tmp_path, "fsdp")))
    assert (environment["FSDP_OFFLOAD_PARAMS"], environment["FSDP_ACTIVATION_CHECKPOINTING"]) == ("true", "true")
    arguments = read_by_launch(written(tmp_path, "zero3-nodes"))
    arguments.deepspeed_fields_from_accelerate_config = ""
    arguments.main_process_port = 0  # no port of this machine is looked at
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == "/plans/deepspeed.json"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "true"


def test_a_users_script_runs_under_the_plan(tmp_path: Path) -> None:
    """Two CPU ranks, ddp: started by `accelerate launch`, learning."""
    path, out = written(tmp_path, "ddp", "cpu", precision="fp32"), tmp_path / "out.json"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), str(SCRIPT), str(out)]
    environment = {**rank_environment(), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(out.read_text())
    assert (seen["kind"], seen["ranks"], seen["engine"]) == ("MULTI_CPU", 2, "DistributedDataParallel")
    losses = seen["losses"]
    assert sum(losses[-16:]) < 0.5 * sum(losses[:16])


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_no_file_that_would_silently_be_another_plan(strategy: str) -> None:
    """On CPU accelerate passes over FSDP and DeepSpeed."""
    assert accelerate_config(laid_out(planned("ddp", "cpu")[1], strategy=strategy), "x.json") is None
