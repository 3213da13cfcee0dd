"""`fleetune cost`: what a model costs, before there is a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.command.options import AsJson
from launcher.units import show_bytes, show_count

if TYPE_CHECKING:
    from launcher.cost import ModelCost


def cost(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, config.json or hub id.", show_default=False)],
    task: Annotated[str, typer.Option(help="What it would learn.")] = "causal_lm",
    method: Annotated[str, typer.Option(help="full or lora.")] = "full",
    seq_len: Annotated[int, typer.Option(help="Tokens per sample.")] = 1024,
    micro_batch: Annotated[int, typer.Option(help="Samples of one forward and backward pass.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say how many parameters a model has, what one pass keeps and computes."""
    from launcher.cost.cache import cached_cost
    from launcher.job import parse_spec

    source = {"from_config": model} if Path(model).is_file() else {"path": model}
    raw = {
        "output_dir": ".",
        "model": source,
        "task": task,
        "method": method,
        "data": {"train": "none"},
        "training": {"seq_len": seq_len, "global_batch_size": micro_batch, "max_steps": 1},
        "parallel": {"micro_batch_size": micro_batch},
    }
    facts = described(cached_cost(parse_spec(raw)), micro_batch, seq_len)
    typer.echo(json.dumps(facts, indent=2) if as_json else _shown(facts))


def described(cost: ModelCost, micro_batch: int, seq_len: int) -> dict[str, Any]:
    """Stable keys. Bytes are of one pass over `micro_batch` x `seq_len` tokens, by precision; FLOPs of the same pass.

    `saved_bytes` by item and recompute policy; `peak_bytes` by policy and moment (`loss`, `blocks`, `embeddings`).
    """
    tokens, flops = micro_batch * seq_len, cost.flops
    backward = (
        2 * flops.blocks if flops.blocks_backward is None else flops.blocks_backward,
        2 * flops.outside if flops.outside_backward is None else flops.outside_backward,
        2.5 * flops.attention if flops.attention_backward is None else flops.attention_backward,
    )
    return {
        "architecture": cost.architecture,
        "num_params": cost.num_params,
        "num_trainable_params": cost.num_trainable_params,
        "num_active_params": cost.num_active_params or cost.num_params,
        "num_blocks": cost.num_blocks,
        "block_num_params": cost.block_num_params,
        "outside_num_params": cost.outside_num_params,
        "max_positions": cost.max_positions,
        "micro_batch_size": micro_batch,
        "seq_len": seq_len,
        "saved_bytes": {trace: _saved(cost, trace, micro_batch, seq_len) for trace in cost.saved},
        "peak_bytes": {
            trace: {policy: peak.at(micro_batch, seq_len) for policy, peak in policies.items()}
            for trace, policies in cost.peak.items()
        },
        "flops": {
            "forward": _flops(flops.blocks, flops.outside, flops.attention, tokens, seq_len),
            "backward": _flops(*backward, tokens, seq_len),
        },
        "derived": list(cost.derived),
    }


def _saved(cost: ModelCost, trace: str, micro_batch: int, seq_len: int) -> dict[str, int | None]:
    saved = cost.saved[trace]
    kept = saved.recomputed
    return {
        "blocks": saved.blocks.at(micro_batch, seq_len),
        "blocks_recomputed": kept.at(micro_batch, seq_len) if kept else None,
        "outside": saved.outside.at(micro_batch, seq_len),
    }


def _flops(blocks: float, outside: float, attention: float, tokens: int, seq_len: int) -> dict[str, float]:
    return {"blocks": tokens * blocks, "outside": tokens * outside, "attention": tokens * seq_len * attention}


def _shown(facts: dict[str, Any]) -> str:
    counts = {
        "parameters": facts["num_params"],
        "trainable": facts["num_trainable_params"],
        "active": facts["num_active_params"],
        "in a block": facts["block_num_params"],
        "outside blocks": facts["outside_num_params"],
    }
    lines = [f"{facts['architecture']}, {facts['num_blocks']} blocks"]
    lines += [f"  {name:<16}{show_count(number):>10}  {number:,}" for name, number in counts.items()]
    lines.append(f"one pass over {facts['micro_batch_size']} x {facts['seq_len']} tokens:")
    for trace, saved in facts["saved_bytes"].items():
        items = [f"{name} {show_bytes(size)}" for name, size in saved.items() if size is not None]
        lines.append(f"  kept, {trace:<12}{', '.join(items)}")
    for trace, policies in facts["peak_bytes"].items():
        items = [f"{policy} {show_bytes(max(moments.values()))}" for policy, moments in policies.items()]
        lines.append(f"  peak, {trace:<12}{', '.join(items)}")
    for way, flops in facts["flops"].items():
        items = [f"{name} {number / 1e12:.4g}" for name, number in flops.items()]
        lines.append(f"  TFLOP {way:<12}{', '.join(items)}")
    return "\n".join(lines)
