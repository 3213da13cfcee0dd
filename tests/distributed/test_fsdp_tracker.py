"""The plan's account of FSDP2 beside torch's own FSDPMemTracker, on worlds that no test machine has."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from typing import Any

import pytest

from launcher.cost.cache import cached_cost
from launcher.job import parse_spec
from launcher.plan.layout import Layout
from launcher.plan.memory import rank_memory
from tests.unit.costs import cluster_of, measured_here

LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
GPT2 = {"model_type": "gpt2", "n_layer": 4, "n_embd": 384, "n_head": 6, "vocab_size": 4096, "n_positions": 512}
MODELS: dict[str, dict[str, Any]] = {"llama": LLAMA, "gpt2": GPT2}
CASES = [
    *product(MODELS, (8, 64), ("bf16",), ("none", "full")),
    ("llama", 8, "fp32", "none"),
    ("gpt2", 64, "fp32", "full"),
]
UNSEEN = ("all-gather buffers", "gradients", "gradient of the head", "fragmentation")
"""What the plan adds to what is alive: blocks of streams of their own, which the allocator gives back to nobody else, the
head's gradient, and its margin. Of the tracker's categories these are left out as well."""
NEVER = ("All Gather", "Reduce Scatter", "Sharded Grad", "Unsharded Grad", "Total", "Inputs")


def spec_of(model: str) -> dict[str, Any]:
    training = {"seq_len": 512, "global_batch_size": 128, "max_steps": 1}
    return {
        "output_dir": "runs/x",
        "model": {"from_config": MODELS[model]},
        "task": "causal_lm",
        "data": {"train": "corpus.txt"},
        "training": training,
    }


@pytest.fixture(scope="module")
def tracked() -> list[dict[str, int]]:
    """One process for all cases: imports are most of the time."""
    asked = [
        {
            "num_ranks": ranks,
            "spec": spec_of(model),
            "layout": {
                "recompute": recompute,
                "micro_batch_size": 2,
                "param_dtype": {"bf16": "bfloat16", "fp32": "float32"}[precision],
            },
        }
        for model, ranks, precision, recompute in CASES
    ]
    argv = [sys.executable, "-m", "tests.distributed.fsdp_tracker"]
    done = subprocess.run(argv, input=json.dumps(asked), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_the_plan_counts_what_the_tracker_sees(number: int, tracked: list[dict[str, int]]) -> None:
    """State to the byte; all that is alive at the peak within 3 %, whichever of the step's moments that is."""
    model, ranks, precision, recompute = CASES[number]
    with measured_here():
        cost = cached_cost(parse_spec(spec_of(model)))
    layout = Layout("fsdp", ranks // 8, 8, 2, 1, 512, recompute, precision)
    items = {item.name: item.num_bytes for item in rank_memory(cost, cluster_of(1), layout).items}
    seen = tracked[number]
    assert (items["parameters"], items["optimiser"]) == (seen["Sharded Param"], seen["OptState"])
    planned = sum(size for name, size in items.items() if name not in UNSEEN)
    alive = sum(size for name, size in seen.items() if name not in NEVER)
    assert planned == pytest.approx(alive, rel=0.03), (items, seen)
