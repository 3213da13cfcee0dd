"""What is emitted is what others accept, and only the keys that a hand may tune are taken from a preset."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.emit import deepspeed_config, fsdp_settings, load_preset
from launcher.emit.deepspeed_json import DERIVED, TUNABLE
from launcher.errors import SpecError
from launcher.plan import Plan, make_plan
from launcher.plan.memory import REDUCE_BUCKET_ELEMENTS
from tests.support import REPO
from tests.unit.costs import DEEPSPEED_LAYOUTS, cluster_of, laid_out, small_cost, spec_of

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def planned(strategy: str, **changes: Any) -> tuple[Any, Plan]:
    """A spec and its plan: 2 ranks, 8 samples as micro-batches of 2."""
    parallel = {"strategy": strategy, "micro_batch_size": 2, "precision": "bf16"}
    spec = spec_of(**{"parallel": parallel, **changes})
    return spec, make_plan(spec, small_cost(), cluster_of(10**9))


def config_of(strategy: str, **changes: Any) -> dict[str, Any]:
    spec, plan = planned(strategy, **changes)
    return deepspeed_config(plan, spec, load_preset(spec, plan.chosen.layout))


def config_of_layout(case: str) -> dict[str, Any]:
    """Of a plan with one of `DEEPSPEED_LAYOUTS`."""
    spec, plan = planned("zero3", parallel__nvme_path="/scratch/nvme")
    plan = laid_out(plan, **DEEPSPEED_LAYOUTS[case])
    return deepspeed_config(plan, spec, load_preset(spec, plan.chosen.layout))


def values(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [value for child in node.values() for value in values(child)]
    return [node]


@pytest.mark.parametrize("case", DEEPSPEED_LAYOUTS)
def test_nothing_is_left_open(case: str) -> None:
    """No `auto`, which only the Trainer of transformers would fill in, and JSON all through."""
    config = config_of_layout(case)
    assert "auto" not in values(config)
    assert json.loads(json.dumps(config)) == config


@pytest.mark.parametrize("strategy", STAGES)
def test_the_plan_and_the_configuration_say_the_same(strategy: str) -> None:
    """The numbers that the memory account was made with."""
    config = config_of(strategy)
    assert config["train_batch_size"] == 8
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["stage"] == STAGES[strategy]
    assert config["zero_optimization"]["reduce_bucket_size"] == REDUCE_BUCKET_ELEMENTS
    assert config["gradient_clipping"] == 1.0
    assert config_of(strategy, training__max_grad_norm=None)["gradient_clipping"] == 0.0


def test_deepspeed_accepts_every_layout() -> None:
    """Its own `DeepSpeedConfig`, in a process of its own: it checks the batch arithmetic and refuses unknown ZeRO keys."""
    body = """
import json, sys
import deepspeed.runtime.config as module
seen = []
for config in json.load(sys.stdin):
    ranks = config["train_batch_size"] // config["train_micro_batch_size_per_gpu"] // config["gradient_accumulation_steps"]
    module.dist.get_rank, module.dist.get_world_size = lambda: 0, lambda: ranks
    read = module.DeepSpeedConfig(config)
    zero = read.zero_config
    place = lambda section: "none" if section is None else str(getattr(section.device, "value", section.device))
    seen.append([read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps,
                 read.zero_optimization_stage, zero.reduce_bucket_size, read.bfloat16_config.enabled,
                 read.float16_config.enabled, read.gradient_clipping, zero.zero_hpz_partition_size,
                 place(zero.offload_optimizer), place(zero.offload_param), read.zero_force_ds_cpu_optimizer])
