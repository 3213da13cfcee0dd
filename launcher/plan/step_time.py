"""Seconds of one optimiser step, item by item, from a model's FLOPs and bytes and a cluster's achievable rates.

P parameters, N ranks, p bytes of an element, B micro-batch, T length, A accumulation steps, L blocks, h width.
What a GPU does is added up: products, attention and elementwise kernels run one after another. Collectives hide behind
that work as far as the engine overlaps them and `overlap_share` allows; a ring sends (N-1)/N of a vector through the
slowest link of the ring: one between nodes, of which a node has one per rank, or one inside the node.

MFU is llm-foundry's: (6 P + 12 L h T) FLOPs per token, attention in full although half of it is masked, recompute not
counted, against the data sheet's peak (scripts/train/benchmarking/README.md). PaLM's, app. B, leaves the embeddings out.
"""

from __future__ import annotations

from launcher.cost.values import ModelCost
from launcher.job.cluster import Cluster, Gpu, Link
from launcher.plan.layout import FP32, Layout
from launcher.plan.memory import communication_bytes, loss_bytes, saved_of
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
WEIGHT_TOUCHES = 4
"""Each micro-batch reads the weights in forward and for the input's gradient, and reads and writes the gradient."""
LOSS_TOUCHES = 2
"""What the loss holds is written and read."""
ADAMW_BYTES = 8 * FP32
"""Per parameter: gradient read for its norm and for the update; weight and two moments read and written."""
KERNELS_PER_BLOCK = 90
"""Launches of one block, forward and backward: 66, 79 and 93 operators counted for BERT, GPT-2 and Llama (views left out)."""
DDP_BUCKET_BYTES = 25 * 2**20
"""torch's `bucket_cap_mb`: how much of the gradients one all-reduce takes."""
OVERLAPS = {"ddp": True, "zero1": False, "zero2": False, "zero3": True, "fsdp": True}
"""Whether collectives run beside arithmetic; DeepSpeed's `overlap_comm` is off by default below stage 3."""


def step_time(cost: ModelCost, cluster: Cluster, layout: Layout) -> StepTime:
    """Account of one optimiser step."""
    gpu = cluster.gpu
    work = _products(cost, gpu, layout) + _attention(cost, gpu, layout) + _traffic(cost, gpu, layout)
    busy_seconds = sum(item.seconds for item in work)
    items = [
        *work,
        _launches(cost, gpu, layout, busy_seconds),
        _optimiser(cost, gpu, layout),
        _collectives(cost, cluster.link, gpu.overlap_share, layout, busy_seconds),
    ]
    tokens = layout.accumulation_steps * layout.rank_tokens * layout.num_ranks
    model_flops = tokens * 3 * (2 * cost.num_params + cost.flops.attention * layout.seq_len)
    peak = _peak(gpu, layout.precision) * layout.num_ranks
    return StepTime(tuple(item for item in items if item.seconds > 0), tokens, layout.num_ranks, model_flops / peak)


def _peak(gpu: Gpu, precision: str) -> float:
    """FLOP/s of the data sheet."""
    return 1e12 * (gpu.peak_bf16_tflops if precision != "fp32" else gpu.peak_fp32_tflops)


def _matmul_rate(cost: ModelCost, gpu: Gpu, precision: str) -> float:
    """FLOP/s that products of this model's width reach."""
    narrow = cost.width / (cost.width + gpu.matmul_half_width) if cost.width else 1.0
    return _peak(gpu, precision) * gpu.matmul_share * narrow


def _products(cost: ModelCost, gpu: Gpu, layout: Layout) -> list[TimeItem]:
    tokens = layout.accumulation_steps * layout.rank_tokens
    rate = _matmul_rate(cost, gpu, layout.precision)
    block_rate = rate * (gpu.fp8_speedup or 1.0) if layout.fp8 else rate
    passes = 1 + BACKWARD
    blocks, outside = tokens * cost.flops.blocks, tokens * cost.flops.outside
    formula = f"{passes} x {_flops(blocks + outside)} at {rate / 1e12:.3g} TFLOP/s"
    items = [TimeItem("products", passes * (blocks / block_rate + outside / rate), formula, "arithmetic")]
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
    rate = _peak(gpu, layout.precision) * gpu.attention_share
    formula = f"{passes:g} x {_flops(forward)} at {rate / 1e12:.3g} TFLOP/s"
    return [TimeItem("attention", passes * forward / rate, formula, "arithmetic")]


