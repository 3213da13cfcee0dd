"""The learning rate and the optimiser's groups, against transformers and torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from launcher.job.spec import TrainingSection
from launcher.train.optim import adamw, learning_rate, parameter_groups

NAMES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def training(**changes: Any) -> TrainingSection:
    return TrainingSection.model_validate({"seq_len": 8, "global_batch_size": 2, "max_steps": 5, "lr": 3e-3, **changes})


def rates_of_transformers(name: str, lr: float, warmup_steps: int, num_steps: int) -> list[float]:
    """The rate of each optimiser step, as its Trainer would have it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("warmup_steps", "num_steps"), [(0, 1), (0, 7), (1, 7), (3, 50), (50, 50), (80, 50)])
@pytest.mark.parametrize("schedule", list(NAMES))
def test_every_step_has_the_rate_of_transformers(schedule: str, warmup_steps: int, num_steps: int) -> None:
    """Also a warm-up as long as the run, or longer."""
    section = training(schedule=schedule, warmup_steps=warmup_steps)
    ours = [learning_rate(section, step, num_steps) for step in range(num_steps)]
    assert ours == pytest.approx(
        rates_of_transformers(NAMES[schedule], 3e-3, warmup_steps, num_steps), rel=1e-12, abs=1e-18
    )


def test_cosine_ends_at_its_minimum() -> None:
    """`min_lr_ratio` of the peak, as the cosine of transformers with a minimum has it."""
    section = training(schedule="cosine", warmup_steps=2, min_lr_ratio=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    theirs = get_scheduler("cosine_with_min_lr", optimizer, 2, 20, scheduler_specific_kwargs={"min_lr_rate": 0.1})
    for step in range(20):
        assert learning_rate(section, step, 20) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()
    assert learning_rate(section, 20, 20) == pytest.approx(3e-4)


@given(
    schedule=st.sampled_from(list(NAMES)),
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
    rates = [learning_rate(section, step, num_steps) for step in range(num_steps)]
    warm, after = rates[:warmup_steps], rates[warmup_steps:]
    assert all(0 <= rate <= 3e-3 * (1 + 1e-12) for rate in rates)
    assert warm == sorted(warm)
    assert after == sorted(after, reverse=True)
    assert all(rate >= 3e-3 * ratio * (1 - 1e-12) for rate in after)


def test_biases_and_norms_are_not_decayed() -> None:
    """Matrices and embeddings are; a frozen parameter is in no group, and every other in exactly one."""
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    model[1].bias.requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [tuple(p.shape) for p in decayed["params"]] == [(5, 4), (4, 4)]
    assert [tuple(p.shape) for p in plain["params"]] == [(4,), (4,)]


def test_an_empty_group_is_left_out() -> None:
    """DeepSpeed trips over one."""
    assert len(parameter_groups(torch.nn.Linear(2, 2, bias=False), 0.1)) == 1


def test_a_tied_weight_is_stepped_once() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False), "b": torch.nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [1]


def test_adamw_has_the_numbers_of_the_spec() -> None:
    section = training(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3)
    optimizer = adamw(parameter_groups(torch.nn.Linear(2, 2), 0.3), section, torch.device("cpu"))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.95), 1e-6)
