"""Remembered words give the library's own ids, for real tokenizers and for text made to trip them."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from launcher.data.train_pieces import train_sentencepiece
from launcher.data.words import WordEncoder
from tests.support import documentation

DATA = os.environ.get("FLEETUNE_TEST_DATA", "")
REAL = {
    "gpt2": "tokenizers/gpt2/tokenizer.json",
    "bert": "tokenizers/bert-base-uncased/tokenizer.json",
    "minimind": "weights/minimind2-small/tokenizer.json",
    "llama": "weights/stories15M/tokenizer.json",
}
TRICKY = [
    "",
    " ",
    "a",
    " a b",
    "a  b   c\n\n d \n e",
    "it's 'tis we'll  I'M",
    "x<|endoftext|>y <|endoftext|> z</s> <s>a [SEP] [MASK]b",
    "1234567 3.14 a1b2  12 34",
    "naïve café “quoted” … e\u0301 e \u0301x ﬁ ½",
    "中文 字符 abc 中 a b",
    "tab\there \x1c x\x85y \u3000z\u200b w\u00a0v",
    "▁a ▁ b▁c ▁▁",
    "ΑΣ Σ a ΣΑΣ b",
    "🙂 a 🙂🙂 b\u200d🙂 c",
]
ALPHABET = st.sampled_from([*list("ab ,.'\n\t1é中▁\u0301\u00a0ΣA<>|/s"), "  ", " the", "<s>", "</s>", "<|endoftext|>"])


@cache
def backend(name: str) -> Any:
    path = Path(DATA, REAL[name])
    if not (DATA and path.is_file()):
        pytest.skip("FLEETUNE_TEST_DATA has no such tokenizer")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(name: str, splits: bool) -> None:
    tokenizer = backend(name)
    tokenizer.encode_special_tokens = splits
    encoder = WordEncoder(tokenizer)
    assert encoder.remembers
    texts = [*TRICKY, *(text[:3000] for text in documentation().values())]
    expected = ids_of(tokenizer, texts)
    assert encoder(texts) == expected
    assert encoder(texts) == expected, "now from memory"


@settings(max_examples=200, deadline=None)
@given(st.lists(ALPHABET, max_size=40))
@pytest.mark.parametrize("name", REAL)
def test_any_text(name: str, parts: list[str]) -> None:
    text = "".join(parts)
    assert encoder_of(name)([text]) == ids_of(backend(name), [text])


@cache
def encoder_of(name: str) -> WordEncoder:
    return WordEncoder(backend(name))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_tokenizers_of_our_own(tmp_path: Path, kind: Any) -> None:
    texts = list(documentation().values())
    tokenizer = train_sentencepiece(texts, kind, 800, tmp_path).backend_tokenizer
    encoder = WordEncoder(tokenizer)
    assert encoder.remembers
    assert encoder([*TRICKY, *texts[:50]]) == ids_of(tokenizer, [*TRICKY, *texts[:50]])


def test_words_are_forgotten_before_memory_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.data.words._KEPT_CHARACTERS", 100)
    encoder = WordEncoder(backend("llama"))
    texts = [f"word{n} and more{n} of them" for n in range(300)]
    for text in texts:
        assert encoder([text]) == ids_of(backend("llama"), [text])
    assert sum(map(len, encoder._rest_ids)) < 200


def word_level(**parts: Any) -> Any:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        word_level(),
        word_level(pre_tokenizer=pre_tokenizers.ByteLevel(use_regex=False)),
        word_level(pre_tokenizer=pre_tokenizers.Split("a b", "isolated")),
        word_level(pre_tokenizer=pre_tokenizers.WhitespaceSplit(), normalizer=normalizers.Strip()),
        word_level(pre_tokenizer=pre_tokenizers.WhitespaceSplit(), normalizer=normalizers.Replace("a b", "b")),
        word_level(pre_tokenizer=pre_tokenizers.Metaspace(split=False)),
    ],
    ids=["whole text", "bytes of the whole text", "own split", "strips", "replaces", "unsplit metaspace"],
)
def test_a_tokenizer_that_looks_across_a_space_goes_by_the_library(tokenizer: Any) -> None:
    encoder = WordEncoder(tokenizer)
    assert not encoder.remembers
    assert encoder(["a b", " b a a", "a"]) == ids_of(tokenizer, ["a b", " b a a", "a"])


def test_an_added_token_with_a_space_goes_by_the_library() -> None:
    tokenizer = word_level(pre_tokenizer=pre_tokenizers.WhitespaceSplit())
    assert WordEncoder(tokenizer).remembers
    tokenizer.add_tokens(["a b"])
    assert not WordEncoder(tokenizer).remembers
    assert WordEncoder(tokenizer)(["a a b b"]) == [[0, 3, 1]]


def test_a_bpe_whose_pieces_reach_across_spaces_goes_by_the_library() -> None:
    definition = json.loads(backend("llama").to_str())
    definition["model"]["vocab"]["s\u2581t"] = max(definition["model"]["vocab"].values()) + 1
    definition["model"]["merges"].insert(0, ["s", "\u2581"])
    definition["model"]["vocab"]["s\u2581"] = max(definition["model"]["vocab"].values()) + 1
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    assert not WordEncoder(tokenizer).remembers
    assert WordEncoder(tokenizer)(["this that"]) == ids_of(tokenizer, ["this that"])
