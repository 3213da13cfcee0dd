"""The memory account of one rank, against bytes worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cost.values import ModelCost, TensorGroup
from launcher.plan.collectives import communication_bytes
from launcher.plan.knobs import STRATEGIES
from launcher.plan.layout import GROUPED, Layout
from launcher.plan.memory import (
    FRAGMENTATION,
    REDUCE_BUCKET_ELEMENTS,
    checkpoint_disk,
    host_memory,
    nvme_memory,
    rank_memory,
)
from launcher.plan.memory.host import PROCESS_BYTES, offloaded
from launcher.plan.memory.shards import Held, by_elements, by_group, by_rows
from launcher.plan.values import Memory
from tests.unit.costs import cluster_of, small_cost

# 1,000 parameters on 2 ranks, 4 blocks of 200, 200 outside: part of a rank 500; the largest parameter is not known, so a
# block stands for it. What lies there all the time, and what is added when backward begins, when it ends, in the update.
BUCKET = {4: 200_000_000, 2: 100_000_000}
STATE = {
    ("ddp", "fp32"): ({"parameters": 4000, "optimiser": 8000, "gradients": 4000}, {}, {}, {}),
    ("ddp", "bf16"): (
        {"parameters": 4000, "optimiser": 8000, "gradients": 4000},
        {"autocast copies": 2000},
        {},
        {},
    ),
    ("ddp", "pure_bf16"): ({"parameters": 2000, "optimiser": 4000, "gradients": 2000}, {}, {}, {}),
    ("zero1", "fp32"): (
        {"parameters": 4000, "fp32 masters": 2000, "optimiser": 4000},
        {"reduction bucket": BUCKET[4], "reduction copy": 4000},
        {"reduction bucket": BUCKET[4], "reduction copy": 4000, "gradients": 4000, "own gradients": 2000},
        {"own gradients": 2000, "flat gradients": 2000},
    ),
    ("zero1", "bf16"): (
        {"parameters": 2000, "fp32 masters": 2000, "optimiser": 4000},
        {"reduction bucket": BUCKET[2], "reduction copy": 2000},
        {"reduction bucket": BUCKET[2], "reduction copy": 2000, "gradients": 2000, "own gradients": 1000},
        {"own gradients": 1000, "flat gradients": 1000, "fp32 gradients": 2000},
    ),
    ("zero2", "bf16"): (
        {"parameters": 2000, "fp32 masters": 2000, "optimiser": 4000},
        {"reduction bucket": BUCKET[2], "reduction copy": 2000},
        {"reduction bucket": BUCKET[2], "reduction copy": 2000, "gradients": 1000},
        {"gradients": 1000, "flat gradients": 1000, "fp32 gradients": 2000},
    ),
    ("zero3", "bf16"): (
        {
            "parameters": 1000,
            "fp32 masters": 2000,
            "gradients": 1000,
            "optimiser": 4000,
            "gathered parameters": 2000,  # all of them: fewer than the live limit
            "all-gather buffer": 2000,
            "reduction bucket": BUCKET[2],
            "reduction copy": 2000,
        },
        {},
        {"whole gradient": 400},
        {"flat gradients": 1000, "fp32 gradients": 2000},
    ),
    ("fsdp", "fp32"): (
        {"parameters": 2000, "gradients": 2000, "optimiser": 4000, "all-gather buffers": 1600},
        {"gathered parameters": 800, "gradient of the head": 800},
        {"gathered parameters": 1600, "whole gradients": 800, "reduce-scatter buffers": 1600},
        {},
    ),
    ("fsdp", "bf16"): (
        {"parameters": 2000, "gradients": 2000, "optimiser": 4000, "all-gather buffers": 800},
        {"gathered parameters": 400, "gradient of the head": 400},
        {"gathered parameters": 800, "whole gradients": 400, "reduce-scatter buffers": 1600},
        {},
    ),
}
STATE["zero3", "fp16"] = STATE["zero3", "bf16"]
STATE["hsdp", "bf16"] = STATE["fsdp", "bf16"]
STATE["hpz", "bf16"] = ({**STATE["zero3", "bf16"][0], "secondary copy": 1000}, *STATE["zero3", "bf16"][1:])
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
    group = num_ranks if strategy in GROUPED else 0
    return Layout(strategy, 1, num_ranks, micro_batch_size, steps, seq_len, recompute, precision, group)


def memory_of(cost: ModelCost, *layout: str | int, usable_bytes: int = 1) -> Memory:
    """`layout`: the values of `layout_of`, in its order."""
    return rank_memory(cost, cluster_of(usable_bytes), layout_of(*layout))  # type: ignore[arg-type]


def items_of(memory: Memory) -> dict[str, int]:
    return {item.name: item.num_bytes for item in memory.items}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("strategy", "precision"), list(STATE))
def test_every_item_is_what_the_formula_says(strategy: str, precision: str, recompute: str) -> None:
    """State, and the largest of three moments, with what of the activations is there; a margin of a twentieth on all."""
    items = items_of(memory_of(small_cost(), strategy, 2, 2, 10, recompute, precision))
    margin = items.pop("fragmentation")
    kept, begin, end, update = STATE[strategy, precision]
    kind = "fp32" if precision == "fp32" else "bf16"
    last = {"activations": 250 if kind == "fp32" else 125, "activations outside": 160 if kind == "fp32" else 80}
    moments = [begin | ACTIVATIONS[recompute, kind], end | last, update]
    assert items == kept | max(moments, key=lambda moment: sum(moment.values()))
    assert margin == round(FRAGMENTATION * sum(items.values()))


@pytest.mark.parametrize(
    ("strategy", "moment"),
    [("ddp", "when backward begins"), ("zero1", "when backward ends"), ("zero2", "in the optimiser's update")],
)
def test_the_moment_of_the_peak_is_told(strategy: str, moment: str) -> None:
    """Much to activate; gradients kept whole; and in bf16 gradients made fp32, where nothing else is in the way."""
    cost = small_cost(num_params=10**10, num_trainable_params=10**10, logits_width=0)
    layout = layout_of(strategy, 1 if strategy == "zero2" else 8, 1, 4096, "none", "bf16")
    if strategy == "ddp":
        layout = layout_of(strategy, 8, 2**20, 4096, "none", "bf16")
    assert rank_memory(cost, cluster_of(1), layout).moment == moment


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_frozen_has_no_gradient_and_no_optimiser(strategy: str) -> None:
    """A tenth is trained: masters, moments and gradients are of that tenth, the parameters of all."""
    full, frozen = (
        items_of(memory_of(small_cost(num_trainable_params=trained), strategy, 2, 2, 10, "none", "fp32"))
        for trained in (1000, 100)
    )
    assert frozen["parameters"] == full["parameters"]
    assert frozen["optimiser"] == full["optimiser"] // 10
    for name in ("fp32 masters", "gradients"):
        assert name not in full or frozen[name] == full[name] // 10


def test_accumulation_carries_gradients_into_the_next_backward_pass() -> None:
    """Where they are not there anyhow: one rank alone, zero1 (whole) and zero2 (its own)."""
    for strategy, ranks, more in (("ddp", 1, 4000), ("zero1", 2, 4000), ("zero2", 2, 2000), ("fsdp", 2, 0)):
        once, twice = (
            rank_memory(
                small_cost(logits_width=10**7), cluster_of(1), layout_of(strategy, ranks, 2, 10, "none", "fp32", n)
            )
            for n in (1, 2)
        )
        assert once.moment == twice.moment == "when backward begins"
        assert sum(items_of(twice).values()) - sum(items_of(once).values()) == pytest.approx(1.05 * more, abs=1)


def test_parameters_kept_gathered_are_all_there() -> None:
    kept = dataclasses.replace(layout_of("fsdp", 2, 2, 10, "none", "bf16"), reshard_after_forward=False)
    assert items_of(rank_memory(small_cost(), cluster_of(1), kept))["gathered parameters"] == 2000


OFFLOADED = {
    # strategy, optimiser, parameters: what stays on the accelerator of state, what a rank holds in RAM, what on NVMe
    ("zero2", "cpu", "none"): (
        {"parameters": 2000, "offload staging": 400},
        {"fp32 masters": 2000, "optimiser": 4000, "fp32 gradients": 2000, "updated parameters": 1000, "staging": 400},
        {},
    ),
    ("zero3", "cpu", "none"): (
        {"parameters": 1000},
        {"fp32 masters": 2000, "optimiser": 4000, "gradients": 1000, "fp32 gradients": 2000},
        {},
    ),
    ("zero3", "cpu", "cpu"): (
        {},
        {"fp32 masters": 2000, "optimiser": 4000, "gradients": 1000, "fp32 gradients": 2000, "parameters": 1000},
        {},
    ),
    ("zero3", "nvme", "nvme"): (
        {},
        {"optimiser buffers": 8000, "gradients": 1000, "parameter buffers": 10**9},
        {"optimiser": 8000, "parameters": 1000},
    ),
    ("fsdp", "cpu", "cpu"): ({}, {"parameters": 2000, "optimiser": 4000, "gradients": 2000}, {}),
}


@pytest.mark.parametrize(("strategy", "optimizer", "params"), list(OFFLOADED))
def test_what_is_offloaded_lies_on_the_host(strategy: str, optimizer: str, params: str) -> None:
    """In bf16 on 2 ranks of one node: nothing is counted twice."""
    device, host, nvme = OFFLOADED[strategy, optimizer, params]
    layout = dataclasses.replace(
        layout_of(strategy, 2, 2, 10, "none", "bf16"), offload_optimizer=optimizer, offload_params=params
    )
    cost = small_cost()
    on_device = items_of(rank_memory(cost, cluster_of(1), layout))
    states = {"parameters", "fp32 masters", "optimiser", "gradients", "offload staging"}
    assert {name: size for name, size in on_device.items() if name in states} == device
    on_host = [item for item in offloaded(cost, layout) if item.num_bytes]
    assert {item.name: item.num_bytes for item in on_host} == host
    on_nvme = items_of(nvme_memory(cost, cluster_of(1, host__nvme_gib=1, host__nvme_gb_per_s=1), layout))
    assert on_nvme == {name: 2 * size for name, size in nvme.items()}


def test_a_node_holds_what_its_ranks_offload_or_the_models_they_load() -> None:
    """The larger of the two; on a CPU cluster the ranks' own account is of the same RAM."""
    cost = small_cost(num_params=10**9, num_trainable_params=10**9)
    layout = layout_of("fsdp", 4, 1, 10, "none", "fp32")
    loading = items_of(host_memory(cost, cluster_of(1), layout))
    assert loading == {"processes": 4 * PROCESS_BYTES, "loading": 4 * 10**9}
    offloading = dataclasses.replace(layout, nodes=1, offload_params="cpu", offload_optimizer="cpu")
    held = items_of(host_memory(cost, cluster_of(1), offloading))
    state = {"parameters": 4 * 10**9, "optimiser": 8 * 10**9, "gradients": 4 * 10**9}
    assert held == {"processes": 4 * PROCESS_BYTES, **state}
    held = items_of(host_memory(cost, cluster_of(1), dataclasses.replace(offloading, ranks_per_node=1)))
    assert held == {"processes": PROCESS_BYTES, **state}
    assert items_of(host_memory(cost, cluster_of(1, kind="cpu"), layout)) == {"loading": 4 * 10**9}


