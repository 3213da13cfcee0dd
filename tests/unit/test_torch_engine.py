"""Pure bf16 is what it says: parameters, gradients and moments. Gradual unfreezing is that of a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from launcher.plan import make_plan
from launcher.task import task_of
from launcher.train.torch_engine import TorchEngine
from tests.unit.costs import cluster_of, laid_out, small_cost, spec_of


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=31, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config).train()


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = (torch.arange(24).reshape(2, 12) * (step + 3)) % 31
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def test_pure_bf16_follows_a_plain_loop_in_bf16() -> None:
    """Three steps of one rank: weights bit for bit those of a plain loop over a model in bf16."""
    one = {"gpus_per_node": 1}
    spec = spec_of(cluster=one, parallel={"strategy": "ddp", "micro_batch_size": 2}, training__loss="full")
    plan = laid_out(make_plan(spec, small_cost(), cluster_of(10**9)), precision="pure_bf16")
    task, ours, plain = task_of(spec), model(), model().to(torch.bfloat16)
    engine = TorchEngine(plan, spec, ours, task, torch.device("cpu"))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        engine.accumulate(batch(step), 1 / 22, is_last=True)
        assert {p.grad.dtype for p in ours.parameters() if p.grad is not None} == {torch.bfloat16}
        engine.step(1e-2, 0)
        inputs = batch(step)
        logits = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        (task.loss_sum(logits, inputs) * (1 / 22)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, value), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, other), name
    moments = [m for state in engine._update.optimizers[0].state.values() for key, m in state.items() if key != "step"]
    assert moments
    assert {moment.dtype for moment in moments} == {torch.bfloat16}


@pytest.fixture
def _alone() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def unfreezing(every: int) -> tuple[TorchEngine, Any]:
    spec = spec_of(
        cluster={"gpus_per_node": 1},
        parallel={"strategy": "ddp", "micro_batch_size": 2},
        method={"unfreeze_every_steps": every},
        training__weight_decay=0.1,
        training__loss="full",  # as the plain loop makes it, bit for bit
    )
    plan = laid_out(make_plan(spec, small_cost(), cluster_of(10**9)), precision="fp32")
    ours = model()
    return TorchEngine(plan, spec, ours, task_of(spec), torch.device("cpu")), ours


def trained_from(name: str) -> int:
    """Layers above, in a GPT-2 of one block."""
    return 2 if ".wte." in name or ".wpe." in name else 1 if ".h." in name else 0


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("saved_at", [1, 3, 5])
def test_blocks_are_unfrozen_one_after_the_other(saved_at: int, tmp_path: Path) -> None:
    """Eight steps, a layer more every two: a plain loop that turns `requires_grad` on, bit for bit, also where a new
    engine went on from a checkpoint in between."""
    engine, ours = unfreezing(every=2)
    plain = model()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in plain.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
    )
    for step in range(8):
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(trained_from(name) <= step // 2)
        inputs = batch(step)
        logits = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        (task_of(spec_of()).loss_sum(logits, inputs) * (1 / 22)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
        optimizer.zero_grad()
        engine.accumulate(inputs, 1 / 22, is_last=True)
        engine.step(1e-2, step)
        if step == saved_at:
            engine.save(tmp_path)
            engine, ours = unfreezing(every=2)
            engine.load(tmp_path)
    for (name, value), other in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(value, other[1]), name
