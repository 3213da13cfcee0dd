"""The values that the planner computes with. No torch here: a login node reads them from JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LinearInBatch:
    """Bytes as a function of micro-batch B and sequence length T: `B (e + a T + b T^2) + f + c T + d T^2` for B >= 2."""

    per_token: float
    """a"""
    per_token_squared: float
    """b"""
    fixed_per_token: float = 0.0
    """c: what does not grow with the batch, such as tables of positions."""
    fixed_per_token_squared: float = 0.0
    """d: masks, say."""
    per_sample: float = 0.0
    """e: what a head of one answer per sample keeps."""
    fixed: float = 0.0
    """f"""
    one: tuple[float, float, float] | None = None
    """A batch of one keeps views where others keep copies: its own (constant, per T, per T^2); None: no different."""
    window: int | None = None
    """Longest sequence that a sliding window does not cut, where this matters; `beyond` holds above it."""
    beyond: LinearInBatch | None = None
    """Above the window, where layers need a mask that they do without below."""

    def at(self, micro_batch_size: int, seq_len: int) -> int:
        if self.beyond is not None and self.window is not None and seq_len > self.window:
            return self.beyond.at(micro_batch_size, seq_len)
        if micro_batch_size == 1 and self.one is not None:
            constant, linear, squared = self.one
            return max(0, round(constant + seq_len * (linear + squared * seq_len)))
        per_sample = self.per_sample + seq_len * (self.per_token + self.per_token_squared * seq_len)
        fixed = self.fixed + seq_len * (self.fixed_per_token + self.fixed_per_token_squared * seq_len)
        return max(0, round(micro_batch_size * per_sample + fixed))


@dataclass(frozen=True)
class SavedBytes:
    """What autograd keeps from forward for backward, parameters not counted, logits and loss not counted."""

    blocks: LinearInBatch
    """All transformer blocks together."""
    outside: LinearInBatch
    """Embeddings, final norm, head."""
    block_inputs: LinearInBatch
    """Hidden states that enter the blocks."""
    recomputed: LinearInBatch | None = None
    """What full recompute keeps of the blocks instead: their inputs, and once what they share; None: as `block_inputs`."""


@dataclass(frozen=True)
class PeakBytes:
    """Most bytes alive at once in forward, loss and backward of one micro-batch.

    Counted is all that these allocate: what is kept for backward, temporaries, logits, loss, gradients of activations,
    second gradients of a weight that is used twice. Not counted are parameters, buffers, their copies in the precision of
    autocast, the batch itself, and each parameter's gradient, whoever keeps it; nor what a kernel allocates inside.
    Traced at every operator; a peak is the largest of a few moments, each a function of B and T.
    """

    loss: tuple[LinearInBatch, ...]
    """From the end of the last block to the gradient of its output: head, logits and loss, on top of what is kept."""
    blocks: tuple[LinearInBatch, ...]
    """While blocks run: what is kept, and what one block works with in forward, recompute or backward."""
    embeddings: tuple[LinearInBatch, ...]
    """After the backward pass of the first block: what the blocks kept is free again."""

    def at(self, micro_batch_size: int, seq_len: int) -> dict[str, int]:
        """Bytes by moment: `loss`, `blocks`, `embeddings`; the largest is the peak."""
        moments = {"loss": self.loss, "blocks": self.blocks, "embeddings": self.embeddings}
        return {
            name: max((one.at(micro_batch_size, seq_len) for one in largest), default=0)
            for name, largest in moments.items()
        }


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
    attention_backward: float | None = None
    """Attention's backward, as `attention`; None: 2.5 times as much, the scores formed again. Less where blocks are frozen."""


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
    """By trace: `fp32` and `bf16` (parameters in it), `autocast` (fp32 parameters, bf16 products) with fused attention, as
    on GPUs; `fp32/cpu` where the CPU has no fused kernel for this model, which has dropout in attention."""
    flops: Flops
    """The same in every precision."""
    peak: dict[str, dict[str, PeakBytes]] = field(default_factory=dict)
    """By trace as in `saved`, then by recompute policy, `none` and `full`; empty where only sizes are known. The
    second only where the architecture can recompute its blocks."""
    loss_bytes_per_logit: int | None = None
    """What the loss holds of each logit, where the model brings a loss of its own; None: the plain loss of `launcher.task`."""

    num_active_params: int | None = None
    """Parameters that one token meets, fewer than all in a mixture of experts; None: all of them."""
    num_block_passes: int | None = None
    """Times that a block runs in one forward pass, more than there are blocks where they share weights (ALBERT); None: once each."""
    derived: tuple[str, ...] = ()
    """Kernels whose bytes and FLOPs follow from shapes, because they do not run here: `grouped_mm` say."""
    tensors: tuple[TensorGroup, ...] = ()
    """All parameters by shape, tied ones once; empty where only sizes are known, and sharding is counted unpadded."""

    @property
    def width(self) -> float:
        """Numbers per token between two blocks; 0 for a model without blocks."""
        passes = self.num_block_passes or self.num_blocks
        return self.saved["bf16"].block_inputs.per_token / (2 * passes) if passes else 0.0

    def trace_of(self, precision: str, autocast: bool = False, kernel: str = "fused") -> str:
        """Key of `saved` and `peak`; `kernel` is `fused`, `cpu` or `eager`. The 16-bit formats keep alike."""
        name = "fp32" if precision == "fp32" else ("autocast" if autocast and "autocast" in self.saved else "bf16")
        return f"{name}/{kernel}" if f"{name}/{kernel}" in self.saved else name

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> ModelCost:
        saved = {trace: _saved(parts) for trace, parts in raw["saved"].items()}
        peak = {
            trace: {recompute: _peak(moments) for recompute, moments in policies.items()}
            for trace, policies in raw["peak"].items()
        }
        tensors = tuple(TensorGroup(**{**group, "shape": tuple(group["shape"])}) for group in raw["tensors"])
        return cls(
            **{
                **raw,
                "saved": saved,
                "peak": peak,
                "flops": Flops(**raw["flops"]),
                "tensors": tensors,
                "derived": tuple(raw["derived"]),
            }
        )


def _saved(raw: dict[str, Any]) -> SavedBytes:
    parts: dict[str, Any] = {part: _function(one) if one else None for part, one in raw.items()}
    return SavedBytes(**parts)


def _peak(raw: dict[str, Any]) -> PeakBytes:
    return PeakBytes(**{name: tuple(_function(one) for one in moments) for name, moments in raw.items()})


def _function(raw: dict[str, Any]) -> LinearInBatch:
    one, beyond = raw["one"], raw["beyond"]
    return LinearInBatch(**{**raw, "one": tuple(one) if one else None, "beyond": _function(beyond) if beyond else None})
