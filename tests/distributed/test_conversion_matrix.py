"""Every format into every other, from real checkpoints of two ranks: all tensors and the optimiser bit for bit.

Each conversion ends on another number of ranks (1 to 4), none of which divides the shapes. The truth is what the live
ranks gathered with their own library's means, not what this project reads.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.stored.state import STEP, State
from launcher.stored.values import whole
from tools.conversion.opening import open_state
from tools.convert import convert

ENGINES = ("zero1", "zero2", "zero3", "fsdp")
MODELS = ("gpt2", "llama", "bert", "bert_frozen", "gpt2_lora")
WITH_OPTIMIZER = ("zero1", "zero2", "zero3", "dcp", "torch", "universal2", "universal3")
SINKS = (*WITH_OPTIMIZER, "hf")


def asked(sink: str, ranks: int) -> tuple[str, dict[str, Any]]:
    """Format and options: `zero3` is zero: with --stage 3."""
    kind = sink.rstrip("123")
    options: dict[str, Any] = {} if kind in ("hf", "torch") else {"ranks": ranks}
    if sink[-1].isdigit():
        options["stage"] = int(sink[-1])
    return kind, options | ({"no_config": True} if kind == "hf" else {})


def opened(path: Path) -> State:
    return open_state(str(path), None, lambda _what, _done, _total: None).state


def converted(source: Path, sink: str, ranks: int, out: Path) -> Path:
    kind, options = asked(sink, ranks)
    convert(str(source), f"{kind}:{out}", **options)
    return out


def assert_same(state: State, truth: dict[str, torch.Tensor], moments: dict[str, torch.Tensor] | None) -> None:
    """Weights under every name; two moments, the step and each group's weight decay."""
    found = dict(state.tensors) | {name: state.tensors[kept] for name, kept in state.aliases.items()}
    assert set(truth) - set(found) <= {"lm_head.weight", "base_model.model.lm_head.weight"}
    for name, values in found.items():
        assert torch.equal(whole(values), truth[name]), name
    if moments is None:
        assert state.optimizer is None
        return
    assert state.optimizer is not None
    assert {f"{n}/{key}" for n, one in state.optimizer.state.items() for key in one if key != STEP} == set(moments)
    for name, states in state.optimizer.state.items():
        assert float(whole(states[STEP])) == 1
        for key in set(states) - {STEP}:
            assert torch.equal(whole(states[key]), moments[f"{name}/{key}"]), (name, key)
    for group in (one for one in state.optimizer.groups if one.names):  # adapters are matrices alone
        decays = {0.1 if truth[name].ndim >= 2 else 0.0 for name in group.names}
        assert {group.settings["weight_decay"]} == decays


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_each_format_holds_what_the_ranks_held(saved: Path, engine: str, model: str, tmp_path: Path) -> None:
    """Tied and untied, GPT and BERT, frozen parts, adapters, two groups: in one hop from what the library saved."""
    truth = load_file(saved / "truth" / f"{engine}-{model}.safetensors")
    moments = load_file(saved / "moments" / f"{engine}-{model}.safetensors")
    assert_same(opened(saved / engine / model), truth, moments)
    for number, sink in enumerate(SINKS):
        out = converted(saved / engine / model, sink, 1 + number % 4, tmp_path / sink)
        assert_same(opened(out), truth, moments if sink in WITH_OPTIMIZER else None)


@pytest.mark.parametrize("first", SINKS)
def test_and_each_of_them_into_each_other(saved: Path, first: str, tmp_path: Path) -> None:
    """There and back: zero -> dcp -> zero among them. What comes from weights alone stays weights alone."""
    engine = "fsdp" if first.startswith("zero") else "zero3"
    truth = load_file(saved / "truth" / f"{engine}-gpt2.safetensors")
    moments = load_file(saved / "moments" / f"{engine}-gpt2.safetensors")
    middle = converted(saved / engine / "gpt2", first, 3, tmp_path / "middle")
    for ranks, second in zip(itertools.cycle((4, 1, 2, 3)), SINKS):
        if first == "hf" and second.startswith("universal"):
            continue  # refused: nothing but an optimiser makes it one
        state = opened(converted(middle, second, ranks, tmp_path / second))
        if first == "hf" and second.startswith("zero"):
            assert state.optimizer is not None
            assert not state.optimizer.state
            state = state.without_optimizer()
        assert_same(state, truth, moments if first != "hf" and second in WITH_OPTIMIZER else None)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_bf16_masters_and_module_survive(saved: Path, model: str, tmp_path: Path) -> None:
    """A bf16 run keeps fp32 masters in every format, and its module's type on the way back to DeepSpeed."""
    if model == "llama":
        source, dtype = saved / "zero1" / model, "bf16"
    else:
        source, dtype = saved / "zero3_bf16" / model, None
    masters = {name: whole(values) for name, values in opened(source).tensors.items()}
    convert(str(source), f"zero:{tmp_path / 'z'}", stage=2, ranks=3, dtype=dtype)
    back = opened(tmp_path / "z")
    assert back.compute_dtype == torch.bfloat16
    for name, values in back.tensors.items():
        assert values.dtype == torch.float32
        assert torch.equal(whole(values), masters[name])
    module = torch.load(next((tmp_path / "z").rglob("mp_rank_00_model_states.pt")), weights_only=False)["module"]
    for name, tensor in masters.items():
        assert torch.equal(module[name], tensor.bfloat16()), name
