"""The loss in chunks is the loss of all logits: value and every gradient, on families that treat their logits otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from launcher.cost.trainable import apply_method
from launcher.errors import ModelError
from launcher.job.spec import MethodSection
from launcher.plan import make_plan
from launcher.task import task_of
from launcher.train import chunked
from launcher.train.chunked import StepLoss
from launcher.train.engine import model_inputs
from tests.unit.costs import cluster_of, laid_out, small_cost, spec_of

SMALL = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
SMALL |= {"num_key_value_heads": 3, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OLD = {"vocab_size": 97, "n_embd": 24, "n_layer": 2, "n_head": 3, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
OLD |= {"attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
ENCODER |= {"intermediate_size": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "llama, tied": {**SMALL, "tie_word_embeddings": True},
    "gpt2": OLD,
    "gemma2": {**SMALL, "final_logit_softcapping": 2.0},
    "gemma3_text": {**SMALL, "final_logit_softcapping": 0.5},
    "cohere": {**SMALL, "logit_scale": 3.0},
    "granite": {**SMALL, "logits_scaling": 0.125},
    "bert": ENCODER,
    "roberta": {**ENCODER, "max_position_embeddings": 40},
    "distilbert": {"vocab_size": 97, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "dropout": 0.0},
    "modernbert": {**SMALL, "cls_token_id": 3, "sep_token_id": 4, "attention_dropout": 0.0},
}
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")
Found = tuple[float, dict[str, torch.Tensor]]


def model_of(family: str, seed: int) -> Any:
    config = transformers.AutoConfig.for_model(family.partition(",")[0], **FAMILIES[family])
    if hasattr(config, "attention_dropout"):
        config.attention_dropout = 0.0
    kind = transformers.AutoModelForMaskedLM if family in ENCODERS else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # away from zero, so that a cap or a scale shows
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch_of(task: str, seed: int) -> dict[str, torch.Tensor]:
    """Uneven rows, prompts without targets, one row with none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 97, (4, 11), generator=generator)
    mask = (torch.arange(11) < torch.tensor([11, 7, 9, 4])[:, None]).long()
    counts = (torch.rand(4, 11, generator=generator) < 0.6) & mask.bool() & (torch.arange(4) != 3)[:, None]
    counts[:, 0] &= task == "masked_lm"
    more = {"reference": torch.tensor([[-9.0, -8.0], [-7.0, -8.5]]), "samples": torch.tensor([0, 1])}
    labels = ids.masked_fill(~counts, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **(more if task == "preference" else {})}


def step_loss(model: Any, task: str, loss: str = "auto", precision: str = "fp32") -> StepLoss:
    spec = spec_of(task=task, training__loss=loss)
    plan = laid_out(make_plan(spec, small_cost(), cluster_of(10**9)), precision=precision)
    return StepLoss(plan, spec, model, task_of(spec))


def found(model: Any, loss: StepLoss, batch: dict[str, torch.Tensor], scale: float = 0.37) -> Found:
    model.zero_grad()
    total = loss.of(lambda: model(**model_inputs(batch, model.config)), batch)
    (total * scale).backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(ours: Found, theirs: Found, tolerance: float = 1e-6) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(
            ours[1][name], gradient, rtol=0, atol=tolerance * largest, msg=lambda m, n=name: n + m
        )


