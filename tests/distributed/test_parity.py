"""Every engine, with any accumulation, follows the loss curve of one plain process."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from launcher.data.order import GlobalOrder
from launcher.data.prepare import prepare
from launcher.job import JobSpec, parse_spec
from tests.support import job, records, run_ranks, torchrun

STEPS = 20
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
ACCUMULATIONS = (1, 4)
FAMILIES = ("gpt", "bert")
RELATIVE = 1e-4
RANKS = Path(__file__).with_name("parity_ranks.py")


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parity")
    for family in FAMILIES:
        prepare(parse_spec(job(root / family, corpus, family, data__prepared=str(root / family))))
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module")
def curves(prepared: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[float]]:
    """Losses by (family, strategy, accumulation), from one pair of ranks that trains them all."""
    root = tmp_path_factory.mktemp("runs")
    cases = list(product(FAMILIES, STRATEGIES, ACCUMULATIONS))
    paths = []
    for family, strategy, accumulation in cases:
        name = f"{family}-{strategy}-{accumulation}"
        parallel = {"strategy": strategy, "micro_batch_size": 4 // accumulation, "recompute": "none"}
        raw = job(root / name, corpus, family, data__prepared=str(prepared[family]), parallel=parallel)
        paths.append(root / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(raw))
    log = root / "log"
    assert run_ranks(torchrun(2, RANKS, *paths), log) == 0, log.read_text()[-3000:]
    return {case: [r["loss"] for r in records(root / "-".join(map(str, case)))] for case in cases}


@pytest.fixture(scope="module")
def references(prepared: dict[str, Path], corpus: Path) -> dict[str, list[float]]:
    return {family: plain_losses(prepared[family], corpus, family) for family in FAMILIES}


def plain_losses(folder: Path, corpus: Path, family: str) -> list[float]:
    return plain_run(folder, corpus, family)[0]


def plain_run(
    folder: Path, corpus: Path, family: str, adapted: Callable[[Any], Any] = lambda model: model
) -> tuple[list[float], Any]:
    """One process, one batch per step, transformers' own head and loss mean over the valid targets, torch's AdamW.

    Losses, and the model at the end. adapted: what is trained in place of the whole model.
    """
    import datasets

    spec = parse_spec(job(folder, corpus, family))
    data = datasets.load_from_disk(str(folder))["train"]
    model = adapted(plain_model(spec, folder, family, data)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in trained if p.ndim > 1]
    rest = [p for p in trained if p.ndim == 1]
    training = spec.training
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": training.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=training.lr,
    )
    schedule = transformers.get_scheduler("cosine", optimizer, training.warmup_steps, STEPS)
    order = GlobalOrder(len(data), spec.seed)
    losses = []
    for step in range(STEPS):
        rows = [data[int(i)] for i in order.samples(step * training.global_batch_size, training.global_batch_size)]
        loss = model(**_batch(rows, family)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def plain_model(spec: JobSpec, folder: Path, family: str, data: Any) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    raw = dict(spec.model.from_config)
    config = transformers.AutoConfig.for_model(
        **raw, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=2
    )
    classes = {"gpt": transformers.AutoModelForCausalLM, "bert": transformers.AutoModelForSequenceClassification}
    torch.manual_seed(spec.seed)
    return classes[family].from_config(config).train()


def _batch(rows: list[dict[str, Any]], family: str) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [3] * (longest - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    labels = ids.masked_fill(mask == 0, -100) if family == "gpt" else torch.tensor([row["label"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(("family", "strategy", "accumulation"), list(product(FAMILIES, STRATEGIES, ACCUMULATIONS)))
def test_losses_follow_one_plain_process(
    curves: dict[Any, list[float]],
    references: dict[str, list[float]],
    family: str,
    strategy: str,
    accumulation: int,
    record_property: pytest.RecordProperty,
) -> None:
    """20 steps on 2 ranks, uneven rows: each loss within 1e-4 relative of plain transformers in one process."""
    ours, reference = curves[family, strategy, accumulation], references[family]
    assert len(ours) == STEPS
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True))
    record_property("worst_relative", worst)
    print(f"parity {family} {strategy} accumulation {accumulation}: worst relative difference {worst:.1e}")
    assert worst < RELATIVE
    assert max(reference) - min(reference) > 100 * RELATIVE * reference[0], (
        "a curve that stood still would prove little"
    )
