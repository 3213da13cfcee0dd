"""Seconds of one optimiser step, item by item, from a model's FLOPs and bytes and a cluster's achievable rates.

P parameters, P' trained ones, N ranks, p bytes of an element, B micro-batch, T length, A accumulation steps, L blocks, h
width. What a GPU does is added up: products, attention and elementwise kernels run one after another. Collectives hide
behind that work as far as the engine overlaps them and `overlap_share` allows; a ring sends (N-1)/N of a vector through
the slowest link of the ring: one between nodes, of which a node has one per rank, or one inside the node.

Reading the data is no item: a gather from mapped files gives 185 million tokens a second and more on two cores, beside
the step, in a thread of its own (`launcher/data/stream.py`); no rank here takes a hundredth of that.

MFU is llm-foundry's: (6 P + 12 L h T) FLOPs per token, attention in full although half of it is masked, recompute not
counted, against the data sheet's peak (scripts/train/benchmarking/README.md). PaLM's, app. B, leaves the embeddings out.
Of a mixture of experts P is what one token meets; where weights are frozen, 6 becomes 2 (1 + their products backward
for each forward), 4 with adapters alone.
"""

from __future__ import annotations

from launcher.cost.values import ModelCost
from launcher.job.cluster import Cluster, Gpu
from launcher.plan.collectives import HIDES, Ring, rings
from launcher.plan.layout import Layout
from launcher.plan.memory import loss_bytes, saved_of
from launcher.plan.update_time import update_items
from launcher.plan.values import StepTime, TimeItem
from launcher.units import show_bytes

BACKWARD = 2
"""Products of a backward pass for each one forward: one for the input's gradient, one for the weight's."""
ATTENTION_BACKWARD = 2.5
"""Five products to forward's two: flash attention forms the scores again (Dao 2023, FlashAttention-2, sec. 4.1)."""
TOUCHES = 5
"""Times that a kept byte crosses memory: written and read in forward, read in backward, its gradient written and read."""
TOUCHES_AGAIN = 2
"""Recompute writes and reads it once more."""
WEIGHT_TOUCHES = 2
"""Each micro-batch reads the weights in forward and for the input's gradient, and reads and writes the trained ones' gradient."""
LOSS_TOUCHES = 2
"""What the loss holds is written and read."""
KERNELS_PER_BLOCK = 90
"""Launches of one block, forward and backward: 66, 79 and 93 operators counted for BERT, GPT-2 and Llama (views left out)."""


def step_time(cost: ModelCost, cluster: Cluster, layout: Layout) -> StepTime:
    """Account of one optimiser step."""
    gpu = cluster.gpu
    work = _products(cost, gpu, layout) + _attention(cost, gpu, layout) + _traffic(cost, gpu, layout)
    busy_seconds = sum(item.seconds for item in work)
    items = [
        *work,
        _launches(cost, gpu, layout, busy_seconds),
        *_collectives(rings(cost, cluster.link, layout), cluster, layout, busy_seconds),
        *update_items(cost, cluster, layout, busy_seconds),
    ]
    tokens = layout.accumulation_steps * layout.rank_tokens * layout.num_ranks
    peak = peak_flops(gpu, layout.precision) * layout.num_ranks
    at_peak = tokens * _model_flops(cost, layout.seq_len) / peak
    return StepTime(tuple(item for item in items if item.seconds > 0), tokens, layout.num_ranks, at_peak)


def peak_flops(gpu: Gpu, precision: str) -> float:
    """FLOP/s of the data sheet. A 16-bit format without units of its own runs at the fp32 rate, where another has them."""
    has = {"fp32": False, "fp16": gpu.fp16}.get(precision, gpu.bf16)
    emulated = precision != "fp32" and not (gpu.bf16 or gpu.fp16)
    return 1e12 * (gpu.peak_bf16_tflops if has or emulated else gpu.peak_fp32_tflops)


def _model_flops(cost: ModelCost, seq_len: int) -> float:
    """Per token, as MFU counts them."""
    forward = 2 * (cost.num_params if cost.num_active_params is None else cost.num_active_params)
    executed = cost.flops.blocks + cost.flops.outside
    backward = sum(_backward(cost)) / executed if executed else BACKWARD
    return forward * (1 + backward) + 3 * cost.flops.attention * seq_len


def _backward(cost: ModelCost) -> tuple[float, float]:
    """FLOPs per token of the products' backward pass, in the blocks and outside: fewer where weights are frozen."""
    flops = cost.flops
    blocks = BACKWARD * flops.blocks if flops.blocks_backward is None else flops.blocks_backward
    outside = BACKWARD * flops.outside if flops.outside_backward is None else flops.outside_backward
    return blocks, outside


def _matmul_rate(cost: ModelCost, gpu: Gpu, precision: str) -> float:
    """FLOP/s that products of this model's width reach."""
    narrow = cost.width / (cost.width + gpu.matmul_half_width) if cost.width else 1.0
    return peak_flops(gpu, precision) * gpu.matmul_share * narrow


