"""Two random models with a tokenizer each, texts to score, and the command that scores them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from launcher.data.train_pieces import train_sentencepiece
from tools.evaluate import main

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "seven", "wizards", "mix", "potions")
LABELS = ("ham", "eggs", "spam")
NUM_TEXTS = 50
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def small_models(home: Path) -> Path:
    """`gpt` (16 positions) and `bert` (3 labels), and `rows.jsonl`; no test writes into it."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 25))) for _ in range(NUM_TEXTS)]
    rows = [{"text": text, "label": draw.choice(LABELS)} for text in texts]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    train_sentencepiece(texts, "bpe", 400, home / "gpt")
    gpt = GPT2Config(
        vocab_size=400, n_layer=2, n_head=2, n_embd=16, n_positions=16, pad_token_id=3, initializer_range=1.0
    )
    GPT2LMHeadModel(gpt).save_pretrained(home / "gpt")
    train_sentencepiece(texts, "bpe", 400, home / "bert", add_cls_sep=True)
    names: dict[str, Any] = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    bert = BertConfig(
        vocab_size=400, max_position_embeddings=32, pad_token_id=3, initializer_range=1.0, **SIZES, **names
    )
    BertForSequenceClassification(bert).save_pretrained(home / "bert")
    return home


def rows_of(home: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]


def scored(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    assert main([*map(str, argv), "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()  # what saving a model shows
    assert main([*map(str, argv)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.removeprefix("error: ").removesuffix("\n")


def printed(value: float) -> float:
    """A number as results give it: equal to the last digit."""
    return float(f"{value:.6g}")
