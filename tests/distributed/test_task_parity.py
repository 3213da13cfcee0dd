"""Every task, on three engines, follows the loss curve of one plain process: transformers' own head and loss, or for what
transformers has no loss, torch's, written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
import yaml
from torch.nn import functional

from launcher.data.order import GlobalOrder
from launcher.data.prepare import prepare
from launcher.job import JobSpec, parse_spec
from launcher.task.masking import mask_tokens
from tests.support import job, records, run_ranks, torchrun
from tests.task_data import rows_of, write_rows

STEPS = 20
STRATEGIES = ("ddp", "zero2", "fsdp")
RELATIVE = 1e-4
RANKS = Path(__file__).with_name("parity_ranks.py")

Rows = list[dict[str, Any]]
Loss = Callable[[Any, Rows, "Case"], torch.Tensor]


class Case(NamedTuple):
    family: str
    task: dict[str, Any]
    auto_class: str
    loss: Loss
    config: dict[str, Any] = {}  # noqa: RUF012 - never altered
    rows: str | None = None
    """Which records, where they are not called as the task."""


def padded(lists: list[list[int]], fill: int) -> torch.Tensor:
    longest = max(map(len, lists))
    return torch.tensor([list(numbers) + [fill] * (longest - len(numbers)) for numbers in lists])


def inputs(rows: Rows, is_pair: bool = False) -> dict[str, torch.Tensor]:
    ids = [row["input_ids"] for row in rows]
    batch = {"input_ids": padded(ids, 3), "attention_mask": padded([[1] * len(one) for one in ids], 0)}
    if is_pair:
        kinds = [[0] * row["second"] + [1] * (len(row["input_ids"]) - row["second"]) for row in rows]
        batch["token_type_ids"] = padded(kinds, 0)
    return batch


def own_loss(model: Any, batch: dict[str, torch.Tensor], **targets: torch.Tensor) -> torch.Tensor:
    """transformers' own: the mean over the valid targets."""
    loss: torch.Tensor = model(**batch, **targets).loss
    return loss


def chat(model: Any, rows: Rows, case: Case) -> torch.Tensor:
    labels = [[i if m else -100 for i, m in zip(r["input_ids"], r["loss_mask"], strict=True)] for r in rows]
    return own_loss(model, inputs(rows), labels=padded(labels, -100))


def masked(model: Any, rows: Rows, case: Case) -> torch.Tensor:
    options = {"mask_id": 6, "vocab_size": 400}
    drawn = [
        mask_tokens(np.array(row["input_ids"]), np.array(row["words"]) == 0, 11, row["sample"], row["epoch"], **options)
        for row in rows
    ]
    shown = [{"input_ids": ids.tolist()} for ids, _ in drawn]
    return own_loss(model, inputs(shown), labels=padded([labels.tolist() for _, labels in drawn], -100))


def weighted(model: Any, rows: Rows, case: Case) -> torch.Tensor:
    logits = model(**inputs(rows, is_pair=True)).logits
    weight = torch.tensor(case.task["class_weights"])
    labels = torch.tensor([row["label"] for row in rows])
    return functional.cross_entropy(logits, labels, weight=weight, label_smoothing=case.task["label_smoothing"])


def several(model: Any, rows: Rows, case: Case) -> torch.Tensor:
    labels = torch.zeros(len(rows), 3)
    for number, row in enumerate(rows):
        labels[number, row["label"]] = 1.0
    return own_loss(model, inputs(rows), labels=labels)


def number(model: Any, rows: Rows, case: Case) -> torch.Tensor:
    return own_loss(model, inputs(rows), labels=torch.tensor([row["target"] for row in rows]).float())


def tags(model: Any, rows: Rows, case: Case) -> torch.Tensor:
    labels = []
    for row in rows:
        last = -1
        labels.append([])
        for word in row["words"]:
            labels[-1].append(row["label"][word] if word not in (-1, last) else -100)
            last = word
    return own_loss(model, inputs(rows), labels=padded(labels, -100))


def answer(model: Any, rows: Rows, case: Case) -> torch.Tensor:
    """transformers' loss of each window alone: in a batch it would count padding among the choices."""
    losses = []
    for row in rows:
        places = {f"{name}_positions": torch.tensor([row[name]]) for name in ("start", "end")}
        losses.append(own_loss(model, inputs([row], is_pair=case.family == "bert"), **places))
    return torch.stack(losses).mean()


def logps(model: Any, rows: Rows) -> torch.Tensor:
    """(B, 2): of the chosen and the rejected answer, one sequence at a time."""
    found = []
    for row in rows:
        for part in (slice(0, row["second"]), slice(row["second"], None)):
            ids, mask = torch.tensor([row["input_ids"][part]]), torch.tensor(row["loss_mask"][part])
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            found.append((scores.gather(-1, ids[0, 1:, None])[:, 0] * mask[1:]).sum())
    return torch.stack(found).reshape(-1, 2)


def dpo(model: Any, rows: Rows, case: Case) -> torch.Tensor:
    """TRL's sigmoid loss, written out; the reference is a copy made before the first step."""
    if not hasattr(model, "reference"):
        object.__setattr__(model, "reference", copy.deepcopy(model).eval())
    with torch.no_grad():
        reference = logps(model.reference, rows)
    policy = logps(model, rows)
    ratios = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    return -functional.logsigmoid(case.task["beta"] * ratios).mean()


