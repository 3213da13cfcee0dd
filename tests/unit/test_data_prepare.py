"""Prepared data: an ordinary datasets folder, the same bytes every time, whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.fingerprint import options_fingerprint
from launcher.data.prepare import prepare
from launcher.data.prepared import PreparedData, open_prepared
from launcher.data.shards import token_dtype
from launcher.data.split import is_held_out
from launcher.errors import DataError
from launcher.job.load import parse_spec
from launcher.job.spec import JobSpec
from launcher.task import Record

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "quietly",
    "mix",
    "potions",
]


def sentence(number: int) -> str:
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS, size=int(rng.integers(3, 30)))) + f" {number}"


def write_rows(path: Path, numbers: range) -> None:
    rows = [{"text": sentence(n), "label": ["no", "yes"][n % 2]} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def spec_of(**overrides: Any) -> JobSpec:
    """Paths are relative: the test runs inside its folder."""
    data = {"train": "rows.jsonl", "train_tokenizer": {"kind": "bpe", "vocab_size": 400}, "validation_fraction": 0.2}
    return parse_spec(
        {
            "output_dir": "out",
            "model": {"from_config": {"model_type": "gpt2"}},
            "task": overrides.pop("task", "causal_lm"),
            "data": {**data, **overrides.pop("data", {})},
            "training": {"seq_len": 32, "global_batch_size": 8, "max_steps": 3, **overrides.pop("training", {})},
            **overrides,
        }
    )


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), range(2500))
    return Path("rows.jsonl")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def error_of(call: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


def all_rows(prepared: PreparedData, split: str) -> list[dict[str, Any]]:
    part = prepared.split(split)
    return part.rows(np.arange(len(part)))


@pytest.mark.parametrize("packing", ["concat", "none"])
def test_datasets_opens_what_our_reader_reads(packing: str) -> None:
    import datasets

    spec = spec_of(data={"packing": packing})
    info = prepare(spec)
    prepared = open_prepared(spec, verify=True)
    opened = datasets.load_from_disk("out/data")
    assert list(opened) == ["train", "validation"]
    for split, table in opened.items():
        ours = all_rows(prepared, split)
        assert [row["input_ids"].tolist() for row in ours] == table["input_ids"][:]
        assert ours[0]["input_ids"].dtype == np.uint16
        assert not ours[0]["input_ids"].flags.owndata
        assert len(table) == info.index["splits"][split]["num_samples"] == len(prepared.split(split))
        assert sum(len(row["input_ids"]) for row in ours) == prepared.split(split).num_tokens
    assert sum(info.index["splits"][split]["num_records"] for split in opened) == 2500


def test_samples_can_be_taken_in_any_order() -> None:
    spec = spec_of(data={"packing": "none"})
    prepare(spec)
    split = open_prepared(spec).split("train")
    assert len(split) > 2000, "three record batches"
    whole = split.rows(np.arange(len(split)))
    ids = np.random.default_rng(0).permutation(len(split))[:300]
    assert all(
        np.array_equal(row["input_ids"], whole[i]["input_ids"]) for i, row in zip(ids, split.rows(ids), strict=True)
    )


def test_documents_come_back_from_their_tokens() -> None:
    from transformers import AutoTokenizer

    spec = spec_of(data={"validation_fraction": 0})
    prepare(spec)
    prepared = open_prepared(spec)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    tokens = np.concatenate([row["input_ids"] for row in all_rows(prepared, "train")])
    assert tokenizer.decode(tokens.tolist()).split("</s>")[:-1] == [sentence(n) for n in range(2500)]


def test_the_same_input_gives_the_same_bytes() -> None:
    first = prepare(spec_of()).index
    shutil.move("out/data", "first")
    second = prepare(spec_of(training={"lr": 1e-3, "max_steps": 99}, seed=5)).index
    assert first == second
    assert files_of(Path("first")) == files_of(Path("out/data"))


def test_found_again_and_nothing_written() -> None:
    first = prepare(spec_of())
    before = Path("out/data/index.json").stat().st_mtime_ns
    second = prepare(spec_of())
    assert (first.is_new, second.is_new) == (True, False)
    assert first.index == second.index
    assert Path("out/data/index.json").stat().st_mtime_ns == before
    assert os.listdir("out") == ["data"]


def test_classification_finds_its_labels() -> None:
    import datasets

    spec = spec_of(task="sequence_classification")
    prepare(spec)
    prepared = open_prepared(spec)
    assert prepared.labels == ("no", "yes")
    opened = datasets.load_from_disk("out/data")
    assert opened["train"].features["label"].names == ["no", "yes"]
    for split in ("train", "validation"):
        ours = all_rows(prepared, split)
        assert [row["label"] for row in ours] == opened[split]["label"][:]
        assert {(int(row["input_ids"][0]), int(row["input_ids"][-1])) for row in ours} == {(4, 5)}, "<cls> ... <sep>"
        assert max(len(row["input_ids"]) for row in ours) <= 32


def test_number_labels_are_sorted_as_numbers() -> None:
    Path("n.csv").write_text("text,label\n" + "".join(f"{sentence(n)},{n % 12}\n" for n in range(200)))
    spec = spec_of(task="sequence_classification", data={"train": "n.csv"})
    assert prepare(spec).index["labels"] == [str(n) for n in range(12)]


def test_given_validation_files_are_the_validation_split() -> None:
    write_rows(Path("held.jsonl"), range(9000, 9020))
    index = prepare(spec_of(data={"validation": "held.jsonl"})).index
    assert [index["splits"][split]["num_records"] for split in ("train", "validation")] == [2500, 20]


def test_records_stay_on_their_side_when_others_are_added() -> None:
    records = [Record(sentence(n), str(n % 2), "a", n) for n in range(5000)]
    sides = [is_held_out(record, 0.2) for record in records]
    assert 900 < sum(sides) < 1100
    assert [is_held_out(record._replace(file="b", line=1), 0.2) for record in records] == sides
    assert all(is_held_out(r, 0.3) for r, held in zip(records, sides, strict=True) if held)


def test_two_bytes_where_all_ids_fit() -> None:
    assert [token_dtype(size) for size in (65_535, 65_536, 65_537)] == ["uint16", "uint16", "int32"]


def test_a_large_vocabulary_is_kept_in_int32() -> None:
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*WORDS, "</s>", "?", *map(str, range(2500))]
    vocabulary = {word: 70_000 + i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="?").save_pretrained("words")
    spec = spec_of(data={"train_tokenizer": None, "tokenizer": "words"})
    prepare(spec)
    prepared = open_prepared(spec)
    assert prepared.vocab_size == 70_000 + len(words)
    assert prepared.pad_id == vocabulary["</s>"]
    rows = all_rows(prepared, "train")
    assert rows[0]["input_ids"].dtype == np.int32
    assert datasets.load_from_disk("out/data")["train"]["input_ids"][:] == [row["input_ids"].tolist() for row in rows]


def test_shards_are_cut_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.data.shards.SHARD_BYTES", 2000)
    spec = spec_of(data={"packing": "none"})
    index = prepare(spec).index
    names = [shard["file"] for shard in index["splits"]["train"]["shards"]]
    assert names == [f"data-{i:05d}-of-00003.arrow" for i in range(3)]
    assert len(all_rows(open_prepared(spec, verify=True), "train")) == index["splits"]["train"]["num_samples"]


def test_other_inputs_need_force(rows: Path) -> None:
    old = prepare(spec_of()).index["fingerprint"]
    write_rows(rows, range(2501))
    rule = "data.prepared: out/data holds data prepared from other inputs or options; "
    way_out = "replace it with `fleetune prepare --force`, or give another folder as data.prepared"
    assert error_of(lambda: prepare(spec_of())) == rule + way_out
    assert open_prepared(spec_of()).fingerprint == old, "the inputs are not read again to train"
    new = prepare(spec_of(), force=True)
    assert new.is_new
    assert new.index["fingerprint"] != old
    assert os.listdir("out") == ["data"]


def test_opening_with_other_options() -> None:
    prepare(spec_of())
    message = (
        "data.prepared: out/data was prepared with other options (task, data or seq_len); "
        "run `fleetune prepare --force`, or give another folder as data.prepared"
    )
    for other in (spec_of(training={"seq_len": 16}), spec_of(data={"packing": "none"})):
        assert error_of(lambda other=other: open_prepared(other)) == message


def test_only_options_that_can_change_a_shard_count() -> None:
    base = options_fingerprint(spec_of())
    same = [spec_of(data={"prepared": "x"}), spec_of(training={"lr": 1.0})]
    other = [
        spec_of(data={"columns": {"text": "x"}}),
        spec_of(data={"validation_fraction": 0.3}),
        spec_of(task="sequence_classification"),
    ]
    assert {options_fingerprint(spec) for spec in same} == {base}
    assert len({options_fingerprint(spec) for spec in other} | {base}) == 4


def test_missing_prepared_data() -> None:
    message = "data.prepared: out/data holds no prepared data; run `fleetune prepare` with the spec of this run"
    assert error_of(lambda: open_prepared(spec_of())) == message


def test_a_folder_of_something_else_is_never_replaced() -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    message = (
        "data.prepared: mine is in use for something other than prepared data; give another folder as data.prepared"
    )
    assert error_of(lambda: prepare(spec_of(data={"prepared": "mine"}), force=True)) == message
    assert os.listdir("mine") == ["thesis.txt"]


def test_a_damaged_shard_is_named_with_its_samples() -> None:
    spec = spec_of()
    shard = prepare(spec).index["splits"]["train"]["shards"][0]
    path = Path("out/data/train") / shard["file"]
    held = f"(train samples 0 to {shard['num_samples'] - 1}); make it again with `fleetune prepare --force`"
    whole = path.read_bytes()

    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    open_prepared(spec)
    message = f"{path}: does not have the checksum it was written with {held}"
    assert error_of(lambda: open_prepared(spec, verify=True)) == message

    path.write_bytes(whole[:-100])
    message = f"{path}: has {len(whole) - 100} bytes instead of {len(whole)} {held}"
    assert error_of(lambda: open_prepared(spec)) == message
    assert error_of(lambda: prepare(spec)) == message

    path.unlink()
    assert error_of(lambda: open_prepared(spec)) == f"{path}: is missing {held}"


def test_an_index_of_another_version() -> None:
    prepare(spec_of())
    path = Path("out/data/index.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    assert error_of(lambda: open_prepared(spec_of())) == (
        "out/data/index.json: version: 99 is not the version of prepared data that this release reads (2); "
        "make it again with `fleetune prepare --force`"
    )
    path.write_text("{")
    message = "out/data/index.json: is not valid JSON; make it again with `fleetune prepare --force`"
    assert error_of(lambda: open_prepared(spec_of())) == message


def test_no_split_was_held_out() -> None:
    spec = spec_of(data={"validation_fraction": 0})
    prepare(spec)
    assert error_of(lambda: open_prepared(spec).split("validation")) == (
        "out/data: has no validation samples; set data.validation, or a data.validation_fraction above 0, and prepare again"
    )


CORPORA = {
    "nothing": (
        "\n",
        {"train_tokenizer": None, "tokenizer": "tok"},
        "data.train: holds no record; give files with text in them",
    ),
    "one record": (
        '{"text": "only one", "label": "a"}',
        {"train_tokenizer": None, "tokenizer": "tok"},
        "data.validation_fraction: 0.2 leaves no record for validation; give more records, or data.validation",
    ),
    "empty texts": (
        '{"text": ""}\n{"text": ""}',
        {"train_tokenizer": None, "tokenizer": "tok", "validation_fraction": 0},
        "data.train: gives no sample of two tokens from 2 records; give longer texts, or a seq_len of 2 or more",
    ),
    "no tokenizer": (
        '{"text": "x"}',
        {"train_tokenizer": None},
        "data.tokenizer: is missing, and a model that is given by its config brings none; "
        "set data.tokenizer, or data.train_tokenizer to make one",
    ),
}


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_that_gives_nothing(name: str) -> None:
    from launcher.data.train_pieces import train_sentencepiece

    content, data, message = CORPORA[name]
    train_sentencepiece([sentence(n) for n in range(50)], "bpe", 320, Path("tok"))
    Path("few.jsonl").write_text(content)
    assert error_of(lambda: prepare(spec_of(data={"train": "few.jsonl", **data}))) == message
    assert not Path("out").exists() or os.listdir("out") == []


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            None,
            "data.train: holds one label only (a): there is nothing to tell apart; give records of two labels or more",
        ),
        (None, "data.train: holds no record; give files with text in them"),
        (["a", "b", "a"], "task.labels: 'a, b, a' names a label twice; give each class its own name"),
        (["b", "c"], "few.jsonl:1: label: a is not one of task.labels; task.labels are b, c"),
    ],
)
def test_labels_that_will_not_do(labels: list[str] | None, message: str) -> None:
    Path("few.jsonl").write_text("\n" if "no record" in message else '{"text": "only one", "label": "a"}\n')
    task = {"name": "sequence_classification", "labels": labels}
    assert error_of(lambda: prepare(spec_of(task=task, data={"train": "few.jsonl"}))) == message


def test_an_error_half_way_leaves_nothing(rows: Path) -> None:
    with rows.open("a") as file:
        file.write("{broken\n")
    assert error_of(lambda: prepare(spec_of())).startswith("rows.jsonl:2501: is not JSON")
    assert os.listdir("out") == []


def test_killed_while_writing_leaves_no_folder_and_can_be_started_again() -> None:
    body = """
