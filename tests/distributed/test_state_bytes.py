"""What the plan says of model and optimiser state is what the engines really hold, to the byte."""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launcher.cost.architecture import blocks_of, head_class, model_config
from launcher.cost.cache import cached_cost
from launcher.cost.measure import _tensors
from launcher.cost.trainable import apply_method
from launcher.cost.values import ModelCost
from launcher.job import JobSpec, load_cluster, parse_spec
from launcher.plan.layout import Layout
from launcher.plan.memory import rank_memory
from launcher.task import task_of
from tests.support import run_ranks
from tests.unit.costs import measured_here

RANKS = Path(__file__).with_name("state_ranks.py")
PLAIN = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_embd": 30,
        "n_head": 3,
        "n_positions": 33,
        "vocab_size": 131,
        **PLAIN,
    },
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "hidden_size": 36,
        "intermediate_size": 55,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 101,
        "max_position_embeddings": 48,
    },
    "bert": {
        "model_type": "bert",
        "num_hidden_layers": 2,
        "hidden_size": 28,
        "num_attention_heads": 4,
        "intermediate_size": 45,
        "max_position_embeddings": 37,
        "vocab_size": 113,
    },
}
"""Sizes that no number of ranks divides; tied and untied heads."""
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
WORLDS = (1, 2, 3, 4)
FROZEN = {"freeze_blocks": 1, "freeze_embeddings": True}
CASES = [
    *((2, model, strategy, False) for model, strategy in product(MODELS, STRATEGIES)),
    *((3, "bert", strategy, False) for strategy in STRATEGIES),
    *((1, "llama", strategy, False) for strategy in ("ddp", "zero2", "zero3", "fsdp")),
    *((4, "gpt2", strategy, False) for strategy in (*STRATEGIES, "hsdp", "hpz")),
    *((3, "llama", strategy, True) for strategy in ("zero2", "zero3", "fsdp")),
]
"""Ranks, model, strategy, and whether a block and the embeddings are frozen."""


def spec_of(ranks: int, model: str, strategy: str, frozen: bool, folder: Path) -> dict[str, Any]:
    parallel: dict[str, Any] = {"strategy": strategy, "micro_batch_size": 1, "recompute": "none", "precision": "fp32"}
    if strategy in ("hsdp", "hpz"):
        parallel["shard_group_size"] = 2
    return {
        "output_dir": str(folder / "run"),
        "model": {"from_config": MODELS[model]},
        "task": {"name": "sequence_classification", "labels": ["one", "other"]} if model == "bert" else "causal_lm",
        "data": {"train": "none.txt"},
        "training": {"seq_len": 24, "global_batch_size": ranks, "max_steps": 1},
        "parallel": parallel,
        "cluster": {"name": "cpu", "gpus_per_node": ranks},
        **({"method": FROZEN} if frozen else {}),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def costs(root: Path) -> dict[tuple[str, bool], ModelCost]:
    """Measured once here, so that the ranks find them in the cache."""
    kinds = sorted({(model, frozen) for _, model, _, frozen in CASES})
    return {kind: cost_of(parse_spec(spec_of(1, kind[0], "ddp", kind[1], root))) for kind in kinds}


def cost_of(spec: JobSpec) -> ModelCost:
    """With the parameters that the spec's method trains, as the ranks apply it."""
    with measured_here():
        cost = cached_cost(spec)
    task = task_of(spec)
    with torch.device("meta"):
        config = model_config(spec, None, task.config_overrides)
        model = head_class(task.auto_class).from_config(config, dtype=torch.float32, trust_remote_code=False)
    model = apply_method(model, spec.method)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return dataclasses.replace(cost, num_trainable_params=trained, tensors=_tensors(model, blocks_of(model)))


@pytest.fixture(scope="module")
def held(root: Path, costs: dict[tuple[str, bool], ModelCost]) -> dict[Any, list[dict[str, int]]]:
    """By case, what each rank holds: one launch for each number of ranks."""
    paths = {case: root / str(case[0]) / f"{'-'.join(map(str, case))}.yaml" for case in CASES}
    for case, path in paths.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(spec_of(*case, root)))
    log = root / "log"
    folders = [str(root / str(ranks)) for ranks in WORLDS]
    assert run_ranks([sys.executable, str(RANKS), *folders], log, 600) == 0, log.read_text()[-6000:]
    return {
        case: [json.loads(path.with_suffix(f".{rank}.json").read_text()) for rank in range(case[0])]
        for case, path in paths.items()
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_state_is_exact_to_the_byte(
    held: dict[Any, list[dict[str, int]]], costs: dict[tuple[str, bool], ModelCost], case: Any
) -> None:
    """Parameters, masters, moments with their step counters, and the gradients that stay: of the rank that holds most."""
    ranks, model, strategy, frozen = case
    group = 2 if strategy in ("hsdp", "hpz") else 0
    layout = Layout(
        strategy, 1, ranks, 1, 2, 24, "none", "fp32", group
    )  # two passes: then gradients stay on one rank too
    items = {item.name: item.num_bytes for item in rank_memory(costs[model, frozen], load_cluster("cpu"), layout).items}
    most = {name: max(each[name] for each in held[case]) for name in held[case][0]}
    said = {name: items.get(name, 0) for name in most}
    assert most == said
    if strategy not in ("fsdp", "hsdp"):  # those cut by rows, so that the last ranks hold less
        assert all(each == most for each in held[case])
