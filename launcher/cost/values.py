"""The values that the planner computes with. No torch here: a login node reads them from JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LinearInBatch:
    """Bytes as a function of micro-batch B and sequence length T: `B (a T + b T^2) + c T + d T^2`."""

    per_token: float
    """a"""
    per_token_squared: float
    """b"""
    fixed_per_token: float = 0.0
    """c: what does not grow with the batch, such as tables of positions."""
    fixed_per_token_squared: float = 0.0
    """d: masks, say."""

    def at(self, micro_batch_size: int, seq_len: int) -> int:
        per_sample = seq_len * (self.per_token + self.per_token_squared * seq_len)
        fixed = seq_len * (self.fixed_per_token + self.fixed_per_token_squared * seq_len)
        return max(0, round(micro_batch_size * per_sample + fixed))


@dataclass(frozen=True)
class SavedBytes:
    """What autograd keeps from forward for backward, parameters not counted, logits and loss not counted."""

    blocks: LinearInBatch
    """All transformer blocks together."""
    outside: LinearInBatch
    """Embeddings, final norm, head."""
    block_inputs: LinearInBatch
    """Inputs of all blocks: what full recompute keeps."""


@dataclass(frozen=True)
class Flops:
    """Multiplications and additions of one forward pass, per token; backward takes twice as many."""

    blocks: float
    """Matrix products in the blocks."""
    outside: float
    """Matrix products outside them: the head."""
    attention: float
    """Attention, per token and token of context, nothing masked: `4 L h` in a plain transformer."""
    blocks_backward: float | None = None
    """Matrix products in the blocks' backward pass; None: twice the forward's, as when every weight is trained."""
    outside_backward: float | None = None
    """The same outside the blocks."""


@dataclass(frozen=True)
class TensorGroup:
    """Parameters that are alike: what sharding pads depends on their shapes."""

    shape: tuple[int, ...]
    count: int
    trainable: bool
    in_block: bool
    """Of a transformer block; else embeddings, final norm, head."""


@dataclass(frozen=True)
class ModelCost:
    """Exact counts, and bytes and FLOPs traced from the real modules."""

    architecture: str
    """Class that was measured, `GPT2LMHeadModel` say."""
    num_params: int
    """Parameters, tied ones once."""
    num_trainable_params: int
    """Those that are not frozen, adapters among them."""
    num_blocks: int
    block_num_params: int
    """Parameters of the largest block."""
    outside_num_params: int
    """Parameters outside the blocks, tied ones once."""
    logits_width: int
    """Numbers per target: the vocabulary (per token), or the labels (per sample)."""
    logits_per_token: bool
    max_positions: int | None
    """Longest sequence that the model has positions for; None when it has no such bound."""
    saved: dict[str, SavedBytes]
    """By precision, `fp32` and `bf16`."""
    flops: Flops
    """The same in every precision."""
    loss_bytes_per_logit: int | None = None
    """What the loss holds of each logit, where the model brings a loss of its own; None: the plain loss of `launcher.task`."""

    num_active_params: int | None = None
    """Parameters that one token meets, fewer than all in a mixture of experts; None: all of them."""
    tensors: tuple[TensorGroup, ...] = ()
    """All parameters by shape, tied ones once; empty where only sizes are known, and sharding is counted unpadded."""

    @property
    def width(self) -> float:
        """Numbers per token between two blocks; 0 for a model without blocks."""
        return self.saved["bf16"].block_inputs.per_token / (2 * self.num_blocks) if self.num_blocks else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> ModelCost:
        saved = {
            precision: SavedBytes(**{part: LinearInBatch(**coefficients) for part, coefficients in parts.items()})
            for precision, parts in raw["saved"].items()
        }
        tensors = tuple(TensorGroup(**{**group, "shape": tuple(group["shape"])}) for group in raw["tensors"])
        return cls(**{**raw, "saved": saved, "flops": Flops(**raw["flops"]), "tensors": tensors})
