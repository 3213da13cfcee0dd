"""Pure bf16 is what it says: parameters, gradients and moments."""

from __future__ import annotations

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
    spec = spec_of(cluster={"gpus_per_node": 1}, parallel={"strategy": "ddp", "micro_batch_size": 2})
    plan = laid_out(make_plan(spec, small_cost(), cluster_of(10**9)), precision="pure_bf16")
    task, ours, plain = task_of(spec), model(), model().to(torch.bfloat16)
    engine = TorchEngine(plan, spec, ours, task, torch.device("cpu"))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        engine.accumulate(batch(step), 1 / 22, is_last=True)
        assert {p.grad.dtype for p in ours.parameters() if p.grad is not None} == {torch.bfloat16}
        engine.step(1e-2)
        inputs = batch(step)
        logits = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        (task.loss_sum(logits, inputs) * (1 / 22)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, value), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, other), name
    moments = [m for state in engine._optimizer.state.values() for key, m in state.items() if key != "step"]
    assert moments
    assert {moment.dtype for moment in moments} == {torch.bfloat16}
