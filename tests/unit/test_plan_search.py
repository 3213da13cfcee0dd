"""Which layout is chosen, and that what lost is told with its reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cost.values import LinearInBatch, ModelCost, SavedBytes
from launcher.errors import PlanError, SpecError, UserError
from launcher.job import Cluster, load_cluster
from launcher.plan import Plan, make_plan
from launcher.plan.explain import explain
from launcher.plan.knobs import STRATEGIES, families, micro_batches
from launcher.plan.layout import GROUPED
from launcher.plan.search import TIE, Search
from launcher.units import GIB
from tests.unit.costs import cluster_of, llama_405b, small_cost, spec_of

NOTHING = LinearInBatch(0, 0)


def state_only(**changes: Any) -> ModelCost:
    """10^9 parameters, 20 blocks of 4 x 10^7; activations and logits take nothing, so that only the strategies differ."""
    saved = dict.fromkeys(("fp32", "bf16"), SavedBytes(NOTHING, NOTHING, NOTHING))
    sizes = {
        "num_params": 10**9,
        "num_trainable_params": 10**9,
        "num_blocks": 20,
        "block_num_params": 4 * 10**7,
        "outside_num_params": 2 * 10**8,
    }
    return small_cost(**{"saved": saved, "logits_width": 0, **sizes, **changes})


def plan_in(memory_bytes: float, cost: ModelCost | None = None, bf16: bool = False, **changes: Any) -> Plan:
    """4 ranks, one sample each, unless changed."""
    spec = spec_of(**{"cluster__gpus_per_node": 4, "training__global_batch_size": 4, **changes})
    return make_plan(spec, cost or state_only(), cluster_of(memory_bytes, bf16))


ON_DEVICE = {"parallel__offload_optimizer": "none", "parallel__offload_params": "none"}
ROOM = 10**11
"""Bytes in which every layout of 10^9 parameters fits."""
FSDP_BYTES = 8_064_000_000
"""With the margin of a twentieth: 1 + 2 + 1, all-gather buffers 4 x (0.2 + 0.04), gathered parameters the same, whole
gradients 0.8, reduce-scatter buffers 4 x (0.2 + 0.04)."""


@pytest.mark.parametrize(
    ("memory_bytes", "chosen"),
    [
        (ROOM, "ddp"),
        (17_600_000_000, "ddp"),  # 16 bytes a parameter and twice the margin of a twentieth: the highest estimate
        (17_599_999_999, "zero1"),
        (14_300_000_000, "zero1"),  # 4 + 1 + 2, gradients 4, own gradients 1, bucket 0.2, its copy 0.8
        (14_299_999_999, "zero2"),
        (9_450_000_000, "zero2"),  # 4 + 1 + 2, gradients 1, flat gradients 1
        (9_449_999_999, "fsdp"),
        (FSDP_BYTES, "fsdp"),
    ],
)
def test_the_less_memory_the_more_is_sharded(memory_bytes: int, chosen: str) -> None:
    assert plan_in(memory_bytes, **ON_DEVICE).chosen.strategy == chosen


def test_offload_is_the_last_resort() -> None:
    """Where nothing fits without it; as fast as here it may be."""
    assert plan_in(FSDP_BYTES, **ON_DEVICE).chosen.layout.offload_optimizer == "none"
    below = plan_in(FSDP_BYTES - 1)
    assert below.chosen.layout.offload_optimizer == "cpu"
    assert all(other.layout.offload_optimizer == "cpu" for other in below.alternatives)


def test_below_the_smallest_nothing_fits() -> None:
    with pytest.raises(PlanError, match=r"fsdp, micro-batch 1 x 1 is the smallest, 7.51 GiB needed"):
        plan_in(FSDP_BYTES - 1, **ON_DEVICE)


def test_a_node_whose_ram_does_not_suffice_is_refused_for_it() -> None:
    """3 GiB for each process, and 4 GB for the one that builds the model in fp32."""
    words = r"15\.7 GiB needed in the RAM of a node, 15\.0 GiB usable \(processes 12\.0 GiB, loading 3\.73 GiB"
    with pytest.raises(PlanError, match=words):
        make_plan(
            spec_of(cluster__gpus_per_node=4, training__global_batch_size=4),
            state_only(),
            cluster_of(ROOM, host__memory_gib=15),
        )


def test_in_bf16_zero1_sends_half_of_ddp() -> None:
    """DDP's gradients stay fp32 under autocast; ZeRO-1 reduces in bf16 and gathers in bf16."""
    plan = plan_in(ROOM, bf16=True)
    ddp = next(candidate for candidate in plan.alternatives if candidate.strategy == "ddp")
    assert plan.chosen.strategy == "zero1"
    assert 2 * plan.chosen.communication_bytes == ddp.communication_bytes


