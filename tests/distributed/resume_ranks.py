"""Body of the ranks of test_resume: every engine saves after three steps and goes on; every other takes it over.

`resume_ranks.py FOLDER`: imports once and forks the ranks of each world, first of those that save, then of those that
take over. Writes `<case>.json`, a list of losses, into FOLDER.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers

from launcher.cost.trainable import apply_method
from launcher.plan import make_plan
from launcher.spawn import free_port
from launcher.task import task_of
from launcher.train.by_name import open_state
from launcher.train.engine import make_engine
from launcher.train.world import World, start_process_group
from tests.unit.costs import cluster_of, laid_out, small_cost, spec_of

STEPS, ROWS, LENGTH = 3, 12, 10
PLAIN = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Case(NamedTuple):
    model: str
    strategy: str
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.strategy}-{self.ranks}"


MODELS = ("gpt2", "llama", "lora", "frozen")
"""Tied; untied; adapters without their base; one block and the embeddings frozen."""
SAVERS = [Case("gpt2", strategy, ranks) for strategy, ranks in (("zero1", 2), ("zero2", 3), ("zero3", 2), ("fsdp", 2))]
SAVERS += [Case(model, strategy, 2) for model in MODELS[1:] for strategy in ("zero2", "zero3", "fsdp")]
LOADERS = {1: ("zero3", "ddp"), 2: ("zero1", "fsdp"), 3: ("zero2", "zero3"), 4: ("hsdp", "hpz")}


def pairs(ranks: int) -> list[tuple[Case, Case]]:
    """(saver, loader) of a world; the models beside gpt2 change engine and world at once, on 1 and 3 ranks."""
    return [
        (saver, Case(saver.model, strategy, ranks))
        for saver in SAVERS
        for strategy in LOADERS[ranks]
        if saver.model == "gpt2" or (ranks == 3 and strategy == "zero2") or (ranks == 1 and strategy == "ddp")
        if (saver.strategy, saver.ranks) != (strategy, ranks)
    ]


def with_control(ranks: int) -> tuple[bool, ...]:
    """On one rank, a second time with a fresh optimiser."""
    return (True, False) if ranks == 1 else (True,)


def main() -> int:
    import deepspeed  # noqa: F401 - here, and not once in every rank

    folder = Path(sys.argv[1])
    for ranks in sorted({saver.ranks for saver in SAVERS}):
        start(ranks, lambda ranks=ranks: save_all(folder, ranks))
    for ranks in LOADERS:
        start(ranks, lambda ranks=ranks: load_all(folder, ranks))
    return 0


def start(num_ranks: int, body: Callable[[], None]) -> None:
    port, fork = free_port(), multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run, args=(body, rank, num_ranks, port)) for rank in range(num_ranks)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise SystemExit(1)


def run(body: Callable[[], None], rank: int, num_ranks: int, port: int) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ.update({name: str(value) for name, value in {**names, "MASTER_PORT": port}.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    warnings.simplefilter("ignore")
    start_process_group(World.detect(os.environ), torch.device("cpu"))
    body()
    dist.destroy_process_group()


def save_all(folder: Path, ranks: int) -> None:
    for saver in (saver for saver in SAVERS if saver.ranks == ranks):
        engine, task = made(saver, seed=0, weight_decay=0.1)
        steps(engine, task, 0)
        engine.save(folder / saver.name, with_frozen=saver.model != "lora")
        write(folder, saver.name, steps(engine, task, STEPS))
        engine.close()


def load_all(folder: Path, ranks: int) -> None:
    """The engine that takes over starts from other weights and another weight decay: both must be the saver's."""
    for saver, loader in pairs(ranks):
        for with_optimizer in with_control(ranks):
            engine, task = made(loader, seed=1, weight_decay=0.4)
            state = open_state(folder / saver.name, "zero" if (folder / saver.name / "zero").is_dir() else "dcp")
            engine.adopt(state, STEPS, with_frozen=loader.model != "lora", with_optimizer=with_optimizer)
            name = f"{saver.name}--{loader.strategy}-{ranks}" + ("" if with_optimizer else "-weights")
            write(folder, name, steps(engine, task, STEPS))
            engine.close()


def made(case: Case, seed: int, weight_decay: float) -> tuple[Any, Any]:
    strategy = {"hpz": "zero3", "hsdp": "fsdp"}.get(case.strategy, case.strategy)
    spec = spec_of(
        cluster={"gpus_per_node": case.ranks},
        parallel={"strategy": strategy, "micro_batch_size": ROWS // case.ranks},
        training__global_batch_size=ROWS,
        training__weight_decay=weight_decay,
        **method_of(case.model),
    )
    group = 2 if case.strategy in ("hpz", "hsdp") else 0
    plan = laid_out(make_plan(spec, small_cost(), cluster_of(10**9)), strategy=case.strategy, shard_group_size=group)
    task = task_of(spec)
    return make_engine(plan, spec, model_of(case, spec, seed), task, torch.device("cpu")), task


def method_of(model: str) -> dict[str, Any]:
    if model == "lora":
        return {"method": {"name": "lora", "r": 3, "lora_alpha": 60.0}}
    return {"method": {"freeze_blocks": 1, "freeze_embeddings": True}} if model == "frozen" else {}


def model_of(case: Case, spec: Any, seed: int) -> Any:
    """Sizes that no number of ranks divides."""
    torch.manual_seed(0 if case.model == "lora" else seed)
    if case.model == "llama":
        config: Any = transformers.LlamaConfig(
            vocab_size=53, hidden_size=20, intermediate_size=27, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=False,
        )  # fmt: skip
        model: Any = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(vocab_size=53, n_embd=18, n_layer=2, n_head=2, n_positions=16, **PLAIN)
        model = transformers.GPT2LMHeadModel(config)
    torch.manual_seed(seed)
    return apply_method(model, spec.method).train()


def steps(engine: Any, task: Any, first: int) -> list[float]:
    """The losses of `STEPS` steps, each over all ranks."""
    losses, rank, world = [], dist.get_rank(), dist.get_world_size()
    for step in range(first, first + STEPS):
        ids = torch.randint(53, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))[rank::world].contiguous()
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        num_targets = ROWS * (LENGTH - 1)
        loss = engine.accumulate(batch, world / num_targets, is_last=True).double()
        engine.step(1e-2 / (1 + step), step)
        dist.all_reduce(loss)
        losses.append(loss.item() / num_targets)
    return losses


def write(folder: Path, name: str, losses: list[float]) -> None:
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    raise SystemExit(main())
