"""A tokenizer trained here is the same in `transformers` and in `sentencepiece`, and gives every text back."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.pieces import SPACE, _merges, parse_model
from launcher.data.tokenizer import TokenizerSource, load_tokenizer, tokenizer_digest
from launcher.data.train_pieces import train_sentencepiece
from launcher.errors import DataError

LIBRARY = Path(sysconfig.get_path("stdlib"))
CODE = [(LIBRARY / f"{name}.py").read_text(encoding="utf-8") for name in ("textwrap", "bisect", "queue", "string")]
PROSE = ["Café und naïve Wörter,  zwei Leerzeichen.\n\n\tTab — 漢字かな交じり文 😀\r\nEnde"]
ODD = [
    "",
    " ",
    "\n\n \n",
    "  lead and trail  ",
    "</s> <s> <unk> <pad> <cls> <mask> <0x0A> <0xFF>",
    "\x00 nul \u200b zero width \ufeff",
    "a" * 300 + " " * 77 + "=" * 50,
    "\U0010ffff\u0301 e\u0301",
]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same trained folder, opened by both libraries."""
    import sentencepiece
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp(request.param)
    train_sentencepiece(CODE + PROSE, request.param, 900, folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return AutoTokenizer.from_pretrained(folder), processor


@pytest.mark.parametrize("text", CODE + PROSE + ODD)
def test_known_texts(pair: tuple[Any, Any], text: str) -> None:
    tokenizer, processor = pair
    ids = tokenizer(text)["input_ids"]
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids) == text


@given(text=st.text(max_size=80) | st.text("ab =\n\t(_<>0xA/é", max_size=120))
@settings(max_examples=400, deadline=None)
def test_any_text(pair: tuple[Any, Any], text: str) -> None:
    """Only U+2581, which is SentencePiece's own sign for a space, comes back as one."""
    tokenizer, processor = pair
    ids = tokenizer(text)["input_ids"]
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids) == text.replace(SPACE, " ")


def test_special_pieces_have_their_ids_and_are_never_found_in_text(pair: tuple[Any, Any]) -> None:
    tokenizer, _ = pair
    names = ["<unk>", "<s>", "</s>", "<pad>", "<cls>", "<sep>", "<mask>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(7))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.cls_token_id) == (2, 3, 4)
    assert min(tokenizer("".join(names))["input_ids"]) > 6
    assert len(tokenizer) == 900
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_twice_gives_the_same_files(tmp_path: Path, kind: Any) -> None:
    for name in "ab":
        train_sentencepiece(CODE, kind, 500, tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_classifier_gets_cls_and_sep(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    train_sentencepiece(CODE, "bpe", 500, tmp_path, add_cls_sep=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("def test", truncation=True, max_length=4)["input_ids"]
    assert (ids[0], ids[-1], len(ids)) == (4, 5, 4)
    assert tokenizer.decode(ids, skip_special_tokens=True) in "def test"


def test_equal_merges_keep_sentencepieces_order() -> None:
    """`aba` in ab|a|ba must be merged on the left, `aaa` in aa|a likewise."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    assert sentencepiece.__version__
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    for rank, piece in enumerate(["aa", "aaa", "aba", "ab", "ba", "a", "b"]):
        proto.pieces.add(piece=piece, score=-rank, type=1)
    assert [merge for merge in _merges(proto) if "".join(merge) in ("aaa", "aba")] == [
        ("aa", "a"),
        ("a", "aa"),
        ("ab", "a"),
        ("a", "ba"),
    ]


def error_of(call: Any) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_size_that_cannot_be_had_names_the_one_that_can(tmp_path: Path, kind: Any) -> None:
    path = "data.train_tokenizer.vocab_size: "
    text = ["one two three"]
    high = error_of(lambda: train_sentencepiece(text, kind, 50_000, tmp_path))
    assert high.startswith(path + "50000 is more than this text gives pieces for; at most ")
    possible = int(high.rsplit(" ", 1)[1])
    assert len(train_sentencepiece(text, kind, possible, tmp_path)) == possible
    low = error_of(lambda: train_sentencepiece(text, kind, 100, tmp_path))
    assert low.startswith(
        path + "100 leaves no room for the bytes, the special pieces and the characters of this text; more than "
    )


def test_nothing_to_train_on(tmp_path: Path) -> None:
    message = error_of(lambda: train_sentencepiece(["\n"], "bpe", 400, tmp_path))
    assert message == "data.train: holds no text to train a tokenizer on; give files with text in them"


def test_tokenizers_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("bad.model").write_bytes(b"nothing of the kind")
    Path("broken").mkdir()
    Path("broken/tokenizer.json").write_text("{")
    messages = {
        "no.model": "data.tokenizer: no.model does not exist; give the path of a SentencePiece model",
        "bad.model": "bad.model: is not a SentencePiece unigram or BPE model; give another tokenizer",
        "empty": "data.tokenizer: empty is a folder without a tokenizer; set data.tokenizer",
    }
    for name, message in messages.items():
        assert error_of(lambda name=name: load_tokenizer(TokenizerSource("data.tokenizer", name))) == message
    assert error_of(lambda: load_tokenizer(TokenizerSource("data.tokenizer", "broken"))).startswith(
        "data.tokenizer: broken cannot be opened as a tokenizer ("
    )


def test_the_digest_is_of_the_contents(tmp_path: Path) -> None:
    for name in "ab":
        train_sentencepiece(CODE, "bpe", 500, tmp_path / name)
    (tmp_path / "a" / "model.safetensors").write_bytes(b"weights do not matter")
    first, second = (tokenizer_digest(TokenizerSource("data.tokenizer", str(tmp_path / name))) for name in "ab")
    assert first == second
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    assert tokenizer_digest(TokenizerSource("data.tokenizer", str(tmp_path / "b"))) != first


_FOREIGN = os.environ.get("FLEETUNE_TEST_DATA", "")


@pytest.mark.skipif(not _FOREIGN, reason="FLEETUNE_TEST_DATA names no folder with real tokenizers")
def test_foreign_models_encode_as_sentencepiece_does() -> None:
    """Llama 2 (BPE, dummy prefix, byte fallback), and unigram models with NFKC rules and no byte fallback.

    A line at a time: sentencepiece adds a unigram model's scores in fp32 over the whole text, and in a long one its
    rounding decides between segmentations that are worth the same. (Scores of models that we train are made exact.)
    """
    import sentencepiece

    models = sorted(Path(_FOREIGN, "tokenizers").rglob("*.model"))
    assert models
    for model in models:
        assert parse_model(model.read_bytes()) is not None
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        tokenizer = load_tokenizer(TokenizerSource("data.tokenizer", str(model)))
        lines = [line for text in CODE + PROSE for line in text.splitlines()]
        for text in [*lines, *PROSE, "plain words", "  two  spaces ", "全角ＡＢＣ　テスト"]:
            plain = text.replace("<", "")  # one of them does not know it
            assert tokenizer(plain)["input_ids"] == processor.encode(plain), (model.name, plain[:80])
