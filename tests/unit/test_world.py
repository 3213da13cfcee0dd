"""Who this rank is, from the variables of each launcher."""

from __future__ import annotations

import pytest
import torch

from launcher.errors import UserError
from launcher.train.world import World, rank_device

SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
DEEPSPEED = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    ("env", "world", "nodes"),
    [
        ({}, World("python", 0, 0, 1, 1), 1),
        ({"PATH": "/bin"}, World("python", 0, 0, 1, 1), 1),
        (TORCHRUN, World("torchrun", 3, 1, 4, 2), 2),
        (DEEPSPEED, World("deepspeed", 3, 1, 4, 2), 2),
        (SRUN, World("srun", 5, 1, 8, 4), 2),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8"}, World("srun", 5, 1, 8, 8), 1),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4,4"}, World("srun", 5, 1, 8, 4), 2),
        # the ranks of a torchrun or deepspeed inside an srun step inherit SLURM_*
        ({**SRUN, **TORCHRUN}, World("torchrun", 3, 1, 4, 2), 2),
        ({**SRUN, **DEEPSPEED}, World("deepspeed", 3, 1, 4, 2), 2),
        # an sbatch script's own shell, which no srun started
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, World("python", 0, 0, 1, 1), 1),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            World("env", 0, 0, 2, 2),
            1,
        ),
    ],
)
def test_detect(env: dict[str, str], world: World, nodes: int) -> None:
    """One row per launcher; what was started last wins."""
    assert World.detect(env) == world
    assert World.detect(env).nodes == nodes


def test_only_the_first_rank_is_first() -> None:
    assert World.detect({}).is_first
    assert not World.detect(TORCHRUN).is_first


@pytest.mark.parametrize("env", [TORCHRUN, DEEPSPEED, SRUN])
@pytest.mark.parametrize("text", ["", "three", "-1", "1.5"])
def test_a_malformed_variable_is_named(env: dict[str, str], text: str) -> None:
    """It says which, what it holds, and who set it; a rank that guessed would hang the others."""
    name = "SLURM_PROCID" if env is SRUN else "RANK"
    with pytest.raises(UserError, match=rf"^{name}: .*is not a number, though \w+ started this rank"):
        World.detect({**env, name: text})


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_a_missing_variable_is_named(missing: str) -> None:
    with pytest.raises(UserError, match=f"^{missing}: is not a number"):
        World.detect({name: value for name, value in TORCHRUN.items() if name != missing})


def test_a_machine_without_cuda_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"torch sees none on this machine; set cluster.name to cpu"):
        rank_device(World.detect({}), "cuda")


def test_on_cpu_every_rank_has_the_same_device() -> None:
    assert rank_device(World.detect(TORCHRUN), "cpu") == torch.device("cpu")


def test_unequal_nodes_are_refused() -> None:
    """4 ranks on one node and 2 on the other: a plan is made for nodes that are alike."""
    env = {**SRUN, "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "4,2"}
    with pytest.raises(UserError) as raised:
        World.detect(env)
    assert str(raised.value) == (
        "SLURM_STEP_TASKS_PER_NODE: 4,2 gives nodes unequal numbers of ranks (6 in all); "
        "start as many ranks on every node"
    )
