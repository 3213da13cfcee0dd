"""What `torch.distributed.fsdp.fully_shard` gets, as plain values."""

from __future__ import annotations

from typing import Any

from launcher.plan.values import Plan


def fsdp_settings(plan: Plan) -> dict[str, Any]:
    """One FSDP group per transformer block, one for the rest; gradients are always reduced in fp32."""
    return {
        "wrap": "transformer_blocks",
        "reshard_after_forward": True,
        "param_dtype": {"fp32": "float32", "bf16": "bfloat16"}[plan.chosen.layout.precision],
        "reduce_dtype": "float32",
    }
