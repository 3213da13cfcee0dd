"""The quick tokenizer answers as the one of transformers, whatever is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.data.quick import QuickTokenizer, facts_of
from launcher.data.tokenizer import TokenizerSource, load_tokenizer
from launcher.data.train_pieces import train_sentencepiece
from tests.support import REPO, documentation

DATA = os.environ.get("FLEETUNE_TEST_DATA", "")
REAL = ("tokenizers/gpt2", "tokenizers/bert-base-uncased", "weights/stories15M", "weights/minimind2-small")
TEXTS = ["", "a", "two words", "x" * 300, "</s> [SEP] <|endoftext|> <s>", *list(documentation().values())[:30]]


def both(name: str, folder: Path) -> tuple[Any, QuickTokenizer]:
    if name in REAL:
        if not (DATA and Path(DATA, name).is_dir()):
            pytest.skip("FLEETUNE_TEST_DATA has no such tokenizer")
        tokenizer = load_tokenizer(TokenizerSource("data.tokenizer", str(Path(DATA, name))))
        tokenizer.save_pretrained(folder)
    else:
        tokenizer = train_sentencepiece(TEXTS, "bpe", 500, folder, add_cls_sep=name == "ours with cls")
    return tokenizer, QuickTokenizer(folder, facts_of(tokenizer))


@pytest.fixture(params=[*REAL, "ours", "ours with cls"], scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, QuickTokenizer]:
    return both(request.param, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    "options",
    [
        {"add_special_tokens": False, "verbose": False},
        {},
        {"truncation": True, "max_length": 5},
        {"truncation": True, "max_length": 5, "add_special_tokens": False},
        {"truncation": False},
    ],
    ids=str,
)
def test_ids_of_texts(pair: tuple[Any, QuickTokenizer], options: dict[str, Any]) -> None:
    theirs, ours = pair
    asked = {"return_attention_mask": False, **options}
    assert ours(TEXTS, **asked)["input_ids"] == theirs(TEXTS, **asked)["input_ids"]


def test_anything_else_is_asked_of_the_library(pair: tuple[Any, QuickTokenizer]) -> None:
    theirs, ours = pair
    assert dict(ours("one text")) == dict(theirs("one text"))
    assert dict(ours(["a b"], ["c d"])) == dict(theirs(["a b"], ["c d"]))
    assert dict(ours([["a", "b"]], is_split_into_words=True)) == dict(theirs([["a", "b"]], is_split_into_words=True))
    assert ours.decode([5, 6, 7]) == theirs.decode([5, 6, 7])
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    with pytest.raises(AttributeError):
        ours.no_such_thing  # noqa: B018


def test_a_worker_does_not_wait_for_transformers(tmp_path: Path) -> None:
    _, ours = both("ours", tmp_path)
    body = (
        "import sys; from pathlib import Path; from launcher.data.quick import QuickTokenizer; "
        f"t = QuickTokenizer(Path({str(tmp_path)!r}), {ours._facts!r}); "
        "t(['a b'], return_attention_mask=False); t.eos_token_id; sys.exit('transformers' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    assert subprocess.run([sys.executable, "-c", body], env=environment, check=False).returncode == 0
