"""A fixed key that means nothing is refused by name, and what means nothing is not tried."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.errors import PlanError, SpecError
from launcher.job import load_cluster
from launcher.plan import make_plan
from launcher.plan.knobs import families
from tests.unit.costs import cluster_of, small_cost, spec_of


def kinds(machine: str = "h100-80", **parallel: Any) -> list[Any]:
    spec = spec_of(cluster={"name": machine, "nodes": 2, "gpus_per_node": 4}, parallel=parallel)
    return families(spec, load_cluster(machine))


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (
            {"strategy": "zero1", "offload_params": "cpu"},
            "offload_params: cpu cannot be honoured by strategy zero1; .*zero3",
        ),
        (
            {"strategy": "ddp", "shard_group_size": 4},
            "shard_group_size: 4 cannot be honoured by strategy ddp; .*hsdp or hpz|hpz",
        ),
        ({"strategy": "zero2", "precision": "pure_bf16"}, "precision: pure_bf16 cannot be honoured by strategy zero2"),
        (
            {"strategy": "fsdp", "precision": "fp16"},
            "precision: fp16 cannot be honoured by strategy fsdp; .*zero1 or zero2",
        ),
        (
            {"strategy": "zero3", "reshard_after_forward": False},
            "reshard_after_forward: False cannot be .* fsdp or hsdp",
        ),
        ({"strategy": "hsdp", "shard_group_size": 3}, "shard_group_size: 3 cuts 2 nodes x 4 ranks .*possible: 2, 4, 8"),
        ({"offload_optimizer": "nvme"}, "offload_optimizer: nvme needs a folder; set parallel.nvme_path"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(parallel: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        kinds(**parallel)


def test_a_cpu_cluster_offloads_nothing() -> None:
    assert {layout.offload_optimizer for layout in kinds("cpu")} == {"none"}
    with pytest.raises(SpecError, match="offload_optimizer: cpu has no effect on a CPU cluster"):
        kinds("cpu", offload_optimizer="cpu")


def test_nvme_is_tried_only_with_a_folder() -> None:
    assert "nvme" not in {layout.offload_optimizer for layout in kinds()}
    assert "nvme" in {layout.offload_optimizer for layout in kinds(nvme_path="/local")}
    spec = spec_of(parallel={"offload_optimizer": "nvme", "nvme_path": "/local"})
    with pytest.raises(SpecError, match="needs NVMe disks, of which the cluster file cpu knows nothing"):
        families(spec, cluster_of(10**6))


def test_a_fixed_key_leaves_only_the_strategies_that_honour_it() -> None:
    assert {layout.strategy for layout in kinds(reshard_after_forward=False)} == {"fsdp", "hsdp"}
    assert {layout.strategy for layout in kinds(precision="fp16")} == {"zero1", "zero2", "zero3", "hpz"}
    assert {layout.shard_group_size for layout in kinds(strategy="hsdp")} == {2, 4}
    assert {layout.shard_group_size for layout in kinds(strategy="hpz")} == {2, 4}


def test_what_is_offered_where_nothing_fits_does_fit() -> None:
    """Each offer is a set of overrides: planned with them, the job fits."""
    cost = small_cost()
    asked = {"strategy": "ddp", "recompute": "none"}
    machine = cluster_of(make_plan(spec_of(parallel=asked), cost, cluster_of(10**9)).chosen.memory.total_bytes // 2)
    with pytest.raises(PlanError) as caught:
        make_plan(spec_of(parallel=asked | {"micro_batch_size": 4}), cost, machine)
    offer = str(caught.value).split("this would fit: --set ")[1].split(" (")[0]
    pairs = dict(override.removeprefix("parallel.").split("=") for override in offer.split(" --set "))
    values = {key: int(value) if value.isdigit() else value for key, value in pairs.items()}
    changed = asked | {"micro_batch_size": 4} | values
    assert make_plan(spec_of(parallel=changed), cost, machine).chosen.fits
