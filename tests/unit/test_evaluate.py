"""Scores equal those of a plain loop and of scikit-learn; what would be scored wrongly is refused, word by word."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
)

from launcher.data.prepare import prepare
from launcher.data.prepared import open_prepared
from launcher.job.load import parse_spec
from launcher.task import task_of
from tests import task_data
from tests.unit.small_models import LABELS, NUM_TEXTS, printed, refusal, rows_of, scored, small_models
from tools.demo import save_untrained
from tools.evaluate import main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models(tmp_path_factory.mktemp("evaluate"))


def plain_perplexity(home: Path, seq_len: int) -> tuple[int, float]:
    """Documents joined with </s> between them, cut into blocks, one block at a time through the model."""
    tokenizer = AutoTokenizer.from_pretrained(home / "gpt")
    model = AutoModelForCausalLM.from_pretrained(home / "gpt").eval()
    stream: list[int] = []
    for row in rows_of(home):
        stream += [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    blocks = [stream[i : i + seq_len] for i in range(0, len(stream), seq_len)]
    total, count = 0.0, 0
    for block in blocks:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([block])).logits[0]
        for position in range(len(block) - 1):
            target = torch.tensor(block[position + 1])
            total += functional.cross_entropy(logits[position].double(), target).item()
            count += 1
    return len(blocks), math.exp(total / count)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_perplexity_is_that_of_a_plain_loop(home: Path, capsys: pytest.CaptureFixture[str], batch_size: int) -> None:
    num_blocks, perplexity = plain_perplexity(home, 16)
    data = home / "rows.jsonl"
    said = scored(capsys, home / "gpt", "--task", "causal_lm", "--data", data, "--batch-size", batch_size)
    assert (said["task"], said["model"], said["data"]) == ("causal_lm", str(home / "gpt"), str(data))
    assert said["num_samples"] == num_blocks
    assert said["metrics"]["perplexity"] == printed(perplexity)
    assert said["metrics"]["loss"] == printed(math.log(perplexity))
    tokenizer, total = AutoTokenizer.from_pretrained(home / "gpt"), said["metrics"]["loss"] / math.log(2)
    assert said["metrics"]["bits_per_token"] == pytest.approx(total, rel=1e-5)
    texts = [" ".join(tokenizer.decode(tokenizer(row["text"])["input_ids"]).split()) for row in rows_of(home)]
    # blocks of 16 tokens lose the space before their first token, so they hold a few bytes less than the texts
    num_bytes = sum(len(text.encode()) for text in texts)
    per_token = said["metrics"]["bits_per_byte"] / said["metrics"]["bits_per_token"]
    assert 1 <= num_bytes * per_token / sum(len(tokenizer(row["text"])["input_ids"]) for row in rows_of(home)) < 1.2


@pytest.mark.parametrize("batch_size", [1, 16])
def test_classification_scores_are_those_of_scikit_learn(
    home: Path, capsys: pytest.CaptureFixture[str], batch_size: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(home / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(home / "bert").eval()
    predicted = []
    for row in rows_of(home):
        ids = tokenizer(row["text"], truncation=True, max_length=32, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            predicted.append(model.config.id2label[int(model(input_ids=ids).logits.argmax())])
    truth = [row["label"] for row in rows_of(home)]
    assert len(set(predicted)) > 1, "a model that always says the same would prove little"
    expected = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)[:3]
    argv = ("--task", "sequence_classification", "--data", home / "rows.jsonl", "--batch-size", batch_size)
    said = scored(capsys, home / "bert", *argv)
    assert said["num_samples"] == NUM_TEXTS
    found = said["metrics"]
    assert [found["precision"], found["recall"], found["f1"]] == [printed(value) for value in expected]
    assert found["accuracy"] == printed(accuracy_score(truth, predicted))


def prepared(home: Path, out: Path, task: str, model: str, labels: tuple[str, ...] | None = None, **data: Any) -> Path:
    section = {"train": str(home / "rows.jsonl"), "tokenizer": str(home / model), "validation_fraction": 0.5, **data}
    training = {"seq_len": 16, "global_batch_size": 2, "max_steps": 1}
    raw = {"output_dir": str(out), "model": {"path": str(home / model)}, "data": section}
    raw["task"] = {"name": task, "labels": list(labels)} if labels else task
    return prepare(parse_spec({**raw, "training": training})).folder


def test_prepared_data_gives_the_scores_of_the_same_texts_as_a_file(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here the held-out texts are the file itself; `--task` is known from the prepared data."""
    held_out = {"validation": str(home / "rows.jsonl")}
    for task, model, labels in (("causal_lm", "gpt", None), ("sequence_classification", "bert", LABELS)):
        folder = prepared(home, tmp_path / model, task, model, labels, **held_out)
        of_folder = scored(capsys, home / model, "--prepared", folder)
        of_file = scored(capsys, home / model, "--task", task, "--data", home / "rows.jsonl", "--seq-len", 16)
        assert of_folder["metrics"] == of_file["metrics"]
        assert of_folder["num_samples"] == of_file["num_samples"]


