"""Packed rows, rows by length and mixtures train, on every engine, as one plain process does on the documents alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

from launcher.data.mixture import MixtureOrder, Source
from launcher.data.order import GlobalOrder
from launcher.data.pack import pack
from launcher.data.prepare import prepare
from launcher.data.prepared import open_folder
from launcher.job import parse_spec
from tests.support import BATCH, job, records, run_ranks, torchrun

STEPS = 8
RELATIVE = 1e-4
RANKS = Path(__file__).with_name("parity_ranks.py")
CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "packed-ddp": ("gpt", "ddp", 4, {"packing": "best_fit"}),
    "packed-ddp-accumulated": ("gpt", "ddp", 1, {"packing": "best_fit"}),
    "packed-zero2": ("gpt", "zero2", 2, {"packing": "best_fit"}),
    "packed-zero3": ("gpt", "zero3", 2, {"packing": "best_fit"}),
    "packed-fsdp": ("gpt", "fsdp", 2, {"packing": "best_fit"}),
    "by-length-ddp": ("gpt", "ddp", 2, {"batching": "by_length"}),
    "by-length-zero2-bert": ("bert", "zero2", 1, {"batching": "by_length"}),
    "mixture-ddp": ("gpt", "ddp", 2, {"weight": 3.0}),
    "packed-mixture-fsdp": ("gpt", "fsdp", 2, {"packing": "best_fit", "weight": 3.0}),
}


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per family, and a second one with the first's tokenizer to mix in."""
    root = tmp_path_factory.mktemp("prepared")
    for family in ("gpt", "bert"):
        prepare(parse_spec(job(root / family, corpus, family, data__prepared=str(root / family))))
    other = root / "other.jsonl"
    other.write_text("".join(f"{json.dumps({'text': line[::-1]})}\n" for line in corpus.read_text().split("\n")[:80]))
    raw = job(root / "other", other, "gpt", data__prepared=str(root / "other"))
    raw["data"] = {**raw["data"], "tokenizer": str(root / "gpt" / "tokenizer")}
    del raw["data"]["train_tokenizer"]
    prepare(parse_spec(raw))
    return {name: root / name for name in ("gpt", "bert", "other")}


def spec_of(folder: Path, corpus: Path, prepared: dict[str, Path], case: str) -> dict[str, Any]:
    family, strategy, micro, data = CASES[case]
    parallel = {"strategy": strategy, "micro_batch_size": micro, "recompute": "none"}
    raw = job(folder, corpus, family, data__prepared=str(prepared[family]), parallel=parallel)
    raw["data"] |= data
    if "mixture" in case:
        raw["data"]["mixture"] = [{"prepared": str(prepared["other"]), "weight": 1}]
    raw["training"]["max_steps"] = STEPS
    return raw


@pytest.fixture(scope="module")
def curves(prepared: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of every case, from one pair of ranks that trains them all."""
    root = tmp_path_factory.mktemp("runs")
    for case in CASES:
        (root / f"{case}.yaml").write_text(yaml.safe_dump(spec_of(root / case, corpus, prepared, case)))
    log = root / "log"
    code = run_ranks(torchrun(2, RANKS, *(root / f"{case}.yaml" for case in CASES)), log)
    assert code == 0, log.read_text()[-3000:]
    return {case: [r["loss"] for r in records(root / case)] for case in CASES}


def plain_losses(prepared: dict[str, Path], corpus: Path, case: str) -> list[float]:
    """One process, one document after another, each alone in its forward pass; torch's AdamW."""
    family = CASES[case][0]
    spec = parse_spec(spec_of(Path("unused"), corpus, prepared, case))
    model = _model(spec, prepared[family], family)
    decay, rest = ([p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": decay, "weight_decay": spec.training.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=spec.training.lr)
    schedule = transformers.get_scheduler("cosine", optimizer, spec.training.warmup_steps, STEPS)
    losses = []
    for documents in _steps(spec, prepared, family, case):
        per_document = [_loss(model, document, family) for document in documents]
        num_targets = sum(number for _, number in per_document)
        loss = sum(loss for loss, _ in per_document) / num_targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _model(spec: Any, folder: Path, family: str) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    raw = dict(spec.model.from_config)
    config = transformers.AutoConfig.for_model(
        **raw, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=2
    )
    classes = {"gpt": transformers.AutoModelForCausalLM, "bert": transformers.AutoModelForSequenceClassification}
    torch.manual_seed(spec.seed)
    return classes[family].from_config(config).train()


def _steps(spec: Any, prepared: dict[str, Path], family: str, case: str) -> list[list[dict[str, Any]]]:
    """The documents of every global batch."""
    splits = [open_folder(prepared[family]).split("train")]
    if "mixture" in case:
        splits.append(open_folder(prepared["other"]).split("train"))
    units: list[list[Any]] = []
    for split in splits:
        rows = split.rows(np.arange(len(split)))
        bins = pack(split, spec.training.seq_len).bins
        units.append(
            [[rows[i] for i in bins.of(b)] for b in range(len(bins))] if "packed" in case else [[r] for r in rows]
        )
    if "mixture" not in case:
        ids = GlobalOrder(len(units[0]), spec.seed).samples(0, STEPS * BATCH)
        drawn = [units[0][i] for i in ids]
    else:
        names = [open_folder(prepared[name]).fingerprint for name in (family, "other")]
        if "packed" in case:
            digests = [pack(split, spec.training.seq_len).digest for split in splits]
            names = [f"{name}+{digest}" for name, digest in zip(names, digests, strict=True)]
        sources = (Source(names[0], len(units[0]), 3), Source(names[1], len(units[1]), 1))
        places = MixtureOrder(sources, spec.seed).places(0, STEPS * BATCH)
        assert np.bincount(places.sources).tolist() == [STEPS * BATCH * 3 // 4, STEPS * BATCH // 4]
        drawn = [units[s][i] for s, i in zip(places.sources, places.samples, strict=True)]
    return [[row for unit in drawn[i : i + BATCH] for row in unit] for i in range(0, len(drawn), BATCH)]


def _loss(model: Any, row: dict[str, Any], family: str) -> tuple[Any, int]:
    ids = torch.tensor(row["input_ids"].astype(np.int64))[None]
    if family == "bert":
        logits = model(input_ids=ids).logits
        return torch.nn.functional.cross_entropy(logits, torch.tensor([row["label"]]), reduction="sum"), 1
    logits = model(input_ids=ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"), ids.shape[1] - 1


@pytest.mark.parametrize("case", CASES)
def test_losses_follow_the_documents_alone(
    curves: dict[str, list[float]], prepared: dict[str, Path], corpus: Path, case: str
) -> None:
    """8 steps on 2 ranks: each loss within 1e-4 relative of one process that sees each document by itself."""
    reference = plain_losses(prepared, corpus, case)
    assert len(curves[case]) == STEPS
    worst = max(abs(a - b) / abs(b) for a, b in zip(curves[case], reference, strict=True))
    print(f"{case}: worst relative difference {worst:.1e}")
    assert worst < RELATIVE
