"""The loop: take the step's rows, agree on how many targets count, accumulate, step, record, save.

The loss of a step is the sum over its valid targets divided by their number over all ranks and micro-batches, so it is
the same on any number of ranks and with any accumulation.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from launcher.cost.architecture import enable_recompute
from launcher.data.prepared import PreparedData, open_prepared
from launcher.data.stream import BatchStream, Prefetcher, eval_batches
from launcher.data.training import TrainingData, is_packed, open_training
from launcher.errors import CheckpointError, DataError, FleetuneError, Preempted
from launcher.job.spec import JobSpec
from launcher.plan.values import Plan
from launcher.task import Batch, Row, Task, task_of
from launcher.task.packed import collate_packed
from launcher.train.agree import decide_on_first
from launcher.train.base import ADAPTER, base_reference, check_same_base
from launcher.train.checkpoint import (
    check_same_layout,
    library_versions,
    load_rng,
    newest_complete,
    save_checkpoint,
    verify_checksums,
)
from launcher.train.engine import Engine, has_segments, make_engine
from launcher.train.leak_check import check_isolation
from launcher.train.manifest import VERSION, Manifest, Saved
from launcher.train.model import build_model
from launcher.train.optim import learning_rate
from launcher.train.peak import device_peaks
from launcher.train.preempt import StopFlag
from launcher.train.reference import Reference, reference_of
from launcher.train.report import LOG, Reporter
from launcher.train.world import World


@dataclass
class Run:
    """What the steps of one run share."""

    spec: JobSpec
    plan: Plan
    world: World
    device: torch.device
    task: Task
    data: PreparedData
    training: TrainingData
    model: Any
    engine: Engine
    num_steps: int
    stop: StopFlag
    hf_files: Path
    base: dict[str, Any] | None
    """Reference to the frozen weights that checkpoints leave out."""
    reference: Reference | None = None
    """What the answers of `preference` are measured against."""

    @property
    def checkpoints(self) -> Path:
        return Path(self.spec.output_dir) / "checkpoints"


class Position(NamedTuple):
    """Where the run stands. The samples are counted, not derived: the batch may change from one start to the next."""

    step: int
    samples: int


@dataclass
class Window:
    """Sums since the last record."""

    loss: torch.Tensor
    targets: float = 0.0
    tokens: float = 0.0
    data_wait_seconds: float = 0.0
    steps: int = 0
    started: float = 0.0

    @classmethod
    def new(cls, device: torch.device) -> Window:
        return cls(torch.zeros((), dtype=torch.float64, device=device), started=time.perf_counter())


def train(spec: JobSpec, plan: Plan, world: World, device: torch.device, stop: StopFlag) -> dict[str, float]:
    """Train to the end and return the last held-out scores. Raises `Preempted` after saving when told to stop."""
    saved = decide_on_first(lambda: _resume_point(spec, plan))
    data = decide_on_first(lambda: open_prepared(spec))
    decide_on_first(lambda: _open_training(spec, data, saved).end)  # plans the bins, before all ranks look for them
    run = _set_up(spec, plan, world, device, data, _open_training(spec, data, saved), stop)
    run.reference = reference_of(run, is_resumed=saved is not None)
    start = _restore(run, saved) if saved else Position(step=0, samples=0)
    if is_packed(spec):
        precision = run.plan.chosen.layout.precision
        check_isolation(run.engine, run.model, device, precision, data, spec.training.seq_len)
    with Reporter(Path(spec.output_dir), world.is_first, start.step, run.num_steps) as report:
        LOG.info(_opening(run, saved))
        report.say(_opening(run, saved))
        try:
            return _steps(run, start, report)
        finally:
            run.engine.close()


def _resume_point(spec: JobSpec, plan: Plan) -> Saved | None:
    root = Path(spec.output_dir) / "checkpoints"
    if not spec.checkpoint.resume and any(root.glob("step-*")):
        rule = "holds checkpoints of an earlier run, which would be overwritten"
        raise CheckpointError(
            "checkpoint.resume", False, f"{root} {rule}", "set it to true, or name another output_dir"
        )
    saved = newest_complete(root, LOG.warning)
    if saved is not None:
        check_same_layout(saved, plan.chosen.strategy, plan.engine, plan.num_ranks)
    return saved


def _open_training(spec: JobSpec, data: PreparedData, saved: Saved | None) -> TrainingData:
    return open_training(spec, data, saved.manifest.cursor if saved else None, date.today().isoformat())


def _set_up(
    spec: JobSpec,
    plan: Plan,
    world: World,
    device: torch.device,
    data: PreparedData,
    training: TrainingData,
    stop: StopFlag,
) -> Run:
    task = task_of(spec, data.facts(spec.task))
    model, frozen_from_base = build_model(spec, task, data)
    base = base_reference(str(spec.model.path)) if frozen_from_base else None
    if plan.chosen.layout.recompute == "full":
        enable_recompute(model)
    hf_files = Path(spec.output_dir) / "hf"
    decide_on_first(lambda: _write_hf_files(model, data, hf_files))
    num_steps = _num_steps(spec, training)
    engine = make_engine(plan, spec, model, task, device)
    torch.manual_seed(spec.seed + 1 + world.rank)  # dropout: another stream on every rank
    return Run(spec, plan, world, device, task, data, training, model, engine, num_steps, stop, hf_files, base)


def _num_steps(spec: JobSpec, training: TrainingData) -> int:
    size = spec.training.global_batch_size
    num_steps = spec.training.max_steps or math.ceil((spec.training.num_epochs or 0) * len(training.split) / size)
    if training.end is not None and num_steps * size > training.end:
        rule = f"needs more than the {training.end} samples that the mixture gives within its max_epochs"
        raise DataError("training.max_steps", num_steps, rule, f"at most {training.end // size}, or raise max_epochs")
    return num_steps


def _write_hf_files(model: Any, data: PreparedData, folder: Path) -> None:
    """Config and tokenizer of the trained model, and of its adapters: with the weights, all that inference needs."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    for adapter in getattr(model, "peft_config", {}).values():
        adapter.save_pretrained(folder / ADAPTER)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir, trust_remote_code=False)
    if has_segments(model.config) and "token_type_ids" not in tokenizer.model_input_names:
        # a tokenizer of ours does not know its model: now it gives pairs as the model learnt them
        tokenizer.model_input_names = [*tokenizer.model_input_names, "token_type_ids"]
    tokenizer.save_pretrained(folder)