@pytest.fixture(params=[3, 1000])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens at a time."""
    monkeypatch.setattr(chunked.ChunkedLoss, "_rows", lambda self, device: request.param)
    return int(request.param)


@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradients_are_those_of_all_logits(family: str, rows: int) -> None:
    """fp32, to 1e-6 of the largest gradient, however many tokens are taken at a time; other weights each time."""
    seed = rows
    model, task = model_of(family, seed).train(), "masked_lm" if family in ENCODERS else "causal_lm"
    loss, batch = step_loss(model, task), batch_of(task, seed)
    before = dict(vars(model.config))
    assert loss.settle(lambda b: model(**model_inputs(b, model.config)).logits, torch.device("cpu")) is None
    assert loss.chunked is not None
    ours = found(model, loss, batch)
    assert_alike(ours, found(model, step_loss(model, task, "full"), batch))
    assert vars(model.config) == before
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("task", ["chat", "preference"])
def test_other_tasks_of_tokens(task: str, rows: int) -> None:
    """Turns with a loss mask; pairs of answers, whose tokens count by what the whole answer is worth."""
    model, batch = model_of("gemma2", 3).train(), batch_of(task, 3)
    assert_alike(found(model, step_loss(model, task), batch), found(model, step_loss(model, task, "full"), batch))


def test_a_scaled_loss_makes_the_logits_again(rows: int) -> None:
    """fp16, where gradients made before the loss is scaled would vanish: made in backward instead, the same here."""
    model, batch = model_of("llama", 5).train(), batch_of("causal_lm", 5)
    scaled = step_loss(model, "causal_lm", precision="fp16")
    assert_alike(found(model, scaled, batch), found(model, step_loss(model, "causal_lm", "full"), batch))


@pytest.mark.parametrize("targets", ["all-linear", ("lm_head", "q_proj")])
def test_adapters(targets: Any, rows: int) -> None:
    """Beside a frozen head, and in the head itself."""
    method = MethodSection(name="lora", r=3, target_modules=targets)
    model = apply_method(model_of("llama", 4), method).train()
    batch = batch_of("causal_lm", 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    full = found(model, step_loss(model, "causal_lm", "full"), batch)
    assert_alike(found(model, step_loss(model, "causal_lm"), batch), full)


def test_no_target_at_all() -> None:
    """A rank that has run out: 0, with a gradient of zeros for every parameter, as from all logits."""
    model, batch = model_of("llama", 2).train(), batch_of("causal_lm", 2)
    batch["labels"][:] = -100
    for precision in ("fp32", "fp16"):
        ours = found(model, step_loss(model, "causal_lm", precision=precision), batch)
        theirs = found(model, step_loss(model, "causal_lm", "full"), batch)
        assert ours[0] == 0
        assert ours[1].keys() == theirs[1].keys()
        assert not any(gradient.any() for gradient in ours[1].values())


def test_half_precision_keeps_the_head_gradient_in_fp32() -> None:
    """bf16: as near to fp32 as all logits at once are, with many chunks as with one."""
    exact = found(
        model_of("llama", 6).train(), step_loss(model_of("llama", 6), "causal_lm", "full"), batch_of("causal_lm", 6)
    )
    model, batch = model_of("llama", 6).to(torch.bfloat16).train(), batch_of("causal_lm", 6)
    errors = {}
    for kind in ("full", "chunked"):
        value, gradients = found(model, step_loss(model, "causal_lm", kind), batch)
        assert gradients["lm_head.weight"].dtype == torch.bfloat16
        assert value == pytest.approx(exact[0], rel=0.02)
        errors[kind] = float((gradients["lm_head.weight"].float() - exact[1]["lm_head.weight"]).norm())
    assert errors["chunked"] <= 1.5 * errors["full"]


def test_scores_are_those_of_all_logits(rows: int) -> None:
    """Sums of the metrics, for every task of tokens."""
    for task, family in (("causal_lm", "granite"), ("masked_lm", "bert"), ("preference", "cohere")):
        model, batch = model_of(family, 8).eval(), batch_of(task, 8)
        loss, metrics = step_loss(model, task), task_of(spec_of(task=task)).metrics
        ours, theirs = metrics(), metrics()
        with torch.no_grad():
            ours.update(loss.scores(lambda: model(**model_inputs(batch, model.config)), batch), batch)  # noqa: B023
            theirs.update(model(**model_inputs(batch, model.config)).logits, batch)
        torch.testing.assert_close(ours.sums, theirs.sums, rtol=1e-6, atol=0)


def test_an_unknown_treatment_of_logits_is_seen() -> None:
    """HyperCLOVA X multiplies by what Granite divides by: whole logits with `auto`, an error where chunks are asked for."""
    config = transformers.AutoConfig.for_model("hyperclovax", **{**SMALL, "logits_scaling": 0.125})
    model = transformers.AutoModelForCausalLM.from_config(config)

    def evaluate(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**model_inputs(batch, model.config)).logits

    loss = step_loss(model, "causal_lm")
    assert "all logits at once" in str(loss.settle(evaluate, torch.device("cpu")))
    assert loss.chunked is None
    with pytest.raises(ModelError, match=r"training\.loss: chunked does not know .*; set it to auto or full"):
        step_loss(model, "causal_lm", "chunked").settle(evaluate, torch.device("cpu"))