LABELS = ["call", "code", "prose"]
PAIRS = {"name": "sequence_classification", "labels": LABELS, "class_weights": [2.0, 0.5, 1.0], "label_smoothing": 0.1}
SEVERAL = {"name": "sequence_classification", "multi_label": True, "labels": ["code", "call", "long"]}
CLASSIFIER = "AutoModelForSequenceClassification"
FEW = {"num_labels": 3}
CASES = {
    "chat": Case("gpt", {"name": "chat", "chat_template": "plain"}, "AutoModelForCausalLM", chat),
    "masked_lm": Case("bert", {"name": "masked_lm"}, "AutoModelForMaskedLM", masked),
    "pairs, weighted and smoothed": Case("bert", PAIRS, CLASSIFIER, weighted, FEW),
    "several labels": Case(
        "gpt", SEVERAL, CLASSIFIER, several, {**FEW, "problem_type": "multi_label_classification"}, "multi_label"
    ),
    "regression": Case("bert", {"name": "regression"}, CLASSIFIER, number, {"num_labels": 1}),
    "tags, bert": Case(
        "bert", {"name": "token_classification"}, "AutoModelForTokenClassification", tags, {"num_labels": 4}
    ),
    # no tags with a GPT: transformers puts a dropout of 0.1 before its head, which no key of its config turns off
    "questions, bert": Case(
        "bert", {"name": "extractive_qa", "doc_stride": 8}, "AutoModelForQuestionAnswering", answer
    ),
    "questions, gpt": Case("gpt", {"name": "extractive_qa", "doc_stride": 8}, "AutoModelForQuestionAnswering", answer),
    "preference": Case(
        "gpt", {"name": "preference", "beta": 0.5, "chat_template": "plain"}, "AutoModelForCausalLM", dpo
    ),
}


def raw_job(root: Path, name: str, out: str, **overrides: Any) -> dict[str, Any]:
    case = CASES[name]
    raw = job(
        root / out, root / f"{name}.jsonl", case.family, task=case.task, data__prepared=str(root / f"{name} data")
    )
    raw["data"].pop("packing", None)
    # a decaying rate from a high peak: the loss must move, or the curve would prove little
    raw["training"] |= {"lr": 5e-3}
    return {**raw, **overrides}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records and prepared data of every case."""
    root = tmp_path_factory.mktemp("tasks")
    for name, case in CASES.items():
        write_rows(root / f"{name}.jsonl", rows_of(case.rows or case.task["name"]))
        prepare(parse_spec(raw_job(root, name, "none")))
    return root


@pytest.fixture(scope="module")
def curves(root: Path) -> dict[tuple[str, str], list[float]]:
    """Losses by (case, strategy), from one pair of ranks that trains them all."""
    paths = []
    for name, strategy in product(CASES, STRATEGIES):
        parallel = {"strategy": strategy, "micro_batch_size": 2, "recompute": "none"}
        raw = raw_job(root, name, f"{name} {strategy}", parallel=parallel, checkpoint={"keep_last": 1})
        paths.append(root / f"{name} {strategy}.yaml")
        paths[-1].write_text(yaml.safe_dump(raw))
    log = root / "log"
    assert run_ranks(torchrun(2, RANKS, *paths), log, timeout_seconds=900) == 0, log.read_text()[-3000:]
    return {(n, s): [r["loss"] for r in records(root / f"{n} {s}")] for n, s in product(CASES, STRATEGIES)}


def plain_losses(root: Path, name: str) -> list[float]:
    """One process, one batch per step, torch's AdamW."""
    import datasets

    case, spec = CASES[name], parse_spec(raw_job(root, name, "none"))
    data = datasets.load_from_disk(str(root / f"{name} data"))["train"]
    model = _model(spec, case, root / f"{name} data")
    decay, rest = ([p for p in model.parameters() if (p.ndim > 1) == big] for big in (True, False))
    training = spec.training
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": training.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=training.lr,
    )
    schedule = transformers.get_scheduler("cosine", optimizer, training.warmup_steps, STEPS)
    order, size, losses = GlobalOrder(len(data), spec.seed), training.global_batch_size, []
    for step in range(STEPS):
        ids = order.samples(step * size, size)
        epochs = (step * size + np.arange(size)) // len(data)
        rows = [{**data[int(i)], "sample": int(i), "epoch": int(e)} for i, e in zip(ids, epochs, strict=True)]
        loss = case.loss(model, rows, case)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _model(spec: JobSpec, case: Case, folder: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert isinstance(spec.model.from_config, dict)
    config = transformers.AutoConfig.for_model(
        **spec.model.from_config, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **case.config
    )
    torch.manual_seed(spec.seed)
    return getattr(transformers, case.auto_class).from_config(config).train()


@pytest.mark.parametrize("name", CASES)
def test_losses_follow_one_plain_process(
    curves: dict[tuple[str, str], list[float]], root: Path, name: str, record_property: pytest.RecordProperty
) -> None:
    """20 steps on 2 ranks with accumulation 2, uneven rows and targets: each loss within 1e-4 relative."""
    reference = plain_losses(root, name)
    for strategy in STRATEGIES:
        ours = curves[name, strategy]
        assert len(ours) == STEPS
        worst = max(abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True))
        record_property(strategy, worst)
        print(f"parity {name} {strategy}: worst relative difference {worst:.1e}")
        assert worst < RELATIVE
    assert max(reference) - min(reference) > 100 * RELATIVE * reference[0], "a curve that stood still proves little"