def _products(cost: ModelCost, gpu: Gpu, layout: Layout) -> list[TimeItem]:
    tokens = layout.accumulation_steps * layout.rank_tokens
    rate = _matmul_rate(cost, gpu, layout.precision)
    block_rate = rate * (gpu.fp8_speedup or 1.0) if layout.fp8 else rate
    blocks, outside = tokens * cost.flops.blocks, tokens * cost.flops.outside
    blocks_back, outside_back = (tokens * flops for flops in _backward(cost))
    forward, backward = blocks + outside, blocks_back + outside_back
    passes = 1 + (backward / forward if forward else BACKWARD)
    formula = f"{passes:.3g} x {_flops(forward)} at {rate / 1e12:.3g} TFLOP/s"
    seconds = (blocks + blocks_back) / block_rate + (outside + outside_back) / rate
    items = [TimeItem("products", seconds, formula, "arithmetic")]
    if layout.recompute == "full":
        formula = f"{_flops(blocks)} at {block_rate / 1e12:.3g} TFLOP/s: the blocks' forward again"
        items.append(TimeItem("products again", blocks / block_rate, formula, "arithmetic"))
    return items


def _attention(cost: ModelCost, gpu: Gpu, layout: Layout) -> list[TimeItem]:
    """A causal kernel leaves out the masked half; a task with a target per token is causal here."""
    unmasked = 0.5 if cost.logits_per_token else 1.0
    tokens = layout.accumulation_steps * layout.rank_tokens
    forward = tokens * layout.seq_len * cost.flops.attention * unmasked
    passes = 1 + ATTENTION_BACKWARD + (layout.recompute == "full")
    rate = peak_flops(gpu, layout.precision) * gpu.attention_share
    formula = f"{passes:g} x {_flops(forward)} at {rate / 1e12:.3g} TFLOP/s"
    return [TimeItem("attention", passes * forward / rate, formula, "arithmetic")]


def _traffic(cost: ModelCost, gpu: Gpu, layout: Layout) -> list[TimeItem]:
    rate = gpu.memory_gb_per_s * 1e9 * gpu.memory_share
    saved = saved_of(cost, layout, gpu.kind == "cpu")
    again = TOUCHES_AGAIN if layout.recompute == "full" else 0
    kept = saved.blocks.at(layout.micro_batch_size, layout.seq_len)
    outside = saved.outside.at(layout.micro_batch_size, layout.seq_len)
    moved = {
        "activations": (TOUCHES + again) * kept + TOUCHES * outside,
        "weights": WEIGHT_TOUCHES * layout.element_bytes * (cost.num_params + cost.num_trainable_params),
        "loss": LOSS_TOUCHES * loss_bytes(cost, layout.micro_batch_size, layout.seq_len, layout.precision),
    }
    words = {
        "activations": f"{TOUCHES + again} x the bytes kept for backward",
        "weights": f"{WEIGHT_TOUCHES} p (P + P') for each micro-batch",
        "loss": f"{LOSS_TOUCHES} x the bytes of logits and loss",
    }
    steps = layout.accumulation_steps
    return [
        TimeItem(name, steps * size / rate, f"{words[name]} at {rate / 1e9:.4g} GB/s", "memory bandwidth")
        for name, size in moved.items()
    ]


def _launches(cost: ModelCost, gpu: Gpu, layout: Layout, busy_seconds: float) -> TimeItem:
    """A GPU works while the host goes ahead, so only what the host takes longer counts; a CPU does both itself."""
    kernels = round(KERNELS_PER_BLOCK * (1 + (layout.recompute == "full") / (1 + BACKWARD)))
    host = layout.accumulation_steps * cost.num_blocks * kernels * gpu.launch_us * 1e-6
    waited = host if gpu.kind == "cpu" else max(0.0, host - busy_seconds)
    formula = f"A x L x {kernels} kernels x {gpu.launch_us:g} us" + ("" if gpu.kind == "cpu" else ", beyond the above")
    return TimeItem("launches", waited, formula, "kernel launches")


def _collectives(used: list[Ring], cluster: Cluster, layout: Layout, busy_seconds: float) -> list[TimeItem]:
    """What of the collectives the step has to wait for: all of them hide alike."""
    overlap, latency_us = cluster.gpu.overlap_share, cluster.link.latency_us
    seconds = sum(ring.seconds(latency_us) for ring in used)
    if not seconds:
        return []
    waited = max(seconds - _room(layout, busy_seconds), (1 - overlap) * seconds) if HIDES[layout.strategy] else seconds
    share = waited / seconds
    return [
        TimeItem(
            ring.name,
            share * ring.seconds(latency_us),
            f"{show_bytes(ring.num_bytes)} at {ring.gb_per_s:.4g} GB/s + {ring.calls} x {latency_us + ring.hops_us:.6g} us, {1 - share:.0%} hidden",
            "network",
        )
        for ring in used
    ]


def _room(layout: Layout, busy_seconds: float) -> float:
    """Seconds of arithmetic beside which the collectives can run: ddp's wait for the last backward."""
    if layout.strategy == "ddp":
        return busy_seconds / layout.accumulation_steps * BACKWARD / (1 + BACKWARD)
    return busy_seconds


def _flops(count: float) -> str:
    """`4.9e14 -> '492 TFLOP'`."""
    scale, unit = next((scale, unit) for scale, unit in ((1e15, "P"), (1e12, "T"), (0, "G")) if count >= scale)
    return f"{count / (scale or 1e9):.3g} {unit}FLOP"
