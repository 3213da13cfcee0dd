"""The account of a step's time, against seconds worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cost.values import Flops
from launcher.job import Cluster, load_cluster
from launcher.plan.collectives import NETWORK_HOP_US, NODE_HOP_US, ring_gb_per_s, ring_hops_us
from launcher.plan.knobs import STRATEGIES
from launcher.plan.layout import GROUPED, Layout
from launcher.plan.step_time import step_time
from launcher.plan.values import StepTime
from tests.unit.costs import cluster_of, llama_405b, small_cost

# Test rates: products 0.5 of 1 TFLOP/s in fp32 and of 2 in bf16, attention 0.25, memory 500 GB/s, links 0.5 GB/s.
FAST_HOST = {"gpu__launch_us": 0}


def layout(**changes: Any) -> Layout:
    """One node of two ranks, B = 2, T = 10, A = 3, unless changed."""
    values: dict[str, Any] = {
        "strategy": "ddp",
        "nodes": 1,
        "ranks_per_node": 2,
        "micro_batch_size": 2,
        "accumulation_steps": 3,
        "seq_len": 10,
        "recompute": "none",
        "precision": "fp32",
    }
    return Layout(**{**values, **changes})


def items(time: StepTime) -> dict[str, float]:
    return {item.name: item.seconds for item in time.items}


def timed(cluster: Cluster | None = None, **changes: Any) -> StepTime:
    return step_time(small_cost(), cluster or cluster_of(10**6, **FAST_HOST), layout(**changes))


def test_a_step_worked_out_by_hand() -> None:
    """60 tokens a rank, 1,700 FLOPs each forward, 32 more per token of context, half of them masked."""
    time = timed()
    assert items(time) == pytest.approx(
        {
            "products": 3 * 60 * 1700 / 0.5e12,
            "attention": 3.5 * 60 * 10 * 32 / 2 / 0.25e12,
            "activations": 3 * (5 * 2 * 10 * (40 + 10) + 5 * 2 * 10 * 8) / 500e9,
            "weights": 3 * 4 * 4 * 1000 / 500e9,
            "loss": 3 * 2 * 12 * 20 * 50 / 500e9,
            "optimiser": 32 * 1000 / 500e9,
            "collectives": 8 * 500 / 0.5e9 - 2 / 3 * sum(list(items(time).values())[:5]) / 3,
        }
    )
    assert time.num_tokens == 120
    assert time.tokens_per_second == pytest.approx(120 / time.seconds)
    assert time.tokens_per_second_per_rank == pytest.approx(60 / time.seconds)
    assert time.mfu == pytest.approx(60 * (6 * 1000 + 3 * 32 * 10) / (time.seconds * 1e12))
    assert time.bound_by == "network"


def test_recompute_adds_a_forward_pass_of_the_blocks() -> None:
    """Products and attention once more, and each kept byte written and read again; the head is not run again."""
    plain, again = items(timed()), items(timed(recompute="full"))
    assert again["products again"] == pytest.approx(60 * 1600 / 0.5e12)
    assert again["attention"] == pytest.approx(plain["attention"] * 4.5 / 3.5)
    assert again["activations"] == pytest.approx(3 * (7 * 1000 + 5 * 160) / 500e9)
    assert again["loss"] == plain["loss"]
    assert timed(recompute="full").mfu < timed().mfu


@pytest.mark.parametrize(
    ("strategy", "sent"),
    [("ddp", 4000), ("zero1", 2000), ("zero2", 4000), ("zero3", 9000), ("fsdp", 12_000)],
)
def test_collectives_that_nothing_hides(strategy: str, sent: int) -> None:
    """In bf16, three micro-batches; overlap 0: bytes sent over half of 1 GB/s."""
    cluster = cluster_of(10**6, gpu__overlap_share=0, **FAST_HOST)
    assert items(timed(cluster, strategy=strategy, precision="bf16"))["collectives"] == pytest.approx(sent / 0.5e9)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_a_fast_link_hides_all_that_may_be_hidden(strategy: str) -> None:
    """With enough arithmetic, `overlap_share` of the time; what overlaps nothing is all waited for."""
    fast = {"link__intra_node_gb_per_s": 2e4, **FAST_HOST}
    shown = items(timed(cluster_of(10**6, gpu__overlap_share=0, **fast), strategy=strategy))["collectives"]
    hidden = items(timed(cluster_of(10**6, gpu__overlap_share=0.75, **fast), strategy=strategy))["collectives"]
    assert hidden == pytest.approx(shown / 4)
    assert "collectives" not in items(timed(cluster_of(10**6, gpu__overlap_share=1, **fast), strategy=strategy))


@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_deepspeed_hides_nothing_below_stage_3(strategy: str) -> None:
    shown = timed(cluster_of(10**6, gpu__overlap_share=0), strategy=strategy)
    assert items(timed(cluster_of(10**6, gpu__overlap_share=1), strategy=strategy)) == items(shown)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_waits_for_nobody(strategy: str) -> None:
    cluster = cluster_of(10**6, link__latency_us=1000)
    group = 1 if strategy in GROUPED else 0
    alone = items(timed(cluster, strategy=strategy, ranks_per_node=1, shard_group_size=group))
    assert not {"collectives", "in groups", "between groups"} & set(alone)


def test_each_further_node_lengthens_the_ring() -> None:
    """A step across the network and one for each of its other ranks, on top of what one node takes, per collective."""
    assert ring_hops_us(num_members=8, members_per_node=8) == 0
    assert ring_hops_us(num_members=4, members_per_node=8) == 0
    assert ring_hops_us(num_members=16, members_per_node=8) == NETWORK_HOP_US + 7 * NODE_HOP_US
    assert ring_hops_us(num_members=16, members_per_node=1) == 15 * NETWORK_HOP_US
    fast = {"link__intra_node_gb_per_s": 2e4, "link__inter_node_gb_per_s": 2e4, "gpu__overlap_share": 0, **FAST_HOST}
    two, four = (
        items(timed(cluster_of(10**6, **fast), strategy="zero2", nodes=nodes, ranks_per_node=2))["collectives"]
        for nodes in (2, 4)
    )
    calls = (3 + 1) * 5  # three reductions and a gather of four blocks and the rest
    assert four - two == pytest.approx(calls * 2 * (NETWORK_HOP_US + NODE_HOP_US) * 1e-6, rel=1e-3)


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    """Every rank of a node has a port of its own to the others."""
    link = cluster_of(1, link__intra_node_gb_per_s=300, link__inter_node_gb_per_s=25, link__link_share=0.5).link
    assert ring_gb_per_s(link, num_members=8, members_per_node=8) == 150
    assert ring_gb_per_s(link, num_members=16, members_per_node=8) == 100
    assert ring_gb_per_s(link, num_members=16, members_per_node=1) == 12.5


def test_the_host_counts_where_it_is_the_slower() -> None:
    """A GPU's work hides launches; a CPU is its own host. Four blocks, 90 kernels each, three passes, 5 us."""
    work = timed().seconds
    assert items(timed(cluster_of(10**6)))["launches"] == pytest.approx(0.0054, rel=0.01)
    assert items(timed(cluster_of(10**6, kind="cpu")))["launches"] == pytest.approx(0.0054)
    busy = dataclasses.replace(small_cost(), flops=Flops(1e9, 0, 0))
    assert "launches" not in items(step_time(busy, cluster_of(10**6), layout()))
    assert timed(cluster_of(10**6)).bound_by == "kernel launches"
    assert work < 0.0054