def test_one_rank_needs_no_machinery() -> None:
    """Nothing is sent, so the first of the strategies wins, in either precision."""
    for bf16 in (False, True):
        assert plan_in(ROOM, bf16=bf16, cluster__gpus_per_node=1).chosen.strategy == "ddp"


def test_recompute_is_the_last_resort() -> None:
    """A third more arithmetic: not where something without it fits that is as fast."""
    asked = {"training__global_batch_size": 32, "parallel__strategy": "ddp"}
    plan = plan_in(10**7, small_cost(), **asked)
    assert plan.chosen.layout.recompute == "none"
    one = plan_in(10**7, small_cost(), **asked, parallel__micro_batch_size=1).chosen
    assert one.layout.recompute == "none"
    assert plan_in(one.memory.total_bytes, small_cost(), **asked).alternatives
    assert plan_in(one.memory.total_bytes - 1, small_cost(), **asked).chosen.layout.recompute == "full"


def test_the_largest_micro_batch_that_fits_is_taken() -> None:
    """Each pass of a small model costs the host the same launches, so fewest accumulation steps are fastest."""
    cost, ddp = small_cost(), {"strategy": "ddp", "recompute": "none"}
    chosen = plan_in(10**7, cost, training__global_batch_size=32, parallel=ddp).chosen
    assert (chosen.layout.micro_batch_size, chosen.layout.accumulation_steps) == (8, 1)
    tighter = plan_in(chosen.memory.total_bytes - 1, cost, training__global_batch_size=32, parallel=ddp).chosen
    assert (tighter.layout.micro_batch_size, tighter.layout.accumulation_steps) == (4, 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_fixed_stays_fixed(strategy: str) -> None:
    """Every key at once; nothing else is even tried."""
    fixed = {"strategy": strategy, "micro_batch_size": 2, "recompute": "full", "precision": "bf16"}
    fixed |= {"reshard_after_forward": True, "offload_optimizer": "none", "offload_params": "none"}
    fixed |= {"shard_group_size": 2} if strategy in GROUPED else {}
    plan = plan_in(10**9, small_cost(), training__global_batch_size=16, parallel=fixed)
    chosen = plan.chosen
    assert {key: getattr(chosen.layout, key) for key in fixed} == fixed
    assert chosen.layout.accumulation_steps == 2
    assert (plan.alternatives, plan.rejected) == ((), ())
    assert f"{strategy} is what the spec asks for" in plan.reason


@given(memory_bytes=st.integers(9_000, 60_000), batch=st.integers(1, 24).map(lambda share: 4 * share))
@settings(max_examples=100, deadline=None)
def test_a_plan_is_whole(memory_bytes: int, batch: int) -> None:
    """It fits, its batch adds up, and every kind of layout is chosen, an alternative, or rejected with its shortfall."""
    try:
        plan = plan_in(memory_bytes, small_cost(logits_width=1), training__global_batch_size=batch)
    except PlanError:
        return
    tried = [plan.chosen, *plan.alternatives, *(lost.candidate for lost in plan.rejected)]
    kinds = {dataclasses.replace(c.layout, micro_batch_size=1, accumulation_steps=1) for c in tried}
    spec = spec_of(cluster__gpus_per_node=4, training__global_batch_size=batch)
    assert kinds == {
        dataclasses.replace(layout, accumulation_steps=1) for layout in families(spec, cluster_of(memory_bytes))
    }
    for candidate in (plan.chosen, *plan.alternatives):
        assert candidate.fits
        assert candidate.layout.micro_batch_size * candidate.layout.accumulation_steps * 4 == batch
    for lost in plan.rejected:
        assert not lost.candidate.fits
        assert "needed" in lost.reason
        assert "usable" in lost.reason
    assert explain(plan)


def test_the_reason_names_what_would_have_been_simpler() -> None:
    """What is as fast, and what did not fit with its three largest items."""
    plan = plan_in(9_449_999_999, **ON_DEVICE)
    assert plan.reason.startswith("fsdp takes ")
    assert " and fits (7.51 GiB of 8.80 GiB per rank)" in plan.reason
    for lost in (
        "ddp does not fit: 15.6 GiB needed",
        "zero1 does not fit: 12.7 GiB needed",
        "zero2 does not fit: 8.80 GiB needed",
    ):
        assert lost in plan.reason


def test_the_fastest_that_fits_is_taken() -> None:
    """A slow link: zero3 sends six bytes a parameter and micro-batch, ddp eight a step, so ddp wins in the end."""
    big = state_only(num_params=10**9, block_num_params=2 * 10**8, outside_num_params=2 * 10**8)
    plan = plan_in(10**12, big, bf16=True, training__global_batch_size=64)
    fitting = (plan.chosen, *plan.alternatives)
    fastest = min(candidate.step_time.seconds for candidate in fitting)
    assert plan.chosen.step_time.seconds <= (1 + TIE) * fastest
    late = [candidate.step_time.seconds for candidate in fitting if candidate.step_time.seconds > (1 + TIE) * fastest]
    assert late
    assert late == sorted(late)
    assert "faster than" in plan.reason


def test_recompute_is_taken_where_it_saves_time() -> None:
    """Without it only one sample fits at a time, and each pass gathers the parameters again over a slow link."""
    saved = SavedBytes(LinearInBatch(10**8, 0), NOTHING, LinearInBatch(10**3, 0))
    cost = state_only(
        num_params=10**8, num_trainable_params=10**8, num_blocks=4, block_num_params=25 * 10**6, outside_num_params=0
    )
    cost = dataclasses.replace(cost, saved=dict.fromkeys(("fp32", "bf16"), saved))
    asked = {"training__global_batch_size": 64, "parallel__strategy": "fsdp"}
    plain = plan_in(10**12, cost, **asked, **ON_DEVICE, parallel__micro_batch_size=1, parallel__recompute="none").chosen
    plan = plan_in(plain.memory.total_bytes, cost, **asked)
    assert plan.chosen.layout.recompute == "full"
    assert any(lost.layout.recompute == "none" for lost in plan.alternatives)


def test_small_jobs_on_a_cpu_stay_with_ddp() -> None:
    """Least machinery, where every strategy fits and the model is a toy."""
    saved = SavedBytes(LinearInBatch(10_000, 0), LinearInBatch(500, 0), LinearInBatch(256, 0))
    cost = small_cost(num_params=30_000, saved=dict.fromkeys(("fp32", "bf16"), saved), num_blocks=2)
    spec = spec_of(cluster={"name": "cpu", "gpus_per_node": 2}, training__seq_len=48)
    chosen = make_plan(spec, cost, load_cluster("cpu")).chosen
    assert (chosen.strategy, chosen.layout.accumulation_steps, chosen.layout.recompute) == ("ddp", 1, "none")


def test_the_time_of_the_job_is_told_when_its_steps_are_known() -> None:
    told = plan_in(ROOM)
    assert told.job_seconds == pytest.approx(5 * told.chosen.step_time.seconds)
    assert "for 5 steps" in explain(told)
    open_ended = plan_in(ROOM, training={"seq_len": 10, "global_batch_size": 4, "num_epochs": 1})
    assert open_ended.job_seconds is None
    assert "steps" not in explain(open_ended).partition("time per optimiser step")[2].partition("why")[0]


def test_the_digest_never_changes_between_releases() -> None:
    """It stands in manifests: this one is a promise."""
    plan = plan_in(ROOM)
    assert plan.decision() == {
        "strategy": "ddp",
        "micro_batch_size": 1,
        "accumulation_steps": 1,
        "recompute": "none",
        "precision": "fp32",
        "nodes": 1,
        "gpus_per_node": 4,
        "device": "cuda",
        "global_batch_size": 4,
        "seq_len": 10,
    }
    assert plan.digest() == "f628e71d3f2c"


def test_the_digest_is_of_the_decision_only() -> None:
    """More memory, another model or another learning rate change nothing that ranks must agree on."""
    plan = plan_in(ROOM)
    same = [
        plan_in(2 * ROOM),
        plan_in(ROOM, state_only(num_params=9 * 10**8, num_trainable_params=9 * 10**8)),
        plan_in(ROOM, training__lr=1.0),
        dataclasses.replace(plan, reason="another", alternatives=(), rejected=()),
    ]
    assert {other.digest() for other in same} == {plan.digest()}
    others = [
        plan_in(ROOM, parallel="zero1"),
        plan_in(ROOM, training__seq_len=9),
        plan_in(ROOM, training__global_batch_size=8),
        plan_in(ROOM, parallel__recompute="full"),
        plan_in(ROOM, parallel__precision="bf16", parallel__strategy="ddp"),
        plan_in(ROOM, cluster={"nodes": 2, "gpus_per_node": 2}),
    ]
    assert len({other.digest() for other in (plan, *others)}) == 1 + len(others)


def test_batches_that_do_not_divide_are_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(SpecError, match=r"10 is not a multiple of 4 ranks; nearest: 8, 12"):
        plan_in(10**6, training__global_batch_size=10)
    with pytest.raises(SpecError, match=r"8 is not a multiple of micro_batch_size 3 x 4 ranks = 12; nearest: 12"):
        plan_in(10**6, training__global_batch_size=8, parallel__micro_batch_size=3)


def test_a_batch_without_end_is_planned_at_once() -> None:
    """80 micro-batches divide a rank's share, found in its square root of steps; the border is found by halving."""
    spec = spec_of(cluster__gpus_per_node=4, training__global_batch_size=10**9, training__seq_len=1)
    sizes = micro_batches(spec)
    assert len(sizes) == 80  # 250,000,000 = 2^7 x 5^9 has 8 x 10 divisors
    assert sizes == sorted(size for size in sizes if 250_000_000 % size == 0)
    chosen = make_plan(spec, small_cost(), cluster_of(10**7)).chosen
    assert 1 < chosen.layout.micro_batch_size < 250_000_000


@given(
    family=st.integers(0, 10**6),
    batch=st.sampled_from((64, 96, 720)),
    memory_gib=st.integers(2, 79),
)
@settings(max_examples=60, deadline=None)
def test_no_micro_batch_that_was_left_out_is_better(family: int, batch: int, memory_gib: int) -> None:
    """Of each kind of layout the largest micro-batch that fits is no slower than any other that fits."""
    spec = spec_of(cluster={"name": "h100-80", "nodes": 2, "gpus_per_node": 4}, training__global_batch_size=batch)
    h100, cost = load_cluster("h100-80"), small_cost(num_params=10**9, num_trainable_params=10**9)
    cluster = h100.model_copy(update={"gpu": h100.gpu.model_copy(update={"memory_gib": float(memory_gib)})})
    search = Search(spec, cost, cluster)
    kinds = families(spec, cluster)
    kind = kinds[family % len(kinds)]
    fitting = [search.weighed(kind, size) for size in micro_batches(spec) if search.fits(kind, size)]
    largest, too_large = search.border(kind)
    assert (largest > 0) == bool(fitting)
    if fitting:
        best = next(c for c in fitting if c.layout.micro_batch_size == largest)
        assert largest == max(c.layout.micro_batch_size for c in fitting)
        assert all(best.step_time.seconds <= other.step_time.seconds * (1 + 1e-9) for other in fitting)
    assert not too_large or not search.fits(kind, too_large)


def test_a_model_without_bound_on_positions_takes_any_length() -> None:
    assert plan_in(ROOM, state_only(max_positions=None), training__seq_len=10**6).seq_len == 10**6
    with pytest.raises(SpecError, match="give at most 4096"):
        plan_in(10**6, training__seq_len=4097)


def with_ample_ram(cluster: Cluster) -> Cluster:
    """So that the accelerators decide."""
    return cluster.model_copy(update={"host": cluster.host.model_copy(update={"memory_gib": 100_000})})


@pytest.mark.parametrize(("nodes", "batch"), [(1280, 10_240), (1280, 16 * 10_240), (128, 2048)])
def test_a_model_of_405b_is_planned_over_thousands_of_ranks(nodes: int, batch: int) -> None:
    """406 billion parameters on H100s of 80 GB in bf16, 4,096 tokens: sharded fully, with recompute."""
    spec = spec_of(
        cluster={"name": "h100-80", "nodes": nodes, "gpus_per_node": 8},
        training={"seq_len": 4096, "global_batch_size": batch, "max_steps": 1},
    )
    plan = make_plan(spec, llama_405b(), with_ample_ram(load_cluster("h100-80")))
    assert plan.num_params == pytest.approx(405.85e9, rel=1e-4)
    assert plan.chosen.strategy in ("fsdp", "hsdp", "zero3")  # in groups the rings are shorter, and so the latency
    assert plan.chosen.layout.precision == "bf16"
    assert plan.chosen.memory.total_bytes < 78.1 * GIB


def test_a_model_of_405b_does_not_fit_in_8_ranks() -> None:
    """16 bytes a parameter over 8 ranks are 756 GiB each: the message says what is missing and what would help."""
    spec = spec_of(
        cluster={"name": "h100-80", "gpus_per_node": 8},
        training={"seq_len": 8192, "global_batch_size": 8, "max_steps": 1},
    )
    with pytest.raises(UserError, match=r"this would fit: --set training.seq_len=") as caught:
        make_plan(spec, llama_405b(), with_ample_ram(load_cluster("h100-80")))
    assert "TiB needed" in str(caught.value) or "GiB needed" in str(caught.value)


def test_the_json_holds_everything() -> None:
    """What `--json` prints: the decision, the account, and every layout once."""
    plan = plan_in(9_449_999_999, **ON_DEVICE)
    raw = plan.to_json()
    assert raw["plan"] == {
        **plan.chosen.layout.decided(),
        **plan.decision(),
        "engine": "torch",
        "digest": plan.digest(),
        "reason": plan.reason,
        "notes": [],
    }
    for place in ("memory", "host_memory", "nvme", "disk"):
        account = raw[place]
        assert set(account) == {"items", "usable_bytes", "total_bytes", "low_bytes", "high_bytes", "fits", "moment"}
        assert account["total_bytes"] == sum(item["num_bytes"] for item in account["items"])
        assert account["low_bytes"] <= account["total_bytes"] <= account["high_bytes"]
        assert all(item["formula"] and item["source"] for item in account["items"])
    time = raw["step_time"]
    assert time["seconds"] == pytest.approx(sum(item["seconds"] for item in time["items"]))
    assert time["tokens_per_second"] == pytest.approx(4 * time["tokens_per_second_per_rank"])
    assert time["job_seconds"] == pytest.approx(5 * time["seconds"])
    assert time["bound_by"] == "network"
    assert len(raw["alternatives"]) == len(plan.alternatives)
    assert all(other["step_seconds"] > 0 for other in (*raw["alternatives"], *raw["rejected"]))
    assert all(lost["reason"] and lost["memory_bytes"] > 9_449_999_999 for lost in raw["rejected"])
