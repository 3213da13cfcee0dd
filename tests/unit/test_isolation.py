"""A packed document gets the logits, the loss and the gradients that it gets alone, in every family and kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from launcher.errors import ModelError
from launcher.task import IGNORED, Batch, Row
from launcher.task.causal_lm import CausalLM
from launcher.task.packed import DOCUMENT_IDS, collate_packed
from launcher.task.padding import pad_right
from launcher.train.isolation import Attention

VOCAB, PAD = 97, 1
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.3, "pad_token_id": PAD}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
BERT |= {"max_position_embeddings": 96, "initializer_range": 0.3, "pad_token_id": PAD}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96, "initializer_range": 0.3}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "llama": LLAMA,
    "qwen3": LLAMA | {"head_dim": 8},
    "gemma": LLAMA | {"head_dim": 8},
    "gemma3_text": LLAMA | {"head_dim": 8} | SLIDING,
    "mistral": LLAMA | {"sliding_window": 8},
    "bert": BERT,
    "roberta": BERT | {"max_position_embeddings": 98},
    "modernbert": {k: v for k, v in LLAMA.items() if "key_value" not in k}
    | {"global_attn_every_n_layers": 3, "local_attention": 16, "mlp_dropout": 0.0, "attention_dropout": 0.0}
    | dict.fromkeys(("cls_token_id", "bos_token_id", "sep_token_id", "eos_token_id"), 2),
}
DECODERS = ("gpt2", "llama", "qwen3", "gemma", "gemma3_text", "mistral")
LENGTHS = [[30, 17, 1, 12], [40], [2, 2, 25]]
TOLERANCE = 1e-5


def model_of(family: str, kernel: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=VOCAB, **FAMILIES[family])
    auto = AutoModelForCausalLM if family in DECODERS else AutoModelForMaskedLM
    return auto.from_config(config, attn_implementation=kernel)


class Masked:
    """The least of a task for masked tokens: every third is asked for."""

    def collate(self, rows: list[Row], pad_id: int) -> Batch:
        batch = pad_right(rows, pad_id)
        asked = (torch.arange(batch["input_ids"].shape[1]) % 3 == 0) & batch["attention_mask"].bool()
        return {**batch, "labels": batch["input_ids"].masked_fill(~asked, IGNORED)}

    def loss_sum(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        flat = logits.reshape(-1, VOCAB)
        return torch.nn.functional.cross_entropy(flat, batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")


def rows_of(seed: int) -> list[Row]:
    random = np.random.default_rng(seed)
    return [{"documents": [{"input_ids": random.integers(2, VOCAB, n)} for n in bin_]} for bin_ in LENGTHS]


def packed_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch["input_ids"], **Attention.of(model).inputs(batch, torch.float32)}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To 1e-5 of the largest number there, or of 1: fp32 has 6e-8."""
    return bool(
        (found.detach() - expected.detach()).abs().max() <= TOLERANCE * max(1.0, float(expected.detach().abs().max()))
    )


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family: str, kernel: str, mode: str) -> None:
    """Logits of every token, the loss, the gradient of every parameter; documents longer than a sliding window too."""
    model, task = model_of(family, kernel).train(mode == "train"), CausalLM(96, "none")
    task = task if family in DECODERS else Masked()
    rows = rows_of(seed=3)
    batch = collate_packed(task.collate, rows, PAD)
    logits = model(**packed_inputs(model, batch)).logits
    loss = task.loss_sum(logits, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone_loss = torch.zeros(())
    for number, row in enumerate(rows):
        begin = 0
        for document in row["documents"]:
            single = task.collate([document], PAD)
            alone = model(input_ids=single["input_ids"], attention_mask=single["attention_mask"]).logits
            end = begin + len(document["input_ids"])
            assert close(logits[number, begin:end], alone[0])
            single_loss = task.loss_sum(alone, single)
            single_loss.backward()
            alone_loss += single_loss.detach()
            begin = end
    assert close(loss.detach(), alone_loss)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert close(gradients[name], parameter.grad), name


def test_position_ids_alone_would_leak() -> None:
    """The reason for a mask of our own; if this fails, transformers has changed and the mask may go."""
    model = model_of("bert", "sdpa").eval()
    batch = collate_packed(Masked().collate, rows_of(seed=3), PAD)
    ours = model(**packed_inputs(model, batch)).logits
    theirs = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    assert (ours - theirs).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bert", "modernbert"])
def test_the_block_mask_allows_what_the_dense_one_does(family: str) -> None:
    from torch.nn.attention.flex_attention import create_mask

    attention = Attention.of(model_of(family, "eager"))
    documents = collate_packed(Masked().collate, rows_of(seed=3), PAD)[DOCUMENT_IDS]
    dense = attention._dense(documents, torch.float32)["attention_mask"]
    for kind in attention.layer_types:
        of_kind = dense[kind] if isinstance(dense, dict) else dense
        rows, length = documents.shape
        blocks = create_mask(attention.allowed(kind, documents), rows, 1, length, length, device="cpu")
        assert torch.equal(blocks, of_kind == 0)


def test_lengths_for_flash_attention_end_with_documents_rows_and_padding() -> None:
    attention = Attention.of(model_of("llama", "eager"))
    documents = torch.tensor([[1, 1, 2, 0], [1, 1, 1, 1], [1, 2, 2, 2]])
    lengths = attention._lengths(documents, torch.float32)
    assert lengths["cu_seq_lens_q"].tolist() == [0, 2, 3, 4, 8, 9, 12]
    assert lengths["max_length_k"] == 4
    assert lengths["attention_mask"] is None


def test_a_model_without_attention_to_mask_is_refused() -> None:
    config = AutoConfig.for_model("qwen3_next", vocab_size=VOCAB, num_hidden_layers=4, hidden_size=32)
    model = type("Mixed", (), {"config": config})()
    with pytest.raises(ModelError, match=r"cannot keep documents apart in Mixed, which has layers of linear_attention"):
        Attention.of(model)


def test_a_packed_batch_has_each_document_in_its_place() -> None:
    rows = [
        {"documents": [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]},
        {"documents": [{"input_ids": [3, 4]}]},
    ]
    batch = collate_packed(CausalLM(8, "none").collate, rows, PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, PAD, PAD, PAD]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9], [IGNORED, 4, IGNORED, IGNORED, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch[DOCUMENT_IDS].tolist() == [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