def _traffic(cost: ModelCost, gpu: Gpu, layout: Layout) -> list[TimeItem]:
    rate = gpu.memory_gb_per_s * 1e9 * gpu.memory_share
    saved = saved_of(cost, layout.precision)
    again = TOUCHES_AGAIN if layout.recompute == "full" else 0
    kept = saved.blocks.at(layout.micro_batch_size, layout.seq_len)
    outside = saved.outside.at(layout.micro_batch_size, layout.seq_len)
    moved = {
        "activations": (TOUCHES + again) * kept + TOUCHES * outside,
        "weights": WEIGHT_TOUCHES * layout.element_bytes * cost.num_params,
        "loss": LOSS_TOUCHES * loss_bytes(cost, layout.micro_batch_size, layout.seq_len, layout.precision),
    }
    words = {
        "activations": f"{TOUCHES + again} x the bytes kept for backward",
        "weights": f"{WEIGHT_TOUCHES} p P for each micro-batch",
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


def _optimiser(cost: ModelCost, gpu: Gpu, layout: Layout) -> TimeItem:
    own = cost.num_params if layout.strategy == "ddp" else cost.num_params / layout.num_ranks
    rate = gpu.memory_gb_per_s * 1e9 * gpu.memory_share
    share = "P" if layout.strategy == "ddp" else "P / N"
    return TimeItem(
        "optimiser",
        ADAMW_BYTES * own / rate,
        f"{ADAMW_BYTES} {share} bytes at {rate / 1e9:.4g} GB/s",
        "memory bandwidth",
    )


def _collectives(cost: ModelCost, link: Link, overlap: float, layout: Layout, busy_seconds: float) -> TimeItem:
    """What of the collectives the step has to wait for."""
    sent = communication_bytes(cost, layout)
    rate = bus_gb_per_s(link, layout)
    calls = _num_collectives(cost, layout) if layout.num_ranks > 1 else 0
    seconds = sent / (rate * 1e9) + calls * link.latency_us * 1e-6
    room = _room(layout, busy_seconds)
    waited = max(seconds - room, (1 - overlap) * seconds) if OVERLAPS[layout.strategy] else seconds
    hidden = f", {1 - waited / seconds:.0%} hidden" if seconds else ""
    formula = f"{show_bytes(sent)} at {rate:.4g} GB/s + {calls} x {link.latency_us:g} us{hidden}"
    return TimeItem("collectives", waited, formula, "network")


def bus_gb_per_s(link: Link, layout: Layout) -> float:
    """Rate of a ring at one rank: 8 ranks of a node use its 8 network ports side by side."""
    slowest = link.intra_node_gb_per_s
    if layout.nodes > 1:
        slowest = min(slowest, link.inter_node_gb_per_s * layout.ranks_per_node)
    return slowest * link.link_share


def _num_collectives(cost: ModelCost, layout: Layout) -> int:
    """Calls per step: one group per block and one for the rest, as the engines wrap them; ddp one per bucket."""
    groups, steps = cost.num_blocks + 1, layout.accumulation_steps
    buckets = -(-FP32 * cost.num_params // DDP_BUCKET_BYTES)
    return {
        "ddp": buckets,
        "zero1": 2 * groups,
        "zero2": (steps + 1) * groups,
        "zero3": 3 * groups * steps,
        "fsdp": 3 * groups * steps,
    }[layout.strategy]


def _room(layout: Layout, busy_seconds: float) -> float:
    """Seconds of arithmetic beside which the collectives can run: ddp's wait for the last backward."""
    if layout.strategy == "ddp":
        return busy_seconds / layout.accumulation_steps * BACKWARD / (1 + BACKWARD)
    return busy_seconds


def _flops(count: float) -> str:
    """`4.9e14 -> '492 TFLOP'`."""
    scale, unit = next((scale, unit) for scale, unit in ((1e15, "P"), (1e12, "T"), (0, "G")) if count >= scale)
    return f"{count / (scale or 1e9):.3g} {unit}FLOP"
