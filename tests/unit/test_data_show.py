"""`fleetune data show`: numbers that are true, and samples in which one sees what is learnt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from launcher import cli
from launcher.data.prepare import prepare
from launcher.data.prepared import open_prepared
from launcher.data.show import ShownSample, bracketed, styled
from tests.unit.test_data_prepare import all_rows, spec_of, write_rows


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), range(400))
    return prepare(spec_of(data={"packing": "none"})).folder


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, str, object]:
    with pytest.raises(SystemExit) as left:
        cli.main(["data", "show", "out/data", *argv])
    told = capsys.readouterr()
    return told.out, told.err, left.value.code


def test_the_numbers_are_those_of_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(shown(capsys, "--json", "--samples", "3")[0])
    lengths = [len(row["input_ids"]) for row in all_rows(open_prepared(spec_of(data={"packing": "none"})), "train")]
    train = told["splits"]["train"]
    assert (train["num_samples"], train["num_tokens"]) == (len(lengths), sum(lengths))
    assert (train["shortest"], train["longest"]) == (min(lengths), max(lengths))
    assert (train["median"], train["mean"]) == (np.median(lengths), pytest.approx(np.mean(lengths)))
    assert sum(train["counts"]) == len(lengths)
    edges = list(zip(train["edges"], train["edges"][1:], strict=False))
    assert train["counts"] == [sum(start <= n < stop for n in lengths) for start, stop in edges]
    assert [sample["number"] for sample in told["samples"]] == [0, 1, 2]
    assert told["samples"][0]["is_target"] == [False, *[True] * (lengths[0] - 1)], "nothing predicts the first token"
    first = json.loads(Path("rows.jsonl").read_text().splitlines()[0])["text"]
    assert "".join(told["samples"][0]["pieces"]).startswith(first[:20])


def test_a_pipe_gets_brackets_and_no_colours(capsys: pytest.CaptureFixture[str]) -> None:
    out, _, code = shown(capsys, "--samples", "1")
    assert code == 0
    assert "\x1b" not in out
    assert "]]" in out.rstrip()[-3:]
    assert "train: " in out


def test_targets_are_green_and_the_rest_is_dim() -> None:
    sample = ShownSample(0, ("a ", "b ", "c"), (False, True, False), {})
    assert [(sample_span.start, sample_span.end, sample_span.style) for sample_span in styled(sample).spans] == [
        *[(0, 2, "dim"), (2, 4, "green"), (4, 5, "dim")]
    ]
    assert bracketed(sample) == "a [[b ]]c"


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.html", b"<!doctype html>")])
def test_a_picture(capsys: pytest.CaptureFixture[str], name: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    assert shown(capsys, "--samples", "0", "--plot", name)[2] == 0
    assert Path(name).read_bytes().startswith(begins)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sample", "100000"], "--sample: 100000 is not a sample: there are"),
        (["--split", "test"], "out/data: has no test samples"),
        (["--plot", "a.doc"], "--plot: a.doc has a suffix of no picture"),
    ],
)
def test_what_cannot_be_shown(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    _, told, code = shown(capsys, *argv)
    assert (code, told.startswith(f"error: {words}")) == (2, True)


def test_an_altered_shard_is_named_with_its_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((folder / "train").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert shown(capsys, "--samples", "0")[2] == 0
    _, told, code = shown(capsys, "--samples", "0", "--verify")
    assert code == 2
    assert "does not have the checksum it was written with (train samples 0 to" in told
