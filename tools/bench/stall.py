"""How long training stands still for a checkpoint: written behind the steps against written while it waits, in one run.

    python -m tools.bench stall --layers 12 --width 768

One rank on the CPU takes real steps of a GPT with random weights. `blocked` is the time in which no step can begin;
`slower` is what the steps taken while the checkpoint is written cost beyond the median of undisturbed ones (on a CPU
the writer and the steps share the cores; on an accelerator they do not).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from launcher.cost.cache import cached_cost
from launcher.errors import EXIT_DONE
from launcher.job import JobSpec, load_cluster, parse_spec
from launcher.job.spec import CheckpointSection
from launcher.plan import make_plan
from launcher.task import task_of
from launcher.train.engine import make_engine
from launcher.train.manifest import VERSION, Manifest
from launcher.train.saver import Saver
from launcher.units import show_bytes, show_time
from tools.bench._ranks import alone

VOCAB, LENGTH, ROWS = 8192, 128, 2


class Stall(NamedTuple):
    blocked_seconds: float
    slower_seconds: float
    written_seconds: float
    """From the call to the complete checkpoint."""

    @property
    def seconds(self) -> float:
        return self.blocked_seconds + self.slower_seconds


def spec_of(strategy: str, layers: int, width: int) -> JobSpec:
    config = {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": 8, "n_positions": LENGTH}
    return parse_spec(
        {
            "output_dir": "runs/x",
            "model": {"from_config": {**config, "vocab_size": VOCAB}},
            "task": "causal_lm",
            "data": {"train": "none.txt"},
            "training": {"seq_len": LENGTH, "global_batch_size": ROWS, "max_steps": 1},
            "parallel": {"strategy": strategy, "micro_batch_size": ROWS, "precision": "fp32", "recompute": "none"},
            "cluster": {"name": "cpu"},
        }
    )


class Trainer:
    """One rank that takes steps and saves."""

    def __init__(self, spec: JobSpec, folder: Path) -> None:
        import transformers

        self._task = task_of(spec)
        self._plan = make_plan(spec, cached_cost(spec), load_cluster("cpu"))
        config = spec.model.from_config
        assert isinstance(config, dict)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
        self.engine = make_engine(self._plan, spec, model.train(), self._task, torch.device("cpu"))
        self._folder, self._steps = folder, 0
        (folder / "hf").mkdir(parents=True)
        (folder / "hf" / "config.json").write_text(json.dumps(config))

    def step(self) -> float:
        """Seconds of one."""
        ids = torch.randint(VOCAB, (ROWS, LENGTH))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        start = time.perf_counter()
        self.engine.accumulate(batch, 1 / ids.numel(), is_last=True)
        self.engine.step(1e-4, self._steps)
        self._steps += 1
        return time.perf_counter() - start

    def saver(self, asynchronous: bool) -> Saver:
        rule = CheckpointSection(asynchronous=asynchronous, keep_last=1)
        return Saver(self._folder / "checkpoints", self._folder / "hf", self.engine, rule)

    def manifest(self) -> Manifest:
        plan = self._plan
        return Manifest(
            VERSION, self._steps, plan.chosen.strategy, plan.engine, 1, {"position": 0}, plan.digest(), {}, {}, {}
        )

    def stall(self, saver: Saver, usual_seconds: float) -> Stall:
        """Of one save, with steps until it is complete."""
        start = time.perf_counter()
        saver.save(self.manifest())
        blocked, slower = time.perf_counter() - start, 0.0
        while saver.is_writing:
            slower += self.step() - usual_seconds
        saver.wait()
        return Stall(blocked, max(0.0, slower), time.perf_counter() - start)


def measured(strategy: str, layers: int, width: int, repeats: int, folder: Path) -> dict[str, Any]:
    trainer = Trainer(spec_of(strategy, layers, width), folder / strategy)
    usual = statistics.median([trainer.step() for _ in range(8)][2:])
    found: dict[str, list[Stall]] = {"synchronous": [], "asynchronous": []}
    for _ in range(repeats):  # in turns, so that what else the machine does meets both
        for mode, stalls in found.items():
            stalls.append(trainer.stall(trainer.saver(mode == "asynchronous"), usual))
    sizes = [file.stat().st_size for file in (folder / strategy / "checkpoints").rglob("*") if file.is_file()]
    trainer.engine.close()
    middle = {mode: sorted(stalls, key=lambda one: one.seconds)[len(stalls) // 2] for mode, stalls in found.items()}
    whole = middle["synchronous"].blocked_seconds
    return {
        "strategy": strategy,
        "checkpoint_bytes": sum(sizes),
        "step_seconds": usual,
        **{mode: one._asdict() for mode, one in middle.items()},
        "blocked_ratio": middle["asynchronous"].blocked_seconds / whole,
        "stall_ratio": middle["asynchronous"].seconds / whole,
    }


def main(argv: list[str]) -> int:
    """Returns the exit code; times are printed, never judged."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench stall", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="saves of each kind")
    parser.add_argument("--strategy", action="append", choices=("ddp", "fsdp", "zero1", "zero2", "zero3"))
    parser.add_argument("--folder", type=Path, help="where it is written; left out, a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        with alone():
            rows = [
                measured(strategy, options.layers, options.width, options.repeats, folder)
                for strategy in options.strategy or ("ddp", "zero2", "zero3")
            ]
    finally:
        shutil.rmtree(folder)
    if options.json:
        sys.stdout.write(json.dumps({"cases": rows}, indent=1) + "\n")
        return EXIT_DONE
    for row in rows:
        sys.stdout.write(f"{row['strategy']}: checkpoint {show_bytes(row['checkpoint_bytes'])}, ")
        sys.stdout.write(f"step {show_time(row['step_seconds'])}\n")
        for mode in ("synchronous", "asynchronous"):
            times = {key.removesuffix("_seconds"): show_time(value) for key, value in row[mode].items()}
            sys.stdout.write(f"  {mode:<13}" + "  ".join(f"{key} {value}" for key, value in times.items()) + "\n")
        sys.stdout.write(f"  blocked {row['blocked_ratio']:.1%} of the synchronous save; ")
        sys.stdout.write(f"with what the steps lost beside the writer {row['stall_ratio']:.1%}\n")
    return EXIT_DONE
