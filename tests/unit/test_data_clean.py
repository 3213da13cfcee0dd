"""What cleaning drops is counted, what is kept depends on the records alone, and copies are made for training only."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.augment import copies_of
from launcher.data.clean import Cleaner
from launcher.data.prepare import prepare
from launcher.data.prepared import open_prepared
from launcher.errors import DataError, SpecError
from launcher.job.spec import AugmentSection, CleanSection
from launcher.task import Record
from tests.unit.test_data_prepare import all_rows, files_of, sentence, spec_of, write_rows


def cleaned(texts: list[str], **options: Any) -> tuple[list[str], dict[str, Any]]:
    cleaner = Cleaner(CleanSection(**options))
    kept = [record.text for record in cleaner(Record(text) for text in texts)]
    assert [record.text for record in cleaner(Record(text) for text in texts)] == kept, "a second pass finds the same"
    return kept, cleaner.to_json()


@pytest.mark.parametrize(
    ("options", "kept", "counts"),
    [
        ({}, ["e\u0301a", "a\x00b\tc", "e\u0301a", "long text 7", "x"], {"dropped": {}, "changed": {}}),
        (
            {"nfc": True, "strip_control": True},
            ["éa", "ab\tc", "éa", "long text 7", "x"],
            {"dropped": {}, "changed": {"nfc": 2, "strip_control": 1}},
        ),
        ({"min_characters": 3, "max_characters": 5}, ["e\u0301a", "a\x00b\tc", "e\u0301a"], {"min_characters": 1, "max_characters": 1}),
        ({"keep_matching": "a|x", "drop_matching": "[0-9]$"}, ["e\u0301a", "a\x00b\tc", "e\u0301a", "x"], {"keep_matching": 0, "drop_matching": 1}),
        ({"exact_duplicates": True}, ["e\u0301a", "a\x00b\tc", "long text 7", "x"], {"exact_duplicates": 1}),
    ],
)  # fmt: skip
def test_each_step_and_its_count(options: dict[str, Any], kept: list[str], counts: dict[str, Any]) -> None:
    texts = ["e\u0301a", "a\x00b\tc", "e\u0301a", "long text 7", "x"]
    found, told = cleaned(texts, **options)
    assert found == kept
    assert told == (counts if "dropped" in counts else {"dropped": counts, "changed": {}})


def test_near_duplicates_go_and_others_stay() -> None:
    """Against the similarity itself, computed without sketches; between 0.5 and 0.9 either may happen."""
    rng = np.random.default_rng(0)
    originals = [" ".join(str(n) for n in rng.integers(0, 1000, size=100)) for _ in range(40)]
    near = [text.replace(text.split()[50], "other", 1) for text in originals[:15]]
    kept, told = cleaned([*originals, *near], near_duplicates=0.8)
    assert kept == originals
    assert told["dropped"] == {"near_duplicates": 15}


def test_equal_texts_with_other_labels_are_not_equal() -> None:
    records = [Record("a", "x"), Record("a", "y"), Record("a", "x", "b.txt", 3)]
    assert list(Cleaner(CleanSection(exact_duplicates=True))(records)) == records[:2]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), range(1500))
    return Path("rows.jsonl")


def test_cleaned_data_are_the_same_from_any_number_of_workers(rows: Path) -> None:
    rows.write_text(rows.read_text() + rows.read_text())
    spec = spec_of(data={"clean": {"exact_duplicates": True, "min_characters": 30, "nfc": True}})
    made = [files_of(prepare(spec, force=True, num_workers=number).folder) for number in (1, 2)]
    assert made[0] == made[1]
    index = open_prepared(spec).index
    texts = [sentence(n) for n in range(1500)]
    num_short = sum(len(text) < 30 for text in texts)
    dropped = {"min_characters": 2 * num_short, "exact_duplicates": 1500 - num_short}
    assert index["cleaned"] == {"train": {"dropped": dropped, "changed": {"nfc": 0}}}
    assert sum(split["num_records"] for split in index["splits"].values()) == 1500 - num_short


def test_bad_records_are_skipped_counted_and_listed(rows: Path) -> None:
    lines = rows.read_bytes().splitlines(keepends=True)
    lines[3], lines[10], lines[20] = b"{broken\n", b'{"text": "\xff"}\n', b'{"txet": "x"}\n'
    lines[30:100] = [b'{"text": 7}\n'] * 70
    rows.write_bytes(b"".join(lines))
    with pytest.raises(DataError) as caught:
        prepare(spec_of())
    told = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in told] == [
        *(f"rows.jsonl:{n}" for n in (4, 11, 21, 31, 32)),
        "data.train",
    ]
    assert told[-1] == (
        "data.train: holds 68 more records that will not do; mend them, or leave them out with data.on_error: skip"
    )
    spec = spec_of(data={"on_error": "skip"})
    made = [files_of(prepare(spec, force=True, num_workers=number).folder) for number in (1, 2)]
    assert made[0] == made[1]
    index = json.loads(made[0]["index.json"])
    assert index["skipped"]["train"]["count"] == 73
    assert len(index["skipped"]["train"]["first"]) == 50
    assert index["skipped"]["train"]["first"][1].startswith("rows.jsonl:11: is not UTF-8 (byte 0xff at byte 11")
    assert sum(split["num_records"] for split in index["splits"].values()) == 1500 - 73


def test_copies_differ_as_asked_and_are_the_same_again() -> None:
    record = Record(" ".join(map(str, range(2000))), "x")
    (dropped,) = copies_of(record, AugmentSection(word_dropout=0.3), 5)
    assert 1300 < len(dropped.text.split()) < 1500
    assert dropped.text.split() == sorted(dropped.text.split(), key=int)
    (swapped,) = copies_of(record, AugmentSection(word_swap=0.1), 5)
    assert sorted(swapped.text.split(), key=int) == record.text.split()
    assert 200 < sum(a != b for a, b in zip(swapped.text.split(), record.text.split(), strict=True)) < 450
    three = copies_of(record, AugmentSection(copies=3, word_dropout=0.3), 5)
    assert len({copy.text for copy in three}) == 3
    assert three[0] == dropped
    assert copies_of(record, AugmentSection(word_dropout=0.3), 6)[0] != dropped
    pair = Record("a b c\nd e f", "x", parts={"pair": ("a b c", "d e f")})
    (copy,) = copies_of(pair, AugmentSection(word_swap=0.9), 1)
    assert [sorted(text.split()) for text in copy.parts["pair"]] == [["a", "b", "c"], ["d", "e", "f"]]
    assert copy.text == "\n".join(copy.parts["pair"])


def test_only_training_records_have_copies(rows: Path) -> None:
    augment = {"copies": 2, "word_dropout": 0.2, "token_masking": 0.3}
    task = "sequence_classification"
    plain = prepare(spec_of(task=task)).index["splits"]
    spec = spec_of(task=task, data={"augment": augment})
    made = [files_of(prepare(spec, force=True, num_workers=number).folder) for number in (1, 2)]
    assert made[0] == made[1]
    prepared = open_prepared(spec)
    train, held_out = (prepared.index["splits"][split] for split in ("train", "validation"))
    assert (train["num_samples"], train["num_augmented"]) == (
        3 * plain["train"]["num_samples"],
        2 * train["num_records"],
    )
    assert held_out == plain["validation"]
    ids = np.concatenate([row["input_ids"] for row in all_rows(prepared, "train")])
    share = (ids == prepared.index["mask_id"]).mean()
    assert 0.1 < share < 0.25, "30% of the words' tokens of two rows in three"


def test_augmentation_of_unlabelled_text_is_refused() -> None:
    with pytest.raises(SpecError, match=r"data\.augment: .* has no effect on causal_lm"):
        spec_of(data={"augment": {"word_swap": 0.1}})


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(
        SpecError, match=r"data\.clean: has a `keep_matching` that is no regular expression \(.*\); mend it"
    ):
        spec_of(data={"clean": {"keep_matching": "("}})


def test_near_duplicates_ask_for_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra that is not installed is the user's to install: one message, no traceback."""
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(SpecError, match=r"near_duplicates: 0.8 needs the package datasketch; pip install"):
        cleaned(["one text", "another"], near_duplicates=0.8)
