"""One rank builds the model, the others are handed theirs: on every engine exactly the model that one process has."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.distributed.handout_ranks import CASES, STRATEGIES
from tests.support import run_ranks, torchrun

RANKS = Path(__file__).with_name("handout_ranks.py")
SIZES = {"vocab_size": 96, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models with weights, in fp16 as many are published; one ties nothing though its config says so."""
    root = tmp_path_factory.mktemp("models")
    llama = transformers.LlamaConfig(
        hidden_size=30, intermediate_size=44, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, **SIZES
    )
    gpt2 = transformers.GPT2Config(n_layer=2, n_embd=30, n_head=3, n_positions=32, **SIZES)
    bert = transformers.BertConfig(
        hidden_size=28, num_hidden_layers=2, num_attention_heads=4, intermediate_size=45, vocab_size=96, pad_token_id=1
    )
    torch.manual_seed(1)
    for name, model in (
        ("llama", transformers.LlamaForCausalLM(llama)),
        ("gpt2", transformers.GPT2LMHeadModel(gpt2)),
        ("bert", transformers.BertModel(bert)),
        ("untied", transformers.GPT2LMHeadModel(gpt2)),
    ):
        model.half().save_pretrained(root / name)
    weights = load_file(root / "untied" / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(96, 30).half()
    save_file(weights, root / "untied" / "model.safetensors", {"format": "pt"})
    return root


@pytest.fixture(scope="module")
def found(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each rank, by case and strategy."""
    out = tmp_path_factory.mktemp("found") / "found"
    log = out.with_name("log")
    assert run_ranks(torchrun(2, RANKS, models, out), log) == 0, log.read_text()[-4000:]
    return [json.loads(out.with_suffix(f".{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("case", "strategy"), list(product(CASES, STRATEGIES)))
def test_every_rank_gets_the_model_of_one_process(found: list[dict[str, Any]], case: str, strategy: str) -> None:
    """Values, types, sharing and what is trained, bit for bit; the second rank held no value of it before."""
    for rank, each in enumerate(found):
        seen = each[f"{case}/{strategy}"]
        assert seen["unequal"] == []
        assert seen["names"]
        assert seen["trained"]
        assert seen["shared"]
        assert (seen["real"] == 0) == (rank > 0)
