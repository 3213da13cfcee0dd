"""Groups of ranks, offload and kept parameters change where things lie, never what is computed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from launcher.data.prepare import prepare
from launcher.job import parse_spec
from tests.distributed.test_parity import RANKS, RELATIVE, STEPS, plain_run
from tests.support import job, records, run_ranks, torchrun
from tools.convert import convert

OFFLOADED = {"offload_optimizer": "cpu"}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "hsdp-2x2": (4, {"strategy": "hsdp", "shard_group_size": 2}),
    "hsdp-2x2-kept": (4, {"strategy": "hsdp", "shard_group_size": 2, "reshard_after_forward": False}),
    "fsdp-kept": (4, {"strategy": "fsdp", "reshard_after_forward": False}),
    "hpz-2x2": (4, {"strategy": "hpz", "shard_group_size": 2}),
    "hpz-2x2-offloaded": (4, {"strategy": "hpz", "shard_group_size": 2, **OFFLOADED}),
    "zero1-offloaded": (2, {"strategy": "zero1", **OFFLOADED}),
    "zero2-offloaded": (2, {"strategy": "zero2", **OFFLOADED}),
    "zero3-offloaded": (2, {"strategy": "zero3", **OFFLOADED}),
    "zero3-all-offloaded": (2, {"strategy": "zero3", "offload_params": "cpu", **OFFLOADED}),
    "zero3-params-offloaded": (2, {"strategy": "zero3", "offload_params": "cpu"}),
    "fsdp-offloaded": (4, {"strategy": "fsdp", "offload_params": "cpu", **OFFLOADED}),
}
"""Name -> ranks and `parallel`."""


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(parse_spec(job(folder, corpus, "gpt", data__prepared=str(folder))))
    return folder


@pytest.fixture(scope="module")
def runs(prepared: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs: one launch for each number of ranks."""
    root = tmp_path_factory.mktemp("runs")
    for name in CASES:
        written(root, corpus, prepared, name)
    train(root, list(CASES))
    return root


def train(root: Path, names: list[str]) -> None:
    for num_ranks in sorted({CASES[name][0] for name in names}):
        paths = [root / f"{name}.yaml" for name in names if CASES[name][0] == num_ranks]
        log = root / f"log-{num_ranks}"
        assert run_ranks(torchrun(num_ranks, RANKS, *paths), log, 900) == 0, log.read_text()[-6000:]


def written(root: Path, corpus: Path, prepared: Path, name: str) -> None:
    """Accumulation 2, so that what is kept between micro-batches counts; saved every ten steps."""
    ranks, parallel = CASES[name]
    parallel = {"micro_batch_size": 4 // ranks, "recompute": "none", "precision": "fp32", **parallel}
    raw = job(root / name, corpus, "gpt", data__prepared=str(prepared), parallel=parallel)
    raw["cluster"]["gpus_per_node"] = ranks
    raw |= {"checkpoint": {"every_steps": 10}}
    (root / f"{name}.yaml").write_text(yaml.safe_dump(raw))


@pytest.fixture(scope="module")
def reference(prepared: Path, corpus: Path) -> tuple[list[float], Any]:
    return plain_run(prepared, corpus, "gpt")


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


@pytest.mark.parametrize("name", CASES)
def test_losses_follow_one_plain_process(runs: Path, reference: tuple[list[float], Any], name: str) -> None:
    """20 steps: each loss within 1e-4 relative of plain transformers in one process."""
    ours = losses(runs / name)
    assert len(ours) == STEPS
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, reference[0], strict=True))
    print(f"parity {name}: worst relative difference {worst:.1e}")
    assert worst < RELATIVE


@pytest.mark.parametrize("name", CASES)
def test_checkpoints_convert_to_the_weights_of_one_plain_process(
    runs: Path, reference: tuple[list[float], Any], name: str, tmp_path: Path
) -> None:
    """Every parameter, wherever it lay, to what 20 steps of fp32 rounding leave."""
    convert(str(runs / name), f"hf:{tmp_path / 'out'}")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in reference[1].named_parameters():
        torch.testing.assert_close(ours[key], value.detach(), rtol=0, atol=5e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_resumed_runs_equal_straight_ones(runs: Path) -> None:
    """Steps 11 to 20 again, from the checkpoint of step 10: the same losses, bit for bit."""
    names = ["hsdp-2x2", "fsdp-offloaded", "hpz-2x2", "zero2-offloaded", "zero3-all-offloaded"]
    straight = {name: losses(runs / name) for name in names}
    for name in names:
        shutil.rmtree(runs / name / "checkpoints" / "step-00000020")
    train(runs, names)
    for log in ("log-2", "log-4"):
        assert "resuming from" in (runs / log).read_text()
    assert {name: losses(runs / name) for name in names} == straight
