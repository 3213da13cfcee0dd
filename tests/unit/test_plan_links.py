"""What is sent over which link and copied to which host, against bytes and seconds worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.cost.values import Flops
from launcher.job import load_cluster
from launcher.plan.collectives import communication_bytes, rings
from launcher.plan.layout import Layout
from launcher.plan.step_time import peak_flops, step_time
from tests.unit.costs import cluster_of, small_cost

# 1,000 parameters, 4 blocks; 16 ranks on 2 nodes of 8; B = 2, T = 10, A = 3; links 100 and 10 GB/s, half of it reached;
# host: RAM 100 GB/s, copies 10 GB/s each way, no NVMe unless said.
LINKS = {"link__intra_node_gb_per_s": 100, "link__inter_node_gb_per_s": 10, "gpu__launch_us": 0}


def layout(**changes: Any) -> Layout:
    values: dict[str, Any] = {
        "strategy": "hsdp",
        "nodes": 2,
        "ranks_per_node": 8,
        "micro_batch_size": 2,
        "accumulation_steps": 3,
        "seq_len": 10,
        "recompute": "none",
        "precision": "bf16",
    }
    return Layout(**{**values, **changes})


def sent(at: Layout) -> dict[str, tuple[int, int, float]]:
    link = cluster_of(10**6, **LINKS).link
    return {ring.name: (ring.num_bytes, ring.calls, ring.gb_per_s) for ring in rings(small_cost(), link, at)}


def items(at: Layout, **changes: Any) -> dict[str, float]:
    time = step_time(small_cost(), cluster_of(10**6, **{**LINKS, **changes}), at)
    return {item.name: item.seconds for item in time.items}


def test_hsdp_gathers_inside_a_node_and_reduces_a_shard_between_them() -> None:
    """Three micro-batches, each: 2 + 2 + 4 bytes of 875 elements inside, 2 x 4 of half of 125 between two nodes."""
    at = layout(shard_group_size=8)
    assert sent(at) == {"in groups": (3 * 8 * 875, 45, 50.0), "between groups": (3 * 8 * 62, 15, 5.0)}
    assert communication_bytes(small_cost(), at) == 3 * 8 * 875 + 3 * 8 * 62


def test_groups_larger_than_a_node_go_over_the_network() -> None:
    """Two groups of two nodes: 8 ports side by side inside a group, one port for the same shard of the other."""
    inside, between = sent(layout(nodes=4, shard_group_size=16)).values()
    assert inside == (3 * 8 * 937, 45, 40.0)  # 100 x 0.5 in a node, 8 x 10 x 0.5 between nodes
    assert between == (3 * 8 * 31, 15, 5.0)


def test_groups_smaller_than_a_node_share_its_ports() -> None:
    """Groups of 4: two members of each ring between groups stand in a node, and have two ports."""
    inside, between = sent(layout(shard_group_size=4)).values()
    assert inside[2] == 50.0
    assert between == (3 * 8 * (250 * 3 // 4), 15, 10.0)


def test_hpz_gathers_over_all_ranks_once_per_update() -> None:
    """The copy in the group serves the other five gathers of three micro-batches; gradients go to all ranks."""
    assert sent(layout(strategy="hpz", shard_group_size=8)) == {
        "collectives": (2 * 937 + 3 * 2 * 937, 20, 40.0),
        "in groups": (5 * 2 * 875, 25, 50.0),
    }


def test_parameters_that_stay_gathered_are_gathered_once() -> None:
    once, twice = (sent(layout(strategy="fsdp", reshard_after_forward=stays))["collectives"] for stays in (False, True))
    assert once[:2] == (3 * (2 + 4) * 937, 30)
    assert twice[:2] == (3 * (4 + 4) * 937, 45)


@pytest.mark.parametrize(
    ("strategy", "num_bytes"),
    [
        ("ddp", 8 * 93),
        ("zero1", 4 * 93),
        ("zero2", 8 * 93),
        ("zero3", 12 * 937 + 6 * 93),
        ("fsdp", 12 * 937 + 12 * 93),
    ],
)
def test_frozen_weights_are_gathered_and_never_reduced(strategy: str, num_bytes: int) -> None:
    """100 of 1,000 parameters trained: 93 sent in a ring of 16."""
    cost = small_cost(num_trainable_params=100)
    assert communication_bytes(cost, layout(strategy=strategy)) == num_bytes


def test_pure_bf16_halves_the_gradients_of_ddp_and_the_optimiser() -> None:
    mixed, pure = (layout(strategy="ddp", precision=precision) for precision in ("bf16", "pure_bf16"))
    assert 2 * communication_bytes(small_cost(), pure) == communication_bytes(small_cost(), mixed)
    assert items(pure)["optimiser"] == pytest.approx(items(mixed)["optimiser"] / 2) == 16 * 1000 / 500e9


def test_adapters_leave_out_the_gradients_of_frozen_weights() -> None:
    """Forward 1,700 FLOPs a token, backward as many and the adapters' own; MFU counts 4 P where full training has 6 P."""
    cluster = cluster_of(10**6, **LINKS)
    lora = small_cost(num_trainable_params=100, flops=Flops(1600, 100, 0, 1600, 100))
    time = step_time(lora, cluster, layout(strategy="ddp"))
    seconds = {item.name: item.seconds for item in time.items}
    assert seconds["products"] == pytest.approx(60 * 2 * 1700 / 1e12)
    assert seconds["weights"] == pytest.approx(3 * 2 * 2 * 1100 / 500e9)
    assert seconds["optimiser"] == pytest.approx(32 * 100 / 500e9)
    assert time.mfu == pytest.approx(60 * 4 * 1000 / (time.seconds * 2e12))