print(json.dumps(seen))
"""
    done = subprocess.run(
        [sys.executable, "-c", body],
        input=json.dumps([config_of_layout(case) for case in DEEPSPEED_LAYOUTS]),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    expected = [
        [8, 2, 2, 1, REDUCE_BUCKET_ELEMENTS, True, False, 1.0, 1, "none", "none", True],
        [8, 2, 2, 2, REDUCE_BUCKET_ELEMENTS, True, False, 1.0, 1, "none", "none", True],
        [8, 2, 2, 3, REDUCE_BUCKET_ELEMENTS, True, False, 1.0, 1, "none", "none", True],
        [8, 2, 2, 2, REDUCE_BUCKET_ELEMENTS, False, True, 1.0, 1, "none", "none", True],
        [8, 2, 2, 2, REDUCE_BUCKET_ELEMENTS, True, False, 1.0, 1, "cpu", "none", False],
        [8, 2, 2, 3, REDUCE_BUCKET_ELEMENTS, True, False, 1.0, 1, "cpu", "cpu", False],
        [8, 2, 2, 3, REDUCE_BUCKET_ELEMENTS, True, False, 1.0, 1, "nvme", "nvme", False],
        [64, 2, 2, 3, REDUCE_BUCKET_ELEMENTS, True, False, 1.0, 8, "none", "none", True],
    ]
    assert dict(zip(DEEPSPEED_LAYOUTS, seen, strict=True)) == dict(zip(DEEPSPEED_LAYOUTS, expected, strict=True))


def test_state_on_nvme_needs_a_folder() -> None:
    spec, plan = planned("zero3")
    plan = laid_out(plan, **DEEPSPEED_LAYOUTS["zero3-nvme"])
    with pytest.raises(SpecError, match=r"parallel\.nvme_path: is missing"):
        deepspeed_config(plan, spec, {})


# --- presets


@pytest.mark.parametrize("path", sorted((REPO / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_presets_hold_tunable_keys_only(path: Path) -> None:
    """And each is the one that is taken for its layout."""
    spec, plan = planned("zero3")
    layout = laid_out(plan, **DEEPSPEED_LAYOUTS[path.stem]).chosen.layout
    assert load_preset(spec, layout) == json.loads(path.read_text())


def with_preset(text: str, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "mine.json"
    path.write_text(text)
    spec, plan = planned("zero2", parallel={"strategy": "zero2", "deepspeed_preset": str(path)})
    return load_preset(spec, plan.chosen.layout)


def nested(key: str, value: Any) -> str:
    section, dot, inner = key.partition(".")
    return json.dumps({section: {inner: value}} if dot else {key: value})


@pytest.mark.parametrize("key", sorted(DERIVED))
def test_a_key_that_the_planner_derives_is_refused(key: str, tmp_path: Path) -> None:
    """Two places for one number is how settings come to contradict each other."""
    with pytest.raises(SpecError, match=r"is derived by the planner; remove it here; ") as caught:
        with_preset(nested(key, 1), tmp_path)
    assert caught.value.problems[0].path == f"{tmp_path}/mine.json: {key}"


@pytest.mark.parametrize("key", sorted(TUNABLE))
def test_a_key_that_is_tuned_by_hand_is_taken(key: str, tmp_path: Path) -> None:
    assert with_preset(nested(key, 7), tmp_path) == json.loads(nested(key, 7))


@pytest.mark.parametrize("key", sorted(TUNABLE))
def test_auto_is_refused_everywhere(key: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="leaves the value open"):
        with_preset(nested(key, "auto"), tmp_path)


def test_a_preset_reaches_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"overlap_comm": true}, "wall_clock_breakdown": true}')
    spec, plan = planned("zero2", parallel={"strategy": "zero2", "deepspeed_preset": str(path)})
    config = deepspeed_config(plan, spec, load_preset(spec, plan.chosen.layout))
    assert (config["wall_clock_breakdown"], config["zero_optimization"]["overlap_comm"]) == (True, True)
    assert config["zero_optimization"]["stage"] == 2


def test_all_mistakes_of_a_preset_are_told(tmp_path: Path) -> None:
    """At once, not one a run."""
    text = '{"train_batch_size": 1, "zero_optimization": {"stage": 1, "overlap_com": true, "overlap_comm": "auto"}}'
    with pytest.raises(SpecError) as caught:
        with_preset(text, tmp_path)
    assert [problem.path.rpartition(": ")[2] for problem in caught.value.problems] == [
        "train_batch_size",
        "zero_optimization.stage",
        "zero_optimization.overlap_com",
        "zero_optimization.overlap_comm",
    ]


# --- FSDP


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_fsdp_reduces_in_fp32(precision: str, dtype: str) -> None:
    """Whatever the arithmetic of the blocks, the sum over ranks is exact to fp32."""
    _, plan = planned("fsdp", parallel={"strategy": "fsdp", "precision": precision})
    assert fsdp_settings(plan) == {
        "wrap": "transformer_blocks",
        "mesh": {"shard": 2},
        "reshard_after_forward": True,
        "cpu_offload": False,
        "state_dtype": "float32",
        "param_dtype": dtype,
        "reduce_dtype": "float32",
    }