def test_a_plain_table_for_people(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(home / "gpt"), "--task", "causal_lm", "--data", str(home / "rows.jsonl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{home / 'gpt'} on {home / 'rows.jsonl'}: {plain_perplexity(home, 16)[0]} samples"
    assert [line.split()[0] for line in lines[1:]] == [
        "loss",
        "perplexity",
        "accuracy",
        "bits_per_token",
        "bits_per_byte",
    ]


def test_what_is_no_model_folder_is_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ("--task", "causal_lm", "--data", home / "rows.jsonl")
    missing = tmp_path / "missing"
    assert refusal(capsys, missing, *rest) == (
        f"MODEL: {missing} is not a folder; give a model folder, a run, or a checkpoint"
    )
    assert refusal(capsys, tmp_path, *rest) == (
        f"MODEL: {tmp_path} has no config.json; give a folder that `save_pretrained` wrote, or a hub id"
    )
    GPT2Config().save_pretrained(tmp_path)
    assert refusal(capsys, tmp_path, *rest).startswith(f"MODEL: {tmp_path} cannot be opened by AutoModelForCausalLM (")


def test_a_model_without_the_head_is_refused_by_the_name_of_what_is_missing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ("--task", "sequence_classification", "--data", home / "rows.jsonl")
    model = BertForMaskedLM(BertConfig.from_pretrained(home / "bert"))
    model.save_pretrained(tmp_path)
    assert refusal(capsys, tmp_path, *rest) == (
        f"MODEL: {tmp_path} has no weights for bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, "
        "classifier.weight; give a model that was trained for sequence_classification"
    )
    rest = ("--task", "causal_lm", "--data", home / "rows.jsonl")
    assert refusal(capsys, tmp_path, *rest) == (
        f"MODEL: {tmp_path} was saved as BertForMaskedLM, not as BertLMHeadModel; "
        "give a model that was trained for causal_lm"
    )


def test_labels_that_the_model_does_not_know_are_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "label": "ham"}\n{"text": "b", "label": "tofu"}\n')
    assert refusal(capsys, home / "bert", "--task", "sequence_classification", "--data", rows) == (
        f"{rows}:2: label: tofu is not a label of the model, which knows ham, eggs, spam; score it on texts of these labels"
    )
    rows.write_text('{"text": "a", "label": "ham"}\n{"text": "b", "label": "tofu"}\n' * 9)
    data = {"train": str(rows), "validation": str(rows)}
    folder = prepared(home, tmp_path / "run", "sequence_classification", "bert", **data)
    assert refusal(capsys, home / "bert", "--prepared", folder) == (
        f"--prepared: {folder} has the labels ham, tofu, the model ham, eggs, spam; give data prepared for this model"
    )


def test_sources_of_samples_that_will_not_do_are_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, task, rows = home / "gpt", ("--task", "causal_lm"), home / "rows.jsonl"
    neither = "--data and --prepared: need exactly one of the two; give files to score, or a folder of prepared data"
    assert refusal(capsys, model, *task) == neither
    assert refusal(capsys, model, *task, "--data", rows, "--prepared", home) == neither
    assert refusal(capsys, model, *task, "--prepared", home) == (
        f"--prepared: {home} holds no prepared data; give a folder that `fleetune prepare` made"
    )
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert refusal(capsys, model, *task, "--data", empty) == (f"{empty}: is empty; give files with text in them")
    assert refusal(capsys, model, "--data", rows) == (
        "--task: is missing; give one of causal_lm, chat, masked_lm, sequence_classification, regression, token_classification, extractive_qa, preference, perplexity, multiple_choice, cloze, generation, "
        "pseudo_perplexity"
    )
    assert refusal(capsys, model, *task, "--data", rows, "--seq-len", 17) == (
        "--seq-len: 17 is more tokens than the model's 16 positions; give at most 16"
    )
    assert refusal(capsys, model, *task, "--data", rows, "--batch-size", 0) == (
        "--batch-size: 0 is not a positive number; give 1 or more"
    )


def test_prepared_data_of_another_tokenizer_or_task_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"tokenizer": None, "train_tokenizer": {"kind": "bpe", "vocab_size": 390}}
    folder = prepared(home, tmp_path, "causal_lm", "gpt", **own)
    assert refusal(capsys, home / "gpt", "--prepared", folder) == (
        f"--prepared: {folder} was prepared with another tokenizer than the model's; score the texts themselves: --data FILE"
    )
    assert refusal(capsys, home / "gpt", "--prepared", folder, "--task", "sequence_classification") == (
        f"--task: sequence_classification is not what {folder} was prepared for; use causal_lm"
    )
    assert refusal(capsys, home / "gpt", "--prepared", folder, "--seq-len", 8) == (
        "--seq-len: 8 has no effect on prepared data, which was read and cut before; "
        "leave it out, or score files with --data"
    )


