"""Every architecture that is promised: counts of the model that is built, and a trace of few blocks that stands for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.cost import measure as measuring
from launcher.cost.architecture import blocks_of, head_class, model_config
from launcher.cost.measure import SETTINGS, measure
from launcher.cost.reduced import Reduced
from launcher.job import JobSpec
from launcher.task import Facts, task_of
from tests.unit.costs import spec_of

WIDE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 128}
LAYERS = {"num_hidden_layers": 5}
GROUPED = {**WIDE, **LAYERS, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
BERT = {**WIDE, **LAYERS}
EXPERTS = {"num_experts_per_tok": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 5, "n_embd": 32, "n_head": 4, "n_positions": 128},
    "gpt_neox": BERT,
    "opt": {"hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, **LAYERS},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 5},
    "falcon": {"hidden_size": 32, "num_attention_heads": 4, **LAYERS},
    "llama": GROUPED,
    "mistral": {**HEADS, "sliding_window": None},
    "mixtral": {**HEADS, **EXPERTS, "num_local_experts": 4},
    "qwen2": GROUPED,
    "qwen3": HEADS,
    "qwen3_moe": {**GROUPED, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 24},
    "gemma2": HEADS,
    "gemma3_text": HEADS,
    "phi3": {**GROUPED, "pad_token_id": 0},
    "olmo2": GROUPED,
    "smollm3": {**GROUPED, "pad_token_id": 0},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": {**BERT, "max_position_embeddings": 130},
    "distilbert": {"dim": 32, "n_layers": 5, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 128},
    "electra": {**BERT, "embedding_size": 16},
    "albert": {**BERT, "embedding_size": 16},
    "deberta-v2": {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": {**BERT, "pad_token_id": 0},
}
EVERY = {**DECODERS, **ENCODERS}
FP32 = {"fp32": SETTINGS["fp32"]}
BF16 = {name: SETTINGS[name] for name in ("fp32", "bf16")}
SOME = {**BF16, "autocast": SETTINGS["autocast"]}

LLAMA_3 = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "gpt2": ({"model_type": "gpt2"}, 124_439_808, 124_439_808),
    "llama-3-8b": (
        {
            **LLAMA_3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        8_030_261_248,
        8_030_261_248,
    ),
    "llama-3-70b": (
        {
            **LLAMA_3,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
        70_553_706_496,
        70_553_706_496,
    ),
    "mixtral-8x7b": (
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "vocab_size": 32000,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        46_702_792_704,
        12_879_925_248,
    ),
    "qwen3-30b-a3b": (
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "vocab_size": 151936,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "tie_word_embeddings": False,
        },
        30_532_122_624,
        3_353_032_704,
    ),
}
"""Config -> parameters, and those that a token meets, as their makers' model cards and weight files have them."""


def spec_for(model_type: str, **changed: Any) -> JobSpec:
    task: Any = {"name": "sequence_classification", "labels": ["a", "b"]} if model_type in ENCODERS else "causal_lm"
    return spec_of(
        model={"from_config": {"model_type": model_type, "vocab_size": 96, **EVERY[model_type], **changed}}, task=task
    )


def built(spec: JobSpec) -> Any:
    task = task_of(spec, Facts())
    config = model_config(spec, None, task.config_overrides)
    with torch.device("meta"):
        return head_class(task.auto_class).from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("model_type", EVERY)
def test_counts_and_traces(model_type: str) -> None:
    """Parameters of all kinds; a trace that says what blocks keep, with and without recompute."""
    spec = spec_for(model_type)
    cost, model = measure(spec, None, FP32), built(spec)
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    assert cost.architecture == type(model).__name__
    assert cost.num_params == cost.num_trainable_params == sum(p.numel() for p in model.parameters())
    assert (cost.num_blocks, cost.block_num_params) == (len(blocks), max(blocks))
    assert cost.outside_num_params + sum(blocks) == cost.num_params
    assert sum(group.count * torch.Size(group.shape).numel() for group in cost.tensors) == cost.num_params
    assert cost.saved["fp32"].blocks.at(2, 64) > 5 * 2 * 64 * 32 * 4
    assert set(cost.peak["fp32"]) == ({"none", "full"} if model.supports_gradient_checkpointing else {"none"})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    config, num_params, num_active_params = PUBLISHED[name]
    cost = measure(spec_of(model={"from_config": config}), None, FP32)
    assert (cost.num_params, cost.num_active_params) == (num_params, num_active_params)


@pytest.mark.parametrize("model_type", ["llama", "albert", "gemma2", "bert"])
def test_few_blocks_stand_for_all(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace of three blocks of each kind is, byte for byte, that of all: in each precision, recomputed or not."""
    spec = spec_for(model_type, **({"num_hidden_layers": 8} if model_type == "gemma2" else {}))
    wanted = SOME if model_type == "llama" else BF16
    cost = measure(spec, None, wanted)
    monkeypatch.setattr(measuring, "reduced", lambda model: Reduced(model, (0,) * cost.num_blocks))
    every = measure(spec, None, wanted)
    assert every.saved == cost.saved
    assert every.flops == cost.flops
    for trace, policies in every.peak.items():
        for policy, peak in policies.items():
            for point in [(1, 64), (2, 100), (7, 128)]:
                assert peak.at(*point) == cost.peak[trace][policy].at(*point), (trace, policy, point)
