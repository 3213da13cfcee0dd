"""The memory account of one rank, against bytes worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cost.values import ModelCost
from launcher.plan.collectives import communication_bytes
from launcher.plan.layout import Layout
from launcher.plan.memory import FRAGMENTATION, REDUCE_BUCKET_ELEMENTS, rank_memory
from launcher.plan.search import STRATEGIES
from launcher.plan.values import Memory
from tests.unit.costs import cluster_of, small_cost

# 1,000 parameters on 2 ranks, 4 blocks of 200, 200 outside: part of a rank 500, gathered 200 + 2 x 200 = 600.
STATE = {
    ("ddp", "fp32"): {"parameters": 4000, "gradients": 4000, "optimiser": 8000},
    ("ddp", "bf16"): {"parameters": 4000, "gradients": 4000, "optimiser": 8000, "autocast copies": 2000},
    ("zero1", "fp32"): {
        "parameters": 4000,
        "fp32 masters": 2000,
        "gradients": 4000,
        "optimiser": 4000,
        "reduction bucket": 4000,
    },
    ("zero1", "bf16"): {
        "parameters": 2000,
        "fp32 masters": 2000,
        "gradients": 2000,
        "optimiser": 4000,
        "reduction bucket": 2000,
        "fp32 gradients": 2000,
    },
    ("zero2", "fp32"): {
        "parameters": 4000,
        "fp32 masters": 2000,
        "gradients": 2000,
        "optimiser": 4000,
        "reduction bucket": 4000,
    },
    ("zero2", "bf16"): {
        "parameters": 2000,
        "fp32 masters": 2000,
        "gradients": 1000,
        "optimiser": 4000,
        "reduction bucket": 2000,
        "fp32 gradients": 2000,
    },
    ("zero3", "fp32"): {
        "parameters": 2000,
        "fp32 masters": 2000,
        "gradients": 2000,
        "optimiser": 4000,
        "gathered parameters": 2400,
        "reduction bucket": 4000,
    },
    ("zero3", "bf16"): {
        "parameters": 1000,
        "fp32 masters": 2000,
        "gradients": 1000,
        "optimiser": 4000,
        "gathered parameters": 1200,
        "reduction bucket": 2000,
        "fp32 gradients": 2000,
    },
    ("fsdp", "fp32"): {
        "parameters": 2000,
        "gradients": 2000,
        "optimiser": 4000,
        "gathered parameters": 2400,
        "gathered gradients": 1600,
    },
    ("fsdp", "bf16"): {
        "parameters": 2000,
        "gradients": 2000,
        "optimiser": 4000,
        "gathered parameters": 1200,
        "gathered gradients": 1600,
    },
}
# B = 2, T = 10: blocks 2 x 10 x (40 + 1 x 10), outside 2 x 10 x 8, logits 2 x 10 x 50 at 12 bytes; half, and 16, in bf16.
ACTIVATIONS = {
    ("none", "fp32"): {"activations": 1000, "activations outside": 160, "logits and loss": 12000},
    ("none", "bf16"): {"activations": 500, "activations outside": 80, "logits and loss": 16000},
    # inputs of the blocks 2 x 10 x 16, and one of four blocks
    ("full", "fp32"): {"activations": 320 + 250, "activations outside": 160, "logits and loss": 12000},
    ("full", "bf16"): {"activations": 160 + 125, "activations outside": 80, "logits and loss": 16000},
}


def layout_of(
    strategy: str, num_ranks: int, micro_batch_size: int, seq_len: int, recompute: str, precision: str, steps: int = 1
) -> Layout:
    return Layout(strategy, 1, num_ranks, micro_batch_size, steps, seq_len, recompute, precision)


def memory_of(cost: ModelCost, *layout: str | int, usable_bytes: int = 1) -> Memory:
    """`layout`: the values of `layout_of`, in its order."""
    return rank_memory(cost, cluster_of(usable_bytes), layout_of(*layout))  # type: ignore[arg-type]


def items_of(strategy: str, precision: str, recompute: str, num_ranks: int = 2) -> dict[str, int]:
    memory = memory_of(small_cost(), strategy, num_ranks, 2, 10, recompute, precision)
    return {item.name: item.num_bytes for item in memory.items}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("strategy", "precision"), list(STATE))
def test_every_item_is_what_the_formula_says(strategy: str, precision: str, recompute: str) -> None:
    """Model state, activations, and a margin of a twentieth on both."""
    items = items_of(strategy, precision, recompute)
    margin = items.pop("fragmentation")
    assert items == STATE[strategy, precision] | ACTIVATIONS[recompute, precision]
    assert margin == round(FRAGMENTATION * sum(items.values()))


def test_a_sequence_classifier_has_one_target_per_sample() -> None:
    cost = small_cost(logits_per_token=False, logits_width=3)
    memory = memory_of(cost, "ddp", 1, 4, 10, "none", "fp32")
    assert next(item.num_bytes for item in memory.items if item.name == "logits and loss") == 4 * 3 * 12


def test_the_reduction_bucket_of_a_large_model_is_bounded() -> None:
    """The size that the emitted configuration states: 50 million elements."""
    memory = memory_of(small_cost(num_params=10**9), "zero2", 8, 1, 10, "none", "bf16")
    assert (
        next(item.num_bytes for item in memory.items if item.name == "reduction bucket") == 2 * REDUCE_BUCKET_ELEMENTS
    )


def test_it_fits_to_the_last_byte() -> None:
    total = memory_of(small_cost(), "ddp", 2, 2, 10, "none", "fp32").total_bytes
    fits = [
        memory_of(small_cost(), "ddp", 2, 2, 10, "none", "fp32", usable_bytes=total + more).fits for more in (-1, 0, 1)
    ]
    assert fits == [False, True, True]


SIZES = {
    "num_ranks": st.integers(1, 5000),
    "num_params": st.integers(1000, 10**12),
    "strategy": st.sampled_from(STRATEGIES),
    "precision": st.sampled_from(["fp32", "bf16"]),
}


@given(more_ranks=st.integers(1, 5000), **SIZES)
@settings(max_examples=200, deadline=None)
def test_more_ranks_never_need_more(
    num_ranks: int, more_ranks: int, num_params: int, strategy: str, precision: str
) -> None:
    """And where the state is replicated, they need exactly the same."""
    cost = small_cost(num_params=num_params)
    few, many = (
        memory_of(cost, strategy, ranks, 1, 10, "none", precision).total_bytes
        for ranks in (num_ranks, num_ranks + more_ranks)
    )
    assert many == few if strategy == "ddp" else many <= few


@given(**SIZES)
@settings(max_examples=200, deadline=None)
def test_the_parts_of_all_ranks_make_the_whole(num_ranks: int, num_params: int, strategy: str, precision: str) -> None:
    """Moments are 8 bytes a parameter, over all ranks together, and at most one element a rank more."""
    memory = memory_of(small_cost(num_params=num_params), strategy, num_ranks, 1, 10, "none", precision)
    moments = next(item.num_bytes for item in memory.items if item.name == "optimiser")
    if strategy == "ddp":
        assert moments == 8 * num_params
    else:
        assert 0 <= moments * num_ranks - 8 * num_params < 8 * num_ranks


@given(st.integers(1, 64), st.integers(1, 4096), st.sampled_from(["fp32", "bf16"]))
@settings(max_examples=100, deadline=None)
def test_recompute_never_needs_more(micro_batch_size: int, seq_len: int, precision: str) -> None:
    """Here the inputs of the blocks and one block are less than all blocks: 16 + 40 / 4 < 40 bytes a token."""
    none, full = (
        memory_of(small_cost(), "ddp", 1, micro_batch_size, seq_len, recompute, precision).total_bytes
        for recompute in ("none", "full")
    )
    assert full < none


@pytest.mark.parametrize(
    ("strategy", "fp32", "bf16"),
    [
        ("ddp", 8, 8),  # one all-reduce of fp32 gradients: autocast keeps them so
        ("zero1", 8, 4),
        ("zero2", 16, 8),  # reduced in each of 3 micro-batches, gathered once
        ("zero3", 36, 18),
        ("fsdp", 36, 24),  # gathers in bf16, reduces in fp32
    ],
)
def test_bytes_sent_per_parameter(strategy: str, fp32: int, bf16: int) -> None:
    """Three accumulation steps; a ring on 4 ranks sends three quarters of each vector."""
    for precision, per_parameter in (("fp32", fp32), ("bf16", bf16)):
        assert (
            communication_bytes(small_cost(), layout_of(strategy, 4, 1, 10, "none", precision, steps=3))
            == 750 * per_parameter
        )
        assert communication_bytes(small_cost(), layout_of(strategy, 1, 1, 10, "none", precision, steps=3)) == 0
