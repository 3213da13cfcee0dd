"""Adapters and frozen parameters on every engine: the loss curve, and the tensors, of peft in one plain process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import yaml

from launcher.data.prepare import prepare
from launcher.job import parse_spec
from tests.distributed.test_parity import RANKS, RELATIVE, STEPS, plain_run
from tests.support import job, records, run_ranks, torchrun

LORA = {"name": "lora", "r": 3, "lora_alpha": 12.0}  # an odd rank: no engine can cut the adapters evenly
ENGINES = ("ddp", "fsdp", "zero2", "zero3")
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"gpt-{engine}": ("gpt", engine, LORA) for engine in ENGINES},
    "bert-fsdp": ("bert", "fsdp", {**LORA, "use_dora": True}),
    "bert-zero3": ("bert", "zero3", {**LORA, "use_dora": True}),
    "frozen-fsdp": ("gpt", "fsdp", {"freeze_embeddings": True, "freeze_blocks": 1}),
    "frozen-zero2": ("gpt", "zero2", {"freeze_embeddings": True, "freeze_blocks": 1}),
    "frozen-zero3": ("gpt", "zero3", {"freeze_embeddings": True, "freeze_blocks": 1}),
}
"""Name -> family, strategy, `method`. Two ranks, recompute, accumulation 2."""


def reference_of(name: str) -> str:
    return name.partition("-")[0]


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lora")
    for family in ("gpt", "bert"):
        prepare(parse_spec(job(root / family, corpus, family, data__prepared=str(root / family))))
    return {family: root / family for family in ("gpt", "bert")}


@pytest.fixture(scope="module")
def runs(prepared: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs, trained by one pair of ranks."""
    root = tmp_path_factory.mktemp("runs")
    paths = []
    for name, (family, strategy, method) in RUNS.items():
        parallel = {"strategy": strategy, "micro_batch_size": 2, "recompute": "full", "precision": "fp32"}
        raw = job(root / name, corpus, family, data__prepared=str(prepared[family]), parallel=parallel, method=method)
        paths.append(root / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(raw))
    log = root / "log"
    assert run_ranks(torchrun(2, RANKS, *paths), log, 600) == 0, log.read_text()[-6000:]
    return root


@pytest.fixture(scope="module")
def references(prepared: dict[str, Path], corpus: Path) -> dict[str, tuple[list[float], Any]]:
    """Losses and the trained model of one plain process, for each of the three methods."""
    return {
        "gpt": plain_run(prepared["gpt"], corpus, "gpt", with_adapters),
        "bert": plain_run(prepared["bert"], corpus, "bert", with_dora),
        "frozen": plain_run(prepared["gpt"], corpus, "gpt", frozen),
    }


def with_adapters(model: Any) -> Any:
    return peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def with_dora(model: Any) -> Any:
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", task_type="SEQ_CLS", use_dora=True)
    return peft.get_peft_model(model, config)


def frozen(model: Any) -> Any:
    model.transformer.wte.requires_grad_(False)
    model.transformer.wpe.requires_grad_(False)
    model.transformer.h[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("name", RUNS)
def test_losses_follow_one_plain_process(runs: Path, references: dict[str, Any], name: str) -> None:
    """20 steps: each loss within 1e-4 relative of peft (or a model with frozen parts) in one process."""
    ours, theirs = [record["loss"] for record in records(runs / name)], references[reference_of(name)][0]
    assert len(ours) == STEPS
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    print(f"parity {name}: worst relative difference {worst:.1e}")
    assert worst < RELATIVE
    assert max(theirs) - min(theirs) > 100 * RELATIVE * theirs[0], "a curve that stood still would prove little"