import os, signal, sys
from launcher.data import prepare as module
from launcher.job.load import parse_spec
def killed(*args): os.kill(os.getpid(), signal.SIGKILL)
module.write_json = killed
module.prepare(parse_spec(__import__("json").load(sys.stdin)))
"""
    spec = spec_of()
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", body]
    ended = subprocess.run(command, input=spec.model_dump_json(), text=True, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not Path("out/data").exists()
    assert prepare(spec).is_new


def test_preparing_needs_no_torch() -> None:
    body = (
        "import sys; from launcher.data.prepare import prepare; from launcher.job.load import parse_spec; import json; "
    )
    body += "prepare(parse_spec(json.load(sys.stdin))); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", body]
    ended = subprocess.run(command, input=spec_of().model_dump_json(), text=True, env=environment, check=False)
    assert ended.returncode == 0


def test_progress_is_told() -> None:
    told: list[tuple[str, int]] = []
    prepare(spec_of(), progress=lambda stage, num_done: told.append((stage, num_done)))
    assert list(dict.fromkeys(stage for stage, _ in told)) == [
        "reading files",
        "measuring the text",
        "training the tokenizer",
        "tokenizing train",
        "writing train",
        "writing validation",
    ]
    assert told[-3] == ("tokenizing train", 2500)
