"""What `torch.distributed.fsdp.fully_shard` gets, as plain values."""

from __future__ import annotations

from typing import Any

from launcher.plan.layout import Layout
from launcher.plan.values import Plan

STRATEGIES = ("fsdp", "hsdp")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "pure_bf16": "bfloat16"}


def fsdp_settings(plan: Plan) -> dict[str, Any]:
    """One FSDP group per transformer block, one for the rest; gradients are always reduced in fp32.

    mesh: ranks that hold copies of each other's shards x ranks that a parameter is cut over.
    """
    layout = plan.chosen.layout
    return {
        "wrap": "transformer_blocks",
        "mesh": _mesh(layout),
        "reshard_after_forward": layout.reshard_after_forward,
        "cpu_offload": layout.offload_params == "cpu",
        "state_dtype": "bfloat16" if layout.precision == "pure_bf16" else "float32",
        "param_dtype": _DTYPES[layout.precision],
        "reduce_dtype": "float32",
    }


def _mesh(layout: Layout) -> dict[str, int]:
    if layout.strategy == "hsdp":
        return {"replicate": layout.num_ranks // layout.shard_group_size, "shard": layout.shard_group_size}
    return {"shard": layout.num_ranks}
