"""How long the planner itself takes: 405B parameters on 10,240 GPUs with every strategy, and plans of cached models.

`python -m tools.bench plan [SPEC ...] [--json]`: a spec's model is measured first where it is not cached, which is not
counted. `accelerate estimate-memory` is no peer to race: it counts weights alone and asks a model hub for them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.cost.cache import cached_cost
from launcher.cost.values import Flops, LinearInBatch, ModelCost, SavedBytes, TensorGroup
from launcher.errors import EXIT_DONE
from launcher.job import Cluster, load_cluster, load_spec, parse_spec
from launcher.plan import Plan, make_plan
from launcher.plan.explain import explain
from launcher.plan.knobs import STRATEGIES
from launcher.units import show_time

WIDTH, INNER, VOCABULARY, BLOCKS, KEYS = 16384, 53248, 128256, 126, 1024
"""Llama-3-405B's published sizes; the last is the width of its 8 key-value heads."""
AMPLE_RAM_GIB = 100_000
"""Of a node, so that the accelerators decide: today every rank builds the whole model in host memory first."""


def llama_405b() -> ModelCost:
    """Its counts, and bytes kept for backward as an ordinary block with fused attention keeps them."""
    shapes = [((WIDTH, WIDTH), 2), ((KEYS, WIDTH), 2), ((INNER, WIDTH), 2), ((WIDTH, INNER), 1), ((WIDTH,), 2)]
    block = sum(TensorGroup(shape, count, True, True).count * _size(shape) for shape, count in shapes)
    outside = 2 * VOCABULARY * WIDTH + WIDTH
    saved = {
        precision: SavedBytes(
            LinearInBatch(BLOCKS * (16 * WIDTH + 4 * INNER) * size, 0),
            LinearInBatch(4 * WIDTH * size, 0),
            LinearInBatch(BLOCKS * WIDTH * size, 0),
        )
        for precision, size in (("fp32", 4), ("bf16", 2))
    }
    tensors = [TensorGroup(shape, BLOCKS * count, True, True) for shape, count in shapes]
    tensors += [TensorGroup((VOCABULARY, WIDTH), 2, True, False), TensorGroup((WIDTH,), 1, True, False)]
    return ModelCost(
        architecture="LlamaForCausalLM",
        num_params=BLOCKS * block + outside,
        num_trainable_params=BLOCKS * block + outside,
        num_blocks=BLOCKS,
        block_num_params=block,
        outside_num_params=outside,
        logits_width=VOCABULARY,
        logits_per_token=True,
        max_positions=131072,
        saved=saved,
        flops=Flops(2 * BLOCKS * block, 2 * WIDTH * VOCABULARY, 4 * BLOCKS * WIDTH),
        tensors=tuple(tensors),
    )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size


def plan_405b() -> Plan:
    """On 1,280 nodes of 8 H100, 16 samples a rank, NVMe allowed: every strategy and knob."""
    spec = parse_spec(
        {
            "output_dir": "runs/x",
            "model": {"from_config": {"model_type": "llama"}},
            "task": "causal_lm",
            "data": {"train": "corpus.txt"},
            "training": {"seq_len": 4096, "global_batch_size": 16 * 10_240, "max_steps": 1},
            "parallel": {"nvme_path": "/local"},
            "cluster": {"name": "h100-80", "nodes": 1280, "gpus_per_node": 8},
        }
    )
    plan = make_plan(spec, llama_405b(), _with_ample_ram(load_cluster("h100-80")))
    tried = {c.strategy for c in (plan.chosen, *plan.alternatives, *(lost.candidate for lost in plan.rejected))}
    assert tried == set(STRATEGIES), "the figure is of every strategy"
    return plan


def _with_ample_ram(cluster: Cluster) -> Cluster:
    return cluster.model_copy(update={"host": cluster.host.model_copy(update={"memory_gib": AMPLE_RAM_GIB})})


def plan_of(path: Path) -> Callable[[], Plan]:
    """Spec, cluster file and cached cost are read each time, as the command does."""

    def made() -> Plan:
        spec = load_spec(path)
        plan = make_plan(spec, cached_cost(spec), load_cluster(spec.cluster.name), advise=False)
        explain(plan)
        return plan

    return made


def timed(name: str, make: Callable[[], Plan], repeats: int) -> dict[str, Any]:
    """Of each repetition but the first, which measures a model that is not cached. CPU time is what a busy machine leaves alone."""
    plan = make()
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        make()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    kinds = 1 + len(plan.alternatives) + len(plan.rejected)
    return {
        "case": name,
        "median_seconds": statistics.median(seconds),
        "worst_seconds": max(seconds),
        "median_cpu_seconds": statistics.median(cpu_seconds),
        "chosen": plan.chosen.label,
        "candidates": kinds,
    }


def main(argv: list[str]) -> int:
    """Returns the exit code; times are printed, never judged."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench plan", description=str(__doc__).partition("\n")[0])
    parser.add_argument("specs", metavar="SPEC", nargs="*", type=Path, help="job specs whose plans are timed as well")
    parser.add_argument("--repeats", type=int, default=5, help="times each is planned")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    cases = [timed("405B parameters on 10,240 GPUs", plan_405b, options.repeats)]
    cases += [timed(str(path), plan_of(path), options.repeats) for path in options.specs]
    if options.json:
        sys.stdout.write(json.dumps({"cases": cases}, indent=1) + "\n")
        return EXIT_DONE
    for case in cases:
        median, worst = show_time(case["median_seconds"]), show_time(case["worst_seconds"])
        cpu = show_time(case["median_cpu_seconds"])
        found = f"{case['candidates']} candidates, {case['chosen']}"
        sys.stdout.write(
            f"{case['case']}: median {median}, worst {worst} of {options.repeats}; {cpu} of CPU ({found})\n"
        )
    return EXIT_DONE