def _restore(run: Run, saved: Saved) -> Position:
    verify_checksums(saved)
    check_same_base(saved.manifest.base, run.base, str(saved.folder))
    run.engine.load(saved.folder, with_frozen=saved.manifest.base is None)
    load_rng(saved)
    return Position(saved.manifest.step, run.training.cursor.position)


def _opening(run: Run, saved: Saved | None) -> str:
    whence = f"resuming from {saved.folder}" if saved else "starting"
    training = run.training
    samples = f"{len(training.split)} {'bins' if is_packed(run.spec) else 'samples'}, {training.num_tokens} tokens"
    return (
        f"{whence}: {run.plan.chosen.strategy} on {run.plan.num_ranks} ranks, plan {run.plan.digest()}, "
        f"{samples}, {run.num_steps} steps"
    )


def _steps(run: Run, start: Position, report: Reporter) -> dict[str, float]:
    spec, size = run.spec, run.spec.training.global_batch_size
    stream = BatchStream(
        run.training.split,
        run.training.order,
        size,
        run.world.rank,
        run.world.num_ranks,
        run.plan.chosen.layout.micro_batch_size,
        run.training.dealing,
        _pinned if run.device.type == "cuda" else None,
    )

    def make(position: int) -> list[Batch]:
        batches = [_collated(run, _referred(run, "train", rows)) for rows in stream.micro_batches(position)]
        if run.device.type != "cuda":
            return batches
        return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]

    window = Window.new(run.device)
    scores: dict[str, float] = {}
    step, position = start.step, start.samples
    with Prefetcher(make, position, size, position + (run.num_steps - step) * size) as steps:
        waiting_since = time.perf_counter()
        for batches in steps:
            window.data_wait_seconds += time.perf_counter() - waiting_since
            lr = learning_rate(spec.training, step - run.engine.num_skipped, run.num_steps)
            norm, stop = _step(run, batches, lr, window)
            step, position = step + 1, position + size
            report.advance(step)
            last = step == run.num_steps
            if step % spec.tracking.log_every_steps == 0 or last:
                _record(run, report, window, Position(step, position), lr, norm)
                window = Window.new(run.device)
            if _due(step, spec.evaluation.every_steps) or last:
                scores = evaluate(run, None if last else spec.evaluation.max_samples)
                report.record("evaluation", {"step": step, **scores})
            if _due(step, spec.checkpoint.every_steps) or last or stop:
                _save(run, Position(step, position))
            if stop and not last:
                raise Preempted(f"told to stop: saved after step {step}; start the same command again to go on")
            waiting_since = time.perf_counter()
    return scores or evaluate(run, None)