def test_checkpoints_on_disk_are_model_and_optimiser_as_often_as_they_are_kept() -> None:
    """Two kept and one being written. DeepSpeed writes its masters, and below stage 3 the module beside them."""
    for strategy, expected in {
        "ddp": {"model": 4000, "optimiser": 8000},
        "fsdp": {"model": 4000, "optimiser": 8000},
        "zero2": {"model": 2000, "optimiser": 12000},
        "zero3": {"optimiser": 12000},
    }.items():
        disk = checkpoint_disk(small_cost(), layout_of(strategy, 2, 2, 10, "none", "bf16"), keep_last=2)
        assert items_of(disk) == {name: 3 * size for name, size in expected.items()}
        assert disk.fits


PADDED = (
    TensorGroup((7, 5), 2, True, True),
    TensorGroup((5,), 3, True, True),
    TensorGroup((11, 5), 1, True, False),
    TensorGroup((3,), 1, False, False),
)
"""70 + 15 + 55 trained, 3 frozen."""


@pytest.mark.parametrize(
    ("cut", "num_ranks", "expected"),
    [
        # rows: 2 x ceil(7/4) x 5, 3 x ceil(5/4), ceil(11/4) x 5; frozen ceil(3/4)
        (by_rows, 4, Held(20 + 6 + 15, 1)),
        # elements: 2 x ceil(35/4), 3 x ceil(5/4), ceil(55/4); frozen ceil(3/4)
        (by_elements, 4, Held(18 + 6 + 14, 1)),
        # matrices 125 -> 128, vectors 15 -> 16, over 4 ranks; frozen ones whole
        (by_group, 4, Held(32 + 4, 3)),
        (by_group, 1, Held(126 + 16, 3)),
        (by_rows, 16, Held(10 + 3 + 5, 1)),
    ],
)
def test_each_engine_pads_otherwise(cut: Any, num_ranks: int, expected: Held) -> None:
    cost = small_cost(num_params=143, num_trainable_params=140, tensors=PADDED)
    assert cut(cost, num_ranks) == expected