TINY = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
EVERY_TASK: dict[str, tuple[str, dict[str, Any], str]] = {
    # task -> (model, its options, a score that a model drawn at random has too)
    "chat": ("gpt2", {"chat_template": "plain"}, "perplexity"),
    "masked_lm": ("bert", {}, "perplexity"),
    "regression": ("bert", {}, "spearman"),
    "token_classification": ("bert", {}, "accuracy"),
    "extractive_qa": ("bert", {"doc_stride": 8}, "f1"),
    "preference": ("gpt2", {"chat_template": "plain"}, "reward_margin"),
}


@pytest.mark.parametrize("task", EVERY_TASK)
def test_every_task_is_scored_on_prepared_data_and_on_files(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model with random weights, as a run begins with: the held-out samples score the same as the file they are from."""
    family, options, score = EVERY_TASK[task]
    data = str(task_data.write_rows(tmp_path / "rows.jsonl", task_data.rows_of(task, 30)))
    sizes = TINY if family == "bert" else {"n_layer": 1, "n_embd": 16, "n_head": 2}
    raw = {
        "output_dir": str(tmp_path / "run"),
        "model": {"from_config": {"model_type": family, **sizes}},
        "task": {"name": task, **options},
        "data": {"train": data, "validation": data, "train_tokenizer": {"kind": "bpe", "vocab_size": 400}},
        "training": {"seq_len": 64, "global_batch_size": 2, "max_steps": 1},
    }
    spec = parse_spec(raw)
    prepare(spec)
    held = open_prepared(spec)
    model = tmp_path / "model"
    save_untrained(spec, task_of(spec, held.facts(spec.task)), held, model)
    more: list[object] = []
    if task == "preference":
        save_untrained(spec.model_copy(update={"seed": 1}), task_of(spec), held, tmp_path / "before")
        more = ["--reference", tmp_path / "before"]
    capsys.readouterr()
    of_folder = scored(capsys, model, "--prepared", held.folder, *more)
    sets = [word for key, value in options.items() for word in ("--set", f"task.{key}={value}")]
    of_file = scored(capsys, model, "--task", task, "--data", data, "--seq-len", 64, *sets, *more)
    # a long sentence is several prepared rows, and one example of a file
    assert of_folder["num_samples"] >= of_file["num_samples"] > 0
    assert of_folder["num_samples"] == of_file["num_samples"] or task == "token_classification"
    assert of_folder["metrics"] == pytest.approx(of_file["metrics"], nan_ok=True)
    assert math.isfinite(of_folder["metrics"][score])


def test_a_preference_needs_what_it_is_measured_against(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", home / "rows.jsonl")
    assert refusal(capsys, home / "gpt", "--task", "preference", *data) == (
        "--reference: is missing: a preference is measured against the model before it was trained; "
        "give that model's folder"
    )
    assert refusal(capsys, home / "gpt", "--task", "causal_lm", *data, "--reference", home) == (
        f"--reference: {home} has no effect on causal_lm: it belongs to preference; leave it out"
    )
