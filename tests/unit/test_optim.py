"""The learning rate and the optimiser's groups, against transformers and torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, get_scheduler

from launcher.job.spec import TrainingSection
from launcher.train.optim import adamw, layer_shares, make_optimizers, parameter_groups
from launcher.train.schedule import Schedule

NAMES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "cosine_with_restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
    "inverse_sqrt": "inverse_sqrt",
    "wsd": "warmup_stable_decay",
}
"""Ours -> transformers'."""


def training(**changes: Any) -> TrainingSection:
    return TrainingSection.model_validate({"seq_len": 8, "global_batch_size": 2, "max_steps": 5, "lr": 3e-3, **changes})


def rate(section: TrainingSection, step: int, num_steps: int) -> float:
    return Schedule.of(section, num_steps, tokens_per_sample=8).rate(step)


def rates_of_transformers(name: str, lr: float, warmup_steps: int, num_steps: int, **special: Any) -> list[float]:
    """The rate of each optimiser step, as its Trainer would have it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = get_scheduler(name, optimizer, warmup_steps, num_steps, scheduler_specific_kwargs=special)
    rates = []
    for step in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < num_steps - 1:  # behind a warm-up as long as the run its polynomial divides by zero
            scheduler.step()
    return rates


@pytest.mark.parametrize(("warmup_steps", "num_steps"), [(0, 1), (0, 7), (1, 7), (3, 50), (50, 50), (80, 50)])
@pytest.mark.parametrize(
    ("schedule", "ours", "theirs"),
    [
        ("cosine", {}, {}),
        ("linear", {}, {}),
        ("constant", {}, {}),
        ("cosine_with_restarts", {}, {}),
        ("cosine_with_restarts", {"lr_cycles": 3}, {"num_cycles": 3}),
        ("polynomial", {"lr_power": 2.5, "min_lr_ratio": 0.1}, {"power": 2.5, "lr_end": 3e-4}),
        ("polynomial", {}, {"lr_end": 0.0}),
        ("inverse_sqrt", {}, {}),
        *(
            ("wsd", {"decay_share": 0.4, "min_lr_ratio": 0.2, "decay_shape": shape}, {"decay_type": shape})
            for shape in ("cosine", "linear", "1-sqrt")
        ),
    ],
)
def test_every_step_has_the_rate_of_transformers(
    schedule: str, ours: dict[str, Any], theirs: dict[str, Any], warmup_steps: int, num_steps: int
) -> None:
    """Also a warm-up as long as the run, or longer; where it reaches into the decay of wsd it comes first."""
    section = training(schedule=schedule, warmup_steps=warmup_steps, **ours)
    if schedule == "wsd":
        num_decay = math.ceil(0.4 * num_steps)
        theirs = {**theirs, "min_lr_ratio": 0.2, "num_decay_steps": num_decay}
        if warmup_steps + num_decay > num_steps:  # transformers takes a negative number of stable steps as it is
            theirs["num_stable_steps"] = 0
    rates = [rate(section, step, num_steps) for step in range(num_steps)]
    expected = rates_of_transformers(NAMES[schedule], 3e-3, warmup_steps, num_steps, **theirs)
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_a_warm_up_is_given_in_steps_a_ratio_or_tokens() -> None:
    """transformers rounds a ratio up; tokens are those of as many steps, at the data's mean length."""
    args = TrainingArguments(output_dir="unused", warmup_steps=0.15, use_cpu=True)
    assert args.get_warmup_steps(50) == 8
    for told in ({"warmup_steps": 8}, {"warmup_ratio": 0.15}, {"warmup_tokens": 8 * 2 * 10 - 3}):
        assert Schedule.of(training(**told), 50, tokens_per_sample=10).warmup_steps == 8, told
    with pytest.raises(ValueError, match="has both `warmup_steps` and `warmup_ratio`"):
        training(warmup_steps=3, warmup_ratio=0.1)


def test_a_range_rises_by_equal_factors() -> None:
    section = training(schedule="lr_range", min_lr_ratio=1e-6)
    rates = [rate(section, step, 7) for step in range(7)]
    assert rates == pytest.approx([3e-9 * 10**step for step in range(7)])