def test_small_parameters_stay_gathered_in_zero3() -> None:
    tensors = (TensorGroup((1000, 1000), 4, True, True), TensorGroup((1000,), 8, True, True))
    cost = small_cost(num_params=4_008_000, num_trainable_params=4_008_000, tensors=tensors)
    items = items_of(memory_of(cost, "zero3", 2, 2, 10, "none", "bf16"))
    assert items["persistent parameters"] == 2 * 8000
    assert items["gathered parameters"] == 2 * 4_000_000


def test_the_bounds_say_what_is_counted_and_what_is_not() -> None:
    """State is exact; activations within a twentieth; the margin may be needed not at all, or twice."""
    memory = memory_of(small_cost(), "ddp", 2, 2, 10, "none", "fp32")
    parts = {item.name: (item.low_bytes, item.high_bytes) for item in memory.items}
    assert parts["parameters"] == (4000, 4000)
    assert parts["activations"] == (950, 1050)
    assert parts["fragmentation"] == (0, 2 * items_of(memory)["fragmentation"])
    assert memory.low_bytes < memory.total_bytes < memory.high_bytes
    assert all(item.source for item in memory.items)


def test_a_sequence_classifier_has_one_target_per_sample() -> None:
    cost = small_cost(logits_per_token=False, logits_width=3)
    memory = memory_of(cost, "ddp", 2, 4, 10, "none", "fp32")
    assert items_of(memory)["logits and loss"] == 4 * 3 * 12


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "hpz"])
def test_the_reduction_bucket_is_what_the_configuration_says(strategy: str) -> None:
    """However small the model is."""
    memory = memory_of(small_cost(), strategy, 8, 1, 10, "none", "bf16")
    assert items_of(memory)["reduction bucket"] == 2 * REDUCE_BUCKET_ELEMENTS


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
    """From two on, where there is somebody to send to; and where the state is replicated, they need exactly the same."""
    cost = small_cost(num_params=num_params, num_trainable_params=num_params)
    few, many = (
        memory_of(cost, strategy, ranks, 1, 10, "none", precision).total_bytes
        for ranks in (1 + num_ranks, 1 + num_ranks + more_ranks)
    )
    assert many == few if strategy == "ddp" else many <= few