def _referred(run: Run, split: str, rows: Sequence[Row]) -> Sequence[Row]:
    return rows if run.reference is None else run.reference.attached(split, rows)


def _collated(run: Run, rows: Sequence[Row]) -> Batch:
    if is_packed(run.spec):
        return collate_packed(run.task.collate, rows, run.data.pad_id)
    return run.task.collate(rows, run.data.pad_id)


def _pinned(shape: tuple[int, int]) -> NDArray[np.int64]:
    """Memory that an accelerator copies from by itself; torch keeps what was used and gives it out again."""
    return torch.empty(shape, dtype=torch.int64, pin_memory=True).numpy()


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _step(run: Run, batches: Sequence[Batch], lr: float, window: Window) -> tuple[float | None, bool]:
    """One optimiser step; (gradient norm, None for a skipped step; whether any rank was told to stop)."""
    moved = [{name: tensor.to(run.device, non_blocking=True) for name, tensor in batch.items()} for batch in batches]
    num_targets, num_tokens, stops = _sum_over_ranks(
        run,
        [
            sum(run.task.num_valid(batch) for batch in batches),
            sum(int(batch["attention_mask"].sum()) for batch in batches),
            int(run.stop.requested),
        ],
    )
    scale = run.world.num_ranks / max(1.0, num_targets)  # engines average over ranks
    for number, batch in enumerate(moved, start=1):
        window.loss += run.engine.accumulate(batch, scale, is_last=number == len(moved)).double()
    norm = run.engine.step(lr)
    if norm is not None and not math.isfinite(norm):
        raise FleetuneError(
            f"the gradient norm became {norm}: lower training.lr or training.max_grad_norm; see the logs"
        )
    window.targets += num_targets
    window.tokens += num_tokens
    window.steps += 1
    return norm, stops > 0


def _sum_over_ranks(run: Run, values: list[float]) -> list[float]:
    sums = torch.tensor(values, dtype=torch.float64, device=run.device)
    dist.all_reduce(sums)
    return sums.tolist()


def _record(run: Run, report: Reporter, window: Window, at: Position, lr: float, norm: float | None) -> None:
    dist.all_reduce(window.loss)
    seconds = time.perf_counter() - window.started
    report.record(
        "train",
        {
            "step": at.step,
            "loss": window.loss.item() / max(1.0, window.targets),
            "lr": lr,
            "grad_norm": norm,
            "skipped_steps": run.engine.num_skipped,
            "tokens_per_second": window.tokens / seconds,
            "samples": at.samples,
            "seconds": seconds,
            "step_seconds": seconds / window.steps,
            **device_peaks(run.device),
            "data_wait_seconds": window.data_wait_seconds,
        },
    )


def evaluate(run: Run, max_samples: int | None) -> dict[str, float]:
    """Scores of the held-out samples, the same on any number of ranks; {} when nothing was held out."""
    if "validation" not in run.data.index["splits"]:
        return {}
    size = run.plan.chosen.layout.micro_batch_size
    split = run.data.split("validation")
    metrics = run.task.metrics(min(len(split), max_samples or len(split)))
    for rows in eval_batches(split, run.world.rank, run.world.num_ranks, size, max_samples):
        # every rank computes every batch: sharded parameters are gathered by all or by none
        held = _referred(run, "validation", rows or run.task.dummy_rows(1))
        batch = run.task.collate(held, run.data.pad_id)
        moved = {name: tensor.to(run.device) for name, tensor in batch.items()}
        metrics.update(run.engine.evaluate(moved), moved)
    sums = metrics.sums.to(run.device)
    dist.all_reduce(sums)
    metrics.sums = sums.cpu()
    return metrics.result()


def _save(run: Run, at: Position) -> None:
    spec = run.spec
    manifest = Manifest(
        version=VERSION,
        step=at.step,
        strategy=run.plan.chosen.strategy,
        engine=run.plan.engine,
        num_ranks=run.world.num_ranks,
        cursor=run.training.cursor_at(at.samples).to_json(),
        plan_digest=run.plan.digest(),
        spec=json.loads(spec.model_dump_json()),
        versions=library_versions(),
        files={},
        base=run.base,
    )
    folder = save_checkpoint(run.checkpoints, run.engine, manifest, run.hf_files, spec.checkpoint.keep_last)
    LOG.info("saved %s", folder)