def test_cosine_ends_at_its_minimum() -> None:
    """`min_lr_ratio` of the peak, as the cosine of transformers with a minimum has it."""
    section = training(schedule="cosine", warmup_steps=2, min_lr_ratio=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    theirs = get_scheduler("cosine_with_min_lr", optimizer, 2, 20, scheduler_specific_kwargs={"min_lr_rate": 0.1})
    for step in range(20):
        assert rate(section, step, 20) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()
    assert rate(section, 20, 20) == pytest.approx(3e-4)


@given(
    schedule=st.sampled_from([name for name in NAMES if name != "cosine_with_restarts"]),
    warmup_steps=st.integers(0, 200),
    num_steps=st.integers(1, 200),
    ratio=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_the_rate_rises_to_the_peak_and_falls_to_the_minimum(
    schedule: str, warmup_steps: int, num_steps: int, ratio: float
) -> None:
    """Never above the peak, never below the minimum after the warm-up, whatever the numbers."""
    section = training(schedule=schedule, warmup_steps=warmup_steps, min_lr_ratio=ratio)
    rates = [rate(section, step, num_steps) for step in range(num_steps)]
    warm, after = rates[:warmup_steps], rates[warmup_steps:]
    assert all(0 <= rate <= 3e-3 * (1 + 1e-12) for rate in rates)
    assert warm == sorted(warm)
    assert after == sorted(after, reverse=True)
    assert all(rate >= 3e-3 * ratio * (1 - 1e-12) for rate in after)


def test_biases_and_norms_are_not_decayed() -> None:
    """Matrices and embeddings are; a frozen parameter is in no group, and every other in exactly one."""
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    model[1].bias.requires_grad_(False)
    decayed, plain = parameter_groups(model, training(weight_decay=0.1))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [tuple(p.shape) for p in decayed["params"]] == [(5, 4), (4, 4)]
    assert [tuple(p.shape) for p in plain["params"]] == [(4,), (4,)]


def test_an_empty_group_is_left_out() -> None:
    """DeepSpeed trips over one."""
    assert len(parameter_groups(torch.nn.Linear(2, 2, bias=False), training(weight_decay=0.1))) == 1


def test_a_tied_weight_is_stepped_once() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False), "b": torch.nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    assert [len(group["params"]) for group in parameter_groups(model, training(weight_decay=0.1))] == [1]


def test_adamw_has_the_numbers_of_the_spec() -> None:
    section = training(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3)
    optimizer = adamw(parameter_groups(torch.nn.Linear(2, 2), section), section, torch.device("cpu"))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.95), 1e-6)


@pytest.fixture(scope="module")
def bert() -> BertForSequenceClassification:
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=20, **sizes))


def test_layers_learn_slower_the_deeper_they_lie(bert: Any) -> None:
    """ELECTRA's rule: the head at the full rate, each layer below at `layer_lr_decay` of the one above it."""
    shares = layer_shares(bert, 0.5)
    assert shares.keys() == dict(bert.named_parameters()).keys()
    expected = {"classifier": 1, "pooler": 1, "layer.2": 0.5, "layer.1": 0.25, "layer.0": 0.125, "embeddings": 0.0625}
    for name, share in shares.items():
        assert share == next(value for part, value in expected.items() if part in name), name


def test_no_decay_names_more_parameters(bert: Any) -> None:
    section = training(weight_decay=0.1, no_decay=("*embeddings*",), layer_lr_decay=0.5)
    groups = parameter_groups(bert, section)
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == len(list(bert.parameters()))
    for name, parameter in bert.named_parameters():
        is_decayed = parameter.ndim > 1 and "embeddings" not in name
        assert of[id(parameter)]["weight_decay"] == (0.1 if is_decayed else 0.0), name


def test_muon_takes_the_matrices_of_the_blocks(bert: Any) -> None:
    """AdamW the rest: embeddings, head, vectors; the shares of the rate are in the order of all groups."""
    section = training(optimizer="muon", layer_lr_decay=0.5)
    (muon, adam), shares = make_optimizers(bert, section, torch.device("cpu"))
    names = {id(p): name for name, p in bert.named_parameters()}
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert matrices == {name for name, p in bert.named_parameters() if ".layer." in name and p.ndim == 2}
    groups = [*muon.param_groups, *adam.param_groups]
    assert sum(len(group["params"]) for group in groups) == len(names)
    by_name = layer_shares(bert, 0.5)
    for group, share in zip(groups, shares, strict=True):
        assert {by_name[names[id(p)]] for p in group["params"]} == {share}


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_optimisers_are_those_of_bitsandbytes(bert: Any, name: str) -> None:
    """Made here, stepped only where there is CUDA: their settings are the spec's."""
    pytest.importorskip("bitsandbytes")
    section = training(optimizer=name, weight_decay=0.1, beta2=0.95)
    (optimizer,), _ = make_optimizers(bert, section, torch.device("cpu"))
    assert f"{type(optimizer).__module__}.{type(optimizer).__name__}".endswith(
        {"paged_adamw": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}[name]
    )
    assert optimizer.is_paged
    assert [(group["weight_decay"], group["betas"]) for group in optimizer.param_groups] == [
        (0.1, (0.9, 0.95)),
        (0.0, (0.9, 0.95)),
    ]