@given(**SIZES)
@settings(max_examples=200, deadline=None)
def test_the_parts_of_all_ranks_make_the_whole(num_ranks: int, num_params: int, strategy: str, precision: str) -> None:
    """Moments are 8 bytes a trained parameter, over all ranks together, and at most one element a rank more."""
    trained = num_params // 3
    cost = small_cost(num_params=num_params, num_trainable_params=trained)
    moments = items_of(memory_of(cost, strategy, num_ranks, 1, 10, "none", precision))["optimiser"]
    if strategy == "ddp":
        assert moments == 8 * trained
    else:
        assert 0 <= moments * num_ranks - 8 * trained < 8 * num_ranks


@given(st.integers(1, 64), st.integers(1, 4096), st.sampled_from(["fp32", "bf16"]))
@settings(max_examples=100, deadline=None)
def test_recompute_never_needs_more(micro_batch_size: int, seq_len: int, precision: str) -> None:
    """Here the inputs of the blocks and one block are less than all blocks: 16 + 40 / 4 < 40 bytes a token."""
    none, full = (
        memory_of(small_cost(), "ddp", 2, micro_batch_size, seq_len, recompute, precision)
        for recompute in ("none", "full")
    )
    assert full.total_bytes < none.total_bytes or none.moment == "when backward ends"


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