def test_of_a_mixture_of_experts_mfu_counts_what_a_token_meets() -> None:
    dense, sparse = small_cost(), small_cost(num_active_params=500)
    shown = [
        step_time(cost, cluster_of(10**6, **LINKS), layout(strategy="ddp", seq_len=1)).mfu for cost in (dense, sparse)
    ]
    assert shown[1] / shown[0] == pytest.approx((6 * 500 + 96) / (6 * 1000 + 96))


def test_an_optimiser_on_the_host_shares_its_ram() -> None:
    """32 bytes of a sixteenth of the parameters at an eighth of 80 GB/s; gradients down 3 times, up twice, weights up."""
    at = layout(strategy="zero2", offload_optimizer="cpu")
    shown = items(at)
    assert shown["optimiser"] == pytest.approx(32 * 62.5 / 10e9)
    assert shown["copies to the host"] == pytest.approx(2 * 62.5 / 10e9)  # the rest hides behind the passes
    assert "NVMe" not in shown


def test_copies_longer_than_the_passes_are_waited_for() -> None:
    """One byte a second: of 5 gradients and 6 gathers of a shard in bf16 nothing hides."""
    at = layout(strategy="zero3", offload_optimizer="cpu", offload_params="cpu")
    assert items(at, host__device_gb_per_s=1e-9)["copies to the host"] == pytest.approx(2 * 62.5 * (5 + 6), rel=1e-6)


def test_fsdp_on_the_host_copies_fp32() -> None:
    at = layout(strategy="fsdp", offload_optimizer="cpu", offload_params="cpu")
    assert items(at, host__device_gb_per_s=1e-9)["copies to the host"] == pytest.approx(4 * 62.5 * 3 * 3, rel=1e-6)


def test_states_on_nvme_are_read_and_written() -> None:
    """24 bytes of states and 8 of gradients for a sixteenth of the parameters, at an eighth of the disks' rate."""
    disks = {"host__nvme_gib": 1000, "host__nvme_gb_per_s": 8}
    at = layout(strategy="zero3", offload_optimizer="nvme")
    assert items(at, **disks)["NVMe"] == pytest.approx(32 * 62.5 / 1e9)
    slow = {**disks, "host__nvme_gb_per_s": 8e-9}
    both = items(layout(strategy="zero3", offload_optimizer="nvme", offload_params="nvme"), **slow)
    assert both["NVMe"] == pytest.approx(32 * 62.5 + 6 * 2 * 62.5, rel=1e-6)


def test_16_bit_products_without_units_run_at_the_rate_of_fp32() -> None:
    """V100 has fp16 units and no bf16; where neither is there the file says what emulation reaches."""
    v100, cpu = load_cluster("v100-32").gpu, load_cluster("cpu").gpu
    assert peak_flops(v100, "fp16") == 1e12 * v100.peak_bf16_tflops
    assert peak_flops(v100, "bf16") == peak_flops(v100, "fp32") == 1e12 * v100.peak_fp32_tflops
    assert peak_flops(cpu, "bf16") == 1e12 * cpu.peak_bf16_tflops
