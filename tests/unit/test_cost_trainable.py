"""What a method trains, on real small models: frozen parts by kind and name, adapters as peft makes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from launcher.cost.architecture import model_config
from launcher.cost.trainable import apply_method, new_head
from launcher.errors import ModelError, SpecError
from launcher.job.spec import MethodSection
from tests.unit.costs import spec_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 96}
GPT2 = {"n_layer": 3, "n_embd": 32, "n_head": 2, "vocab_size": 96, "n_positions": 64}


def built(model_type: str, auto_class: str = "AutoModelForCausalLM", **changes: Any) -> Any:
    config = transformers.AutoConfig.for_model(model_type, **{**(GPT2 if model_type == "gpt2" else SMALL), **changes})
    torch.manual_seed(0)
    return getattr(transformers, auto_class).from_config(config, dtype=torch.float32)


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_trains_everything() -> None:
    model = built("gpt2")
    assert apply_method(model, MethodSection()) is model
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_frozen_embeddings_are_all_tables_outside_the_blocks() -> None:
    """GPT-2's head is its embedding, so it is frozen with it; Llama's is not."""
    gpt2 = apply_method(built("gpt2"), MethodSection(freeze_embeddings=True))
    assert {name for name, _ in gpt2.named_parameters()} - trained(gpt2) == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    llama = apply_method(built("llama"), MethodSection(freeze_embeddings=True))
    assert {name for name, _ in llama.named_parameters()} - trained(llama) == {"model.embed_tokens.weight"}
    bert = apply_method(built("bert", "AutoModelForSequenceClassification"), MethodSection(freeze_embeddings=True))
    frozen = {name for name, _ in bert.named_parameters()} - trained(bert)
    assert frozen == {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}


def test_frozen_blocks_are_the_first_ones() -> None:
    model = apply_method(built("gpt2"), MethodSection(freeze_blocks=2))
    frozen = {name for name, _ in model.named_parameters()} - trained(model)
    assert frozen == {name for name, _ in model.named_parameters() if ".h.0." in name or ".h.1." in name}


def test_frozen_names_are_shell_wildcards() -> None:
    model = apply_method(built("gpt2"), MethodSection(freeze=("*.ln_[12].*", "transformer.wte.weight")))
    frozen = {name for name, _ in model.named_parameters()} - trained(model)
    assert "transformer.h.1.ln_2.bias" in frozen
    assert "transformer.wte.weight" in frozen
    assert "transformer.ln_f.weight" not in frozen
    assert len(frozen) == 3 * 4 + 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"freeze": ("*.attention.*",)},
            r"method.freeze: \*.attention.\* matches no parameter of GPT2LMHeadModel; names are like transformer\.h\.1\.",
        ),
        ({"freeze_blocks": 4}, r"method.freeze_blocks: 4 is more than the 3 blocks of GPT2LMHeadModel; give at most 3"),
        ({"freeze": ("*",)}, r"method: freezes every parameter; leave something to train"),
        (
            {"name": "lora", "target_modules": ("c_attn", "q_proj")},
            r"method.target_modules: q_proj is no layer of GPT2LMHeadModel; names are like transformer\.h\..*, or all-linear",
        ),
        ({"name": "lora", "target_modules": "ln_1"}, r"method: is refused by peft \(Target module LayerNorm"),
    ],
)
def test_what_is_not_there_is_said(method: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        apply_method(built("gpt2"), MethodSection(**method))


@pytest.mark.parametrize("r", [1, 4])
def test_adapters_have_the_sizes_of_the_paper(r: int) -> None:
    """r (in + out) for each linear layer of a block, none on the head that came with the weights (Hu et al., sec. 4.1)."""
    model = apply_method(built("llama", num_key_value_heads=1), MethodSection(name="lora", r=r))
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * r * sum(i + o for i, o in shapes)
    assert all("lora_" in name for name in trained(model))


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 32 / 4), (True, 32 / 2)])
def test_scaling(use_rslora: bool, scaling: float) -> None:
    """lora_alpha / r, or / sqrt(r)."""
    model = apply_method(built("gpt2"), MethodSection(name="lora", r=4, use_rslora=use_rslora))
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert layer.scaling == {"default": scaling}


def test_dora_learns_a_magnitude_for_each_output() -> None:
    plain, dora = (apply_method(built("llama"), MethodSection(name="lora", r=4, use_dora=use)) for use in (False, True))
    more = {name for name in trained(dora) if "magnitude" in name}
    outputs = 3 * (4 * 32 + 64 + 64 + 32)
    assert trained(dora) - more == trained(plain)
    assert sum(p.numel() for name, p in dora.named_parameters() if name in more) == outputs


@pytest.mark.parametrize(
    ("model_type", "auto_class", "head"),
    [
        ("bert", "AutoModelForSequenceClassification", ["classifier"]),
        ("gpt2", "AutoModelForSequenceClassification", ["score"]),
        ("llama", "AutoModelForTokenClassification", ["score"]),
        ("bert", "AutoModelForQuestionAnswering", ["qa_outputs"]),
        ("roberta", "AutoModelForSequenceClassification", ["classifier"]),
        ("bert", "AutoModelForMaskedLM", []),
        ("gpt2", "AutoModelForCausalLM", []),
    ],
)
def test_a_new_head_is_trained_whole(model_type: str, auto_class: str, head: list[str]) -> None:
    """It was drawn at random, so low-rank updates of it would be updates of noise."""
    model = built(model_type, auto_class)
    assert new_head(model) == head
    in_head = {name for name, _ in model.named_parameters() if name.split(".")[0] in head}
    adapted = apply_method(model, MethodSection(name="lora", r=2))
    whole = {name for name in trained(adapted) if "lora_" not in name}
    assert {name.replace("base_model.model.", "").replace("modules_to_save.default.", "") for name in whole} == in_head


def test_an_adapted_model_starts_as_the_model_itself() -> None:
    """B is zero, so the first logits are the same, and one step changes them."""
    ids = torch.arange(24).reshape(2, 12)
    plain = built("llama").eval()
    expected = plain(input_ids=ids).logits
    adapted = apply_method(built("llama").eval(), MethodSection(name="lora", r=4))
    assert torch.equal(adapted(input_ids=ids).logits, expected)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in adapted.parameters())


def test_sizes_are_the_same_without_memory() -> None:
    """On the meta device, as a model is measured."""
    with torch.device("meta"):
        measured = apply_method(built("gpt2"), MethodSection(name="lora", r=4))
    real = apply_method(built("gpt2"), MethodSection(name="lora", r=4))
    assert [(n, p.shape, p.requires_grad) for n, p in measured.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in real.named_parameters()
    ]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"r": 8}, "method: has `r`, which is for adapters; remove it, or give `name: lora`"),
        ({"name": "full", "use_dora": False}, "method: has `use_dora`, which is for adapters"),
        ({"name": "lora", "freeze_blocks": 2}, "method: has `freeze_blocks`, but lora freezes every weight; remove it"),
    ],
)
def test_an_option_of_the_other_method_is_an_error(method: dict[str, Any], message: str) -> None:
    """Also where it says what is the default."""
    with pytest.raises(SpecError, match=message):
        spec_of(method=method)


@pytest.mark.parametrize("method", ["full", "lora", {"name": "lora", "r": 3}, {"freeze_blocks": 1}])
def test_a_spec_that_was_written_down_can_be_read(method: Any) -> None:
    spec = spec_of(method=method)
    raw = json.loads(spec.model_dump_json())
    assert spec_of(method=raw["method"]) == spec


def test_all_but_the_head_is_frozen() -> None:
    """A classifier's head and pooler, a language model's own output layer; where that is the embeddings, it is refused."""
    bert = apply_method(built("bert", "AutoModelForSequenceClassification"), MethodSection(freeze_all_but_head=True))
    assert trained(bert) == {"classifier.weight", "classifier.bias"}
    llama = apply_method(built("llama"), MethodSection(freeze_all_but_head=True))
    assert trained(llama) == {"lm_head.weight"}
    with pytest.raises(SpecError, match="GPT2LMHeadModel is tied to the embeddings"):
        apply_method(built("gpt2"), MethodSection(freeze_all_but_head=True))
    with pytest.raises(ValueError, match="freezes more or less beside it"):
        MethodSection(freeze_all_but_head=True, freeze_blocks=1)


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "llama"])
def test_dropout_is_that_of_the_spec_everywhere(model_type: str) -> None:
    """In the modules that are built, and in what they keep of the config for their attention."""
    sizes = GPT2 if model_type == "gpt2" else SMALL
    config = model_config(spec_of(model={"from_config": {"model_type": model_type, **sizes}, "dropout": 0.25}))
    model = transformers.AutoModelForCausalLM.from_config(config)
    dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    kept = [module.attention_dropout for module in model.modules() if hasattr(module, "attention_dropout")]
    found = dropouts + [getattr(value, "p", value) for value in kept]
    assert found
    assert set(found) == {0.25}
    with pytest.raises(ModelError, match="has no effect on mamba"):
        model_config(spec_of(model={"from_config": {"model_type": "mamba"}, "dropout": 0.25}))
