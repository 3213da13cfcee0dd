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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from launcher.data.prepared import open_prepared
from launcher.data.stream import BatchStream, Prefetcher, eval_batches
from launcher.data.training import is_packed
from launcher.errors import Preempted
from launcher.job.spec import JobSpec
from launcher.job.tasks import LOWER_IS_BETTER
from launcher.plan.values import Plan
from launcher.task import Batch, Row
from launcher.task.packed import collate_packed
from launcher.train.agree import decide_on_first
from launcher.train.best import Best
from launcher.train.checkpoint import library_versions
from launcher.train.health import Nonfinite, Spikes
from launcher.train.leak_check import check_isolation
from launcher.train.manifest import VERSION, Manifest
from launcher.train.peak import device_peaks, host_peak
from launcher.train.preempt import StopFlag
from launcher.train.reference import reference_of
from launcher.train.report import LOG, METRICS, Reporter
from launcher.train.saver import Saver
from launcher.train.start import Position, Run, opened_training, opening, restore, resume_point, set_up
from launcher.train.trackers import open_trackers
from launcher.train.world import World


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
    saved = resume_point(spec)
    data = decide_on_first(lambda: open_prepared(spec))
    decide_on_first(lambda: opened_training(spec, data, saved).end)  # plans the bins, before all ranks look for them
    run = set_up(spec, plan, world, device, data, opened_training(spec, data, saved), stop)
    run.best = Best.of(spec.evaluation, saved.manifest.best if saved else None)
    run.reference = reference_of(run, is_resumed=saved is not None)
    start = restore(run, saved) if saved else Position(step=0, samples=0)
    if is_packed(spec):
        precision = run.plan.chosen.layout.precision
        check_isolation(run.engine, run.model, device, precision, data, spec.training.seq_len)
    greater = spec.evaluation.metric not in LOWER_IS_BETTER
    saver = Saver(run.checkpoints, run.hf_files, run.engine, spec.checkpoint, greater)
    trackers = open_trackers(spec, start.step) if world.is_first else []
    with run.watchdog, Reporter(Path(spec.output_dir), world.is_first, start.step, run.num_steps, trackers) as report:
        LOG.info(opening(run, saved))
        report.say(opening(run, saved))
        try:
            _score_what_is_owed(run, report, start.step)
            scores = _steps(run, start, report, saver)
            saver.wait()
            return scores
        finally:
            run.engine.close()


def _steps(run: Run, start: Position, report: Reporter, saver: Saver) -> dict[str, float]:
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

    window, nonfinite, spikes = Window.new(run.device), Nonfinite(run), Spikes()
    scores: dict[str, float] = {}
    step, position, cut_short = start.step, start.samples, False
    ends = step if run.best is not None and run.best.is_exhausted else run.num_steps
    with Prefetcher(make, position, size, position + (ends - step) * size) as steps:
        waiting_since = time.perf_counter()
        for batches in steps:
            window.data_wait_seconds += time.perf_counter() - waiting_since
            run.watchdog.seen()
            lr = run.schedule.rate(step - run.num_skipped)
            norm, asked, stop = _step(run, batches, lr, step, window)
            run.stop.has_begun = True
            nonfinite.answer(norm, step + 1, batches, lambda: stream.micro_batches(position))  # noqa: B023
            step, position = step + 1, position + size
            report.advance(step)
            last, better, score = step == run.num_steps, False, None
            if step % spec.tracking.log_every_steps == 0 or last:
                _record(run, report, window, Position(step, position), lr, norm, spikes)
                window = Window.new(run.device)
            if _due(step, spec.evaluation.every_steps) or last:
                scores, cut_short = _scored(run, report, step)
                better = run.best is not None and not cut_short and run.best.see(step, scores)
                score = scores[run.best.metric] if run.best is not None and not cut_short else None
                last = last or (run.best is not None and run.best.is_exhausted)
            if _due(step, spec.checkpoint.every_steps) or last or stop or better or asked or cut_short:
                _save(run, Position(step, position), score, saver)
            if last and not cut_short:
                break
            if stop or cut_short:
                saver.wait()
                raise Preempted(f"told to stop: saved after step {step}; start the same command again to go on")
            waiting_since = time.perf_counter()
    if step > start.step:
        _say_end(run, report, step)
    return scores or evaluate(run, None)


def _say_end(run: Run, report: Reporter, step: int) -> None:
    """Whether it ended early, and where the best checkpoint is."""
    if step < run.num_steps:
        report.say(
            f"stopped early after step {step} of {run.num_steps}: {run.spec.evaluation.patience} evaluations no better"
        )
    if run.best is not None and run.best.step is not None:
        report.record("best", run.best.to_json())
        report.say(f"best: {run.checkpoints / f'step-{run.best.step:08d}'}; fleetune convert --best takes it")


def _scored(run: Run, report: Reporter, step: int) -> tuple[dict[str, float], bool]:
    """The scores of a step, recorded; or none of them, and that ranks were told to stop meanwhile."""
    try:
        scores = evaluate(run, None if step == run.num_steps else run.spec.evaluation.max_samples)
    except _CutShort:
        return {}, True
    report.record("evaluation", {"step": step, **scores})
    return scores, False


