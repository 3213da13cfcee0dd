"""Groups of ranks, offload and kept parameters change where things lie, never what is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.data.prepare import prepare
from launcher.job import parse_spec
from tests.distributed.test_parity import RANKS, RELATIVE, STEPS, plain_losses
from tests.support import job, records, run_ranks, torchrun

OFFLOADED = {"offload_optimizer": "cpu"}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "hsdp-2x2": (4, {"strategy": "hsdp", "shard_group_size": 2}),
    "hsdp-2x2-kept": (4, {"strategy": "hsdp", "shard_group_size": 2, "reshard_after_forward": False}),
    "fsdp-kept": (4, {"strategy": "fsdp", "reshard_after_forward": False}),
    "hpz-2x2": (4, {"strategy": "hpz", "shard_group_size": 2}),
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
def curves(prepared: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses by case: one launch for each number of ranks, which trains all of its cases."""
    root = tmp_path_factory.mktemp("runs")
    for num_ranks in sorted({ranks for ranks, _ in CASES.values()}):
        paths = [written(root, corpus, prepared, name) for name, (ranks, _) in CASES.items() if ranks == num_ranks]
        log = root / f"log-{num_ranks}"
        assert run_ranks(torchrun(num_ranks, RANKS, *paths), log, 600) == 0, log.read_text()[-6000:]
    return {name: [record["loss"] for record in records(root / name)] for name in CASES}


def written(root: Path, corpus: Path, prepared: Path, name: str) -> Path:
    """Accumulation 2, so that what is kept between micro-batches counts."""
    ranks, parallel = CASES[name]
    parallel = {"micro_batch_size": 4 // ranks, "recompute": "none", "precision": "fp32", **parallel}
    raw = job(root / name, corpus, "gpt", data__prepared=str(prepared), parallel=parallel)
    raw["cluster"]["gpus_per_node"] = ranks
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def reference(prepared: Path, corpus: Path) -> list[float]:
    return plain_losses(prepared, corpus, "gpt")


@pytest.mark.parametrize("name", CASES)
def test_losses_follow_one_plain_process(curves: dict[str, list[float]], reference: list[float], name: str) -> None:
    """20 steps: each loss within 1e-4 relative of plain transformers in one process."""
    assert len(curves[name]) == STEPS
    worst = max(abs(a - b) / abs(b) for a, b in zip(curves[name], reference, strict=True))
    print(f"parity {name}: worst relative difference {worst:.1e}")
    assert worst < RELATIVE