def test_narrow_products_are_slow() -> None:
    """Width 1 here: with half of the rate at width 1, products take twice as long."""
    assert small_cost().width == 1
    narrow = cluster_of(10**6, gpu__matmul_half_width=1, **FAST_HOST)
    assert items(timed(narrow))["products"] == pytest.approx(2 * items(timed())["products"])


def test_fp8_speeds_up_the_products_of_the_blocks_alone() -> None:
    cluster = cluster_of(10**6, gpu__fp8_speedup=2, **FAST_HOST)
    plain = items(timed(cluster, precision="bf16"))
    fp8 = items(timed(cluster, precision="bf16", fp8=True))
    assert fp8["products"] == pytest.approx(plain["products"] * (1600 / 2 + 100) / 1700)
    assert {**fp8, "products": 0, "collectives": 0} == {**plain, "products": 0, "collectives": 0}


@given(
    strategy=st.sampled_from(STRATEGIES),
    recompute=st.sampled_from(("none", "full")),
    precision=st.sampled_from(("fp32", "bf16")),
    nodes=st.integers(1, 64),
    micro=st.integers(1, 64),
    steps=st.integers(1, 16),
)
@settings(max_examples=200, deadline=None)
def test_more_work_takes_longer_and_a_better_machine_less(
    strategy: str, recompute: str, precision: str, nodes: int, micro: int, steps: int
) -> None:
    """More samples, passes or tokens: not shorter. Faster arithmetic, memory or links: not longer. MFU below one."""
    cost, h100 = llama_405b(), load_cluster("h100-80")
    at = layout(
        strategy=strategy,
        recompute=recompute,
        precision=precision,
        nodes=nodes,
        ranks_per_node=8,
        shard_group_size=8 if strategy in GROUPED else 0,
        micro_batch_size=micro,
        accumulation_steps=steps,
    )
    seconds = step_time(cost, h100, at).seconds
    for key, more in (("micro_batch_size", micro + 1), ("accumulation_steps", steps + 1), ("seq_len", 11)):
        assert step_time(cost, h100, dataclasses.replace(at, **{key: more})).seconds >= seconds * (1 - 1e-9)
    for section, key in (
        ("gpu", "matmul_share"),
        ("gpu", "memory_share"),
        ("gpu", "overlap_share"),
        ("link", "link_share"),
    ):
        facts = getattr(h100, section)
        better = h100.model_copy(update={section: facts.model_copy(update={key: 1.0})})
        assert step_time(cost, better, at).seconds <= seconds * (1 + 1e-9)
    assert 0 < step_time(cost, h100, at).mfu < 1


def test_mfu_is_the_one_of_the_published_tables() -> None:
    """llm-foundry: MPT-7B on 8 H100 at 10,643 tokens/s each, length 2,048, is 46.44 % of 989 TFLOP/s."""
    cost = small_cost(num_params=6_658_859_008, flops=Flops(0, 0, 4 * 32 * 4096))
    time = step_time(cost, load_cluster("h100-80"), layout(ranks_per_node=8, seq_len=2048, precision="bf16"))
    assert time.mfu * 10_643 / time.tokens_per_second_per_rank == pytest.approx(0.4644, abs=3e-4)