def _score_what_is_owed(run: Run, report: Reporter, step: int) -> None:
    if not decide_on_first(lambda: _is_owed(run, step)):
        return
    scores, cut_short = _scored(run, report, step)
    if cut_short:
        raise Preempted(f"told to stop while scoring step {step}; start the same command again to go on")
    if run.best is not None:
        run.best.see(step, scores)


def _is_owed(run: Run, step: int) -> bool:
    """Whether the step that is gone on from was to be scored, and was not: its evaluation was cut short."""
    if step == 0 or not (_due(step, run.spec.evaluation.every_steps) or step == run.num_steps):
        return False
    path = Path(run.spec.output_dir) / METRICS
    kinds = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return not any(line["kind"] == "evaluation" and line["step"] == step for line in kinds)


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


def _step(
    run: Run, batches: Sequence[Batch], lr: float, number: int, window: Window
) -> tuple[float | None, bool, bool]:
    """One optimiser step; (gradient norm, None for a skipped step; whether to save; whether to save and stop)."""
    moved = [{name: tensor.to(run.device, non_blocking=True) for name, tensor in batch.items()} for batch in batches]
    num_targets, num_tokens, saves, stops = _sum_over_ranks(
        run,
        [
            sum(run.task.num_valid(batch) for batch in batches),
            sum(int(batch["attention_mask"].sum()) for batch in batches),
            int(run.world.is_first and run.due.save()),
            int(run.stop.requested or (run.world.is_first and run.due.stop())),
        ],
    )
    scale = run.world.num_ranks / max(1.0, num_targets)  # engines average over ranks
    loss = torch.zeros_like(window.loss)
    for number, batch in enumerate(moved, start=1):
        loss += run.engine.accumulate(batch, scale, is_last=number == len(moved)).double()
    norm = run.engine.step(lr, number)
    if norm is None or math.isfinite(norm):  # a loss that is not finite would hide all others of the window
        window.loss += loss
        window.targets += num_targets
    window.tokens += num_tokens
    window.steps += 1
    return norm, saves > 0, stops > 0


def _sum_over_ranks(run: Run, values: list[float]) -> list[float]:
    sums = torch.tensor(values, dtype=torch.float64, device=run.device)
    dist.all_reduce(sums)
    return sums.tolist()


def _record(
    run: Run, report: Reporter, window: Window, at: Position, lr: float, norm: float | None, spikes: Spikes
) -> None:
    dist.all_reduce(window.loss)
    seconds = time.perf_counter() - window.started
    loss = window.loss.item() / window.targets if window.targets else None
    predicted = run.plan.chosen.step_time
    report.record(
        "train",
        {
            "step": at.step,
            "loss": loss,
            "loss_spike": loss is not None and spikes.see(at.step, loss),
            "lr": lr,
            "grad_norm": norm if norm is None or math.isfinite(norm) else None,
            "skipped_steps": run.num_skipped,
            "tokens_per_second": window.tokens / seconds,
            # (6 P + 12 L h T) FLOPs per token over the peak of all ranks, as the plan counts it; padding is not work
            "mfu": predicted.mfu * window.tokens / seconds / predicted.tokens_per_second,
            "samples": at.samples,
            "seconds": seconds,
            "step_seconds": seconds / window.steps,
            **device_peaks(run.device),
            **host_peak(run.device),
            "data_wait_seconds": window.data_wait_seconds,
        },
    )


_ASK_EVERY = 16
"""Batches of an evaluation between two questions whether to stop: a forward pass each, so a second or two."""


class _CutShort(Exception):
    """All ranks together: one was told to stop."""


def evaluate(run: Run, max_samples: int | None) -> dict[str, float]:
    """Scores of the held-out samples, the same on any number of ranks; {} when nothing was held out."""
    if "validation" not in run.data.index["splits"]:
        return {}
    size = run.plan.chosen.layout.micro_batch_size
    split = run.data.split("validation")
    metrics = run.task.metrics(min(len(split), max_samples or len(split)))
    batches = eval_batches(split, run.world.rank, run.world.num_ranks, size, max_samples)
    for number, rows in enumerate(batches, start=1):
        if number % _ASK_EVERY == 0 and _sum_over_ranks(run, [int(run.stop.requested)])[0]:
            raise _CutShort
        # every rank computes every batch: sharded parameters are gathered by all or by none
        held = _referred(run, "validation", rows or run.task.dummy_rows(1))
        batch = run.task.collate(held, run.data.pad_id)
        moved = {name: tensor.to(run.device) for name, tensor in batch.items()}
        run.watchdog.seen()
        metrics.update(run.engine.evaluate(moved), moved)
    sums = metrics.sums.to(run.device)
    dist.all_reduce(sums)
    metrics.sums = sums.cpu()
    return metrics.result()


def _save(run: Run, at: Position, score: float | None, saver: Saver) -> None:
    spec = run.spec
    if run.world.is_first:
        run.due.begun()
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
        best=run.best.to_json() if run.best is not None else None,
        skipped_steps=run.num_skipped,
        score=score,
    )
    saver.save(manifest)
    run.watchdog.seen()
