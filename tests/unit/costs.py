"""Model costs with round numbers, for tests of the planner: no model is built."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from launcher.cost import cache
from launcher.cost.values import Flops, LinearInBatch, ModelCost, SavedBytes
from launcher.job import Cluster, JobSpec, parse_spec
from launcher.plan import Plan
from launcher.units import GIB


def small_cost(**changes: Any) -> ModelCost:
    """1,000 parameters, 4 blocks of 200 each, 200 outside; bytes that can be worked out in the head."""
    saved = SavedBytes(LinearInBatch(40, 1), LinearInBatch(8, 0), LinearInBatch(16, 0))
    halved = SavedBytes(LinearInBatch(20, 0.5), LinearInBatch(4, 0), LinearInBatch(8, 0))
    values: dict[str, Any] = {
        "architecture": "Small",
        "num_params": 1000,
        "num_trainable_params": 1000,
        "num_blocks": 4,
        "block_num_params": 200,
        "outside_num_params": 200,
        "logits_width": 50,
        "logits_per_token": True,
        "max_positions": 4096,
        "saved": {"fp32": saved, "bf16": halved},
        "flops": Flops(1600, 100, 32),
    }
    return ModelCost(**{**values, **changes})


def llama_405b() -> ModelCost:
    """The published sizes: 126 blocks of width 16384, feed-forward 53248, 8 key-value heads of 128, vocabulary 128256.

    Saved bytes per token and block in bf16: 34 activations' worth of width at two bytes, an ordinary figure for
    fused attention; what the test needs is their size, not their last digit.
    """
    width, inner, vocabulary, blocks = 16384, 53248, 128256, 126
    block = 2 * width * width + 2 * width * 1024 + 3 * width * inner + 2 * width
    outside = 2 * vocabulary * width + width
    saved = {
        precision: SavedBytes(
            LinearInBatch(blocks * (16 * width + 4 * inner) * size, 0),
            LinearInBatch(4 * width * size, 0),
            LinearInBatch(blocks * width * size, 0),
        )
        for precision, size in (("fp32", 4), ("bf16", 2))
    }
    return small_cost(
        architecture="LlamaForCausalLM",
        num_params=blocks * block + outside,
        num_trainable_params=blocks * block + outside,
        num_blocks=blocks,
        block_num_params=block,
        outside_num_params=outside,
        logits_width=vocabulary,
        max_positions=131072,
        saved=saved,
        flops=Flops(2 * blocks * block, 2 * width * vocabulary, 4 * blocks * width),
    )


SPEED = {
    "gpu": {
        "peak_bf16_tflops": 2,
        "peak_fp32_tflops": 1,
        "memory_gb_per_s": 1000,
        "matmul_share": 0.5,
        "matmul_half_width": 0,
        "attention_share": 0.25,
        "memory_share": 0.5,
        "overlap_share": 0.5,
        "launch_us": 5,
    },
    "link": {"link_share": 0.5, "latency_us": 0},
}
"""Rates that can be worked with in the head."""


def cluster_of(memory_bytes: float, bf16: bool = False, kind: str = "cuda", **changes: Any) -> Cluster:
    """Machines whose ranks may use this many bytes, with nothing taken off; `changes` as in `gpu__launch_us`."""
    facts: dict[str, dict[str, Any]] = {
        "gpu": {
            "name": "Some",
            "kind": kind,
            "memory_gib": (memory_bytes + 0.5) / GIB,  # not a byte less when it is rounded
            "context_gib": 0,
            "bf16": bf16,
            "fp16": False,
        },
        "link": {"intra_node_gb_per_s": 1, "inter_node_gb_per_s": 1},
        "host": {"memory_gib": 100_000, "memory_gb_per_s": 100, "device_gb_per_s": 10, "disk_gb_per_s": 1},
    }
    for section, speeds in SPEED.items():
        facts[section] |= speeds
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        facts[section][key] = value
    figures = [f"{section}.{key}" for section, keys in facts.items() for key in keys]
    return Cluster.model_validate({**facts, "sources": dict.fromkeys(figures, "this test")})


def spec_of(**changes: Any) -> JobSpec:
    """A spec of one node; `changes` are dotted keys with `__` for the dot."""
    raw: dict[str, Any] = {
        "output_dir": "runs/x",
        "model": {"from_config": {"model_type": "gpt2"}},
        "task": "causal_lm",
        "data": {"train": "corpus.txt"},
        "training": {"seq_len": 10, "global_batch_size": 8, "max_steps": 5},
        "cluster": {"gpus_per_node": 2},
    }
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        node = raw
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return parse_spec(raw)


DEEPSPEED_LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3"},
    "zero2-fp16": {"strategy": "zero2", "precision": "fp16"},
    "zero2-cpu-offload": {"strategy": "zero2", "offload_optimizer": "cpu"},
    "zero3-cpu-offload": {"strategy": "zero3", "offload_optimizer": "cpu", "offload_params": "cpu"},
    "zero3-nvme": {"strategy": "zero3", "offload_optimizer": "nvme", "offload_params": "nvme"},
    "hpz": {"strategy": "hpz", "nodes": 2, "ranks_per_node": 8, "shard_group_size": 8},
}
"""One of each kind that DeepSpeed is configured for."""


def laid_out(plan: Plan, **changes: Any) -> Plan:
    """The plan with another layout: what is emitted follows from the layout alone, however it came to be chosen."""
    layout = replace(plan.chosen.layout, **changes)
    chosen = replace(plan.chosen, layout=layout)
    batch = layout.num_ranks * layout.micro_batch_size * layout.accumulation_steps
    sizes = {"nodes": layout.nodes, "gpus_per_node": layout.ranks_per_node, "global_batch_size": batch}
    return replace(plan, chosen=chosen, **sizes)


@contextlib.contextmanager
def measured_here() -> Iterator[None]:
    """Costs are measured by the same program in this process, which has imported torch already: seconds saved each."""
    from launcher.cost import measure

    def run_main(module: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        assert module == measure.__name__
        output = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            try:
                measure.main()
            except Exception:  # noqa: BLE001 - as the process would: a traceback and exit code 1
                return subprocess.CompletedProcess([], 1, output.getvalue(), traceback.format_exc())
        return subprocess.CompletedProcess([], 0, output.getvalue(), "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "run_python", run_main)
        yield
