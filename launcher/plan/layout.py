"""How a step is laid over the ranks: the value that memory, time and the emitted files are all functions of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Engine = Literal["torch", "deepspeed"]
ENGINE_OF: dict[str, Engine] = {
    "ddp": "torch",
    "fsdp": "torch",
    "hsdp": "torch",
    "zero1": "deepspeed",
    "zero2": "deepspeed",
    "zero3": "deepspeed",
    "hpz": "deepspeed",
}
GROUPED = ("hsdp", "hpz")
"""Strategies that shard within groups of ranks."""
FP32 = 4
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "pure_bf16": 2}
"""Of an element in forward and backward."""


@dataclass(frozen=True)
class Layout:
    """One way to do the job's steps."""

    strategy: str
    nodes: int
    ranks_per_node: int
    micro_batch_size: int
    """Samples per rank in one forward and backward pass."""
    accumulation_steps: int
    """Forward and backward passes per optimiser step."""
    seq_len: int
    recompute: str
    """`none` or `full`."""
    precision: str
    shard_group_size: int = 0
    """hsdp and hpz: ranks of a group; 0 for the others."""
    reshard_after_forward: bool = True
    """fsdp and hsdp: whether gathered parameters are freed between forward and backward."""
    offload_optimizer: str = "none"
    offload_params: str = "none"
    reduce_bytes: int = FP32
    """Bytes of a gradient element on its way between ranks; fsdp only, the others reduce in their own precision."""
    state_bytes: int = FP32
    """Bytes of an element of fsdp's parameters, gradients and moments; foreign stacks only, see `precision`."""
    fp8: bool = False
    """Whether the blocks' products run in fp8: foreign stacks only."""

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def rank_tokens(self) -> int:
        """Tokens of one rank in one micro-batch."""
        return self.micro_batch_size * self.seq_len

    @property
    def engine(self) -> Engine:
        return ENGINE_OF[self.strategy]

    @property
    def element_bytes(self) -> int:
        """Of a parameter in forward and backward."""
        return ELEMENT_BYTES[self.precision]

    @property
    def autocast(self) -> bool:
        """Whether products alone run in bf16, between parameters and hidden states of fp32: torch's autocast."""
        return self.strategy == "ddp" and self.precision == "bf16"

    @property
    def gradient_bytes(self) -> int:
        """Of a gradient that torch keeps: its parameter's format, fp32 but for `pure_bf16`."""
        return ELEMENT_BYTES["pure_bf16"] if self.precision == "pure_bf16" else FP32

    @property
    def num_optimiser_shards(self) -> int:
        """Ranks over which the optimiser's state is cut."""
        return {"ddp": 1, "hsdp": self.shard_group_size}.get(self.strategy, self.num_ranks)

    @property
    def label(self) -> str:
        """Says all that can differ between two candidates of one job."""
        group = f" in groups of {self.shard_group_size}" if self.shard_group_size else ""
        extras = [
            "recompute" if self.recompute == "full" else "",
            "" if self.reshard_after_forward else "no reshard",
            "" if self.offload_optimizer == "none" else f"optimiser on {self.offload_optimizer}",
            "" if self.offload_params == "none" else f"parameters on {self.offload_params}",
        ]
        batch = f"micro-batch {self.micro_batch_size} x {self.accumulation_steps}"
        return ", ".join([f"{self.strategy}{group}", batch, *filter(None, extras)])

    def decided(self) -> dict[str, Any]:
        """What a plan decides, for JSON; sizes that come from the spec and foreign stacks' figures left out."""
        fixed = ("nodes", "ranks_per_node", "seq_len", "reduce_bytes", "state_bytes", "fp8")
        return {key: value for key, value in asdict(self).items() if key not in fixed}
