"""The start of a run: where it goes on from, its data, model and engine, and all that its steps share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from launcher.cost.architecture import enable_recompute
from launcher.data.prepared import PreparedData
from launcher.data.training import TrainingData, is_packed, open_training
from launcher.errors import CheckpointError, DataError
from launcher.job.spec import JobSpec
from launcher.plan.values import Plan
from launcher.task import Task, task_of
from launcher.train.agree import decide_on_first
from launcher.train.base import base_reference, check_same_base
from launcher.train.best import Best
from launcher.train.by_name import open_state
from launcher.train.checkpoint import load_rng, newest_unaltered, restore_interrupted
from launcher.train.due import Due
from launcher.train.engine import Engine, make_engine
from launcher.train.health import Watchdog
from launcher.train.keep import in_use
from launcher.train.manifest import Manifest, Saved
from launcher.train.model import build_model
from launcher.train.model_files import write_model_files
from launcher.train.noise import add_noise
from launcher.train.preempt import StopFlag
from launcher.train.reference import Reference
from launcher.train.report import LOG
from launcher.train.schedule import Schedule
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
    schedule: Schedule
    stop: StopFlag
    due: Due
    hf_files: Path
    base: dict[str, Any] | None
    """Reference to the frozen weights that checkpoints leave out."""
    watchdog: Watchdog
    best: Best | None
    """The best held-out score so far, where the spec says of what."""
    skipped_before: int = 0
    """Updates left out before this start that its engine knows nothing of."""
    reference: Reference | None = None
    """What the answers of `preference` are measured against."""

    @property
    def num_steps(self) -> int:
        return self.schedule.num_steps

    @property
    def num_skipped(self) -> int:
        """Updates left out: of scaled gradients that overflowed, or of what was not finite."""
        return self.skipped_before + self.engine.num_skipped

    @property
    def checkpoints(self) -> Path:
        return Path(self.spec.output_dir) / "checkpoints"


class Position(NamedTuple):
    """Where the run stands. The samples are counted, not derived: the batch may change from one start to the next."""

    step: int
    samples: int


def resume_point(spec: JobSpec) -> Saved | None:
    """The checkpoint to go on from, read once and found unaltered. All ranks together."""
    root = Path(spec.output_dir) / "checkpoints"
    decide_on_first(lambda: _check_may_start(spec, root))
    return newest_unaltered(root, LOG.warning)


def _check_may_start(spec: JobSpec, root: Path) -> None:
    restore_interrupted(root)
    if spec.checkpoint.resume == "never" and any(root.glob("step-*")):
        rule = "holds checkpoints of an earlier run, which would be overwritten"
        way_out = "set it to auto, or name another output_dir"
        raise CheckpointError("checkpoint.resume", "never", f"{root} {rule}", way_out)


def opened_training(spec: JobSpec, data: PreparedData, saved: Saved | None) -> TrainingData:
    cursor = saved.manifest.cursor if saved and not _asks_anew(spec, saved, "fresh_data", True) else None
    return open_training(spec, data, cursor, date.today().isoformat())


def _asks_anew(spec: JobSpec, saved: Saved, key: str, value: Any) -> bool:
    """Whether a fresh part is asked for that the checkpoint's own run had not been asked for: it is given once."""
    was = saved.manifest.spec.get("checkpoint", {}).get(key)
    return bool(getattr(spec.checkpoint, key) == value and was != value)


def set_up(
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
    decide_on_first(lambda: write_model_files(model, data, hf_files))
    tokens_per_sample = training.num_tokens / len(training.split)
    schedule = Schedule.of(spec.training, _num_steps(spec, training), tokens_per_sample)
    if spec.training.neftune_noise_alpha is not None:
        add_noise(model, spec.training.neftune_noise_alpha)
    engine = make_engine(plan, spec, model, task, device)
    torch.manual_seed(spec.seed + 1 + world.rank)  # dropout: another stream on every rank
    watchdog = Watchdog(Path(spec.output_dir) / "logs" / f"stacks-{world.rank:05d}.txt", spec.tracking.hang_seconds)
    due = Due(spec.checkpoint, Path(spec.output_dir))
    facts = (spec, plan, world, device, task, data, training)
    return Run(*facts, model, engine, schedule, stop, due, hf_files, base, watchdog, None)


def _num_steps(spec: JobSpec, training: TrainingData) -> int:
    size = spec.training.global_batch_size
    num_steps = spec.training.max_steps or math.ceil((spec.training.num_epochs or 0) * len(training.split) / size)
    if training.end is not None and num_steps * size > training.end:
        rule = f"needs more than the {training.end} samples that the mixture gives within its max_epochs"
        raise DataError("training.max_steps", num_steps, rule, f"at most {training.end // size}, or raise max_epochs")
    return num_steps


def restore(run: Run, saved: Saved) -> Position:
    check_same_base(saved.manifest.base, run.base, str(saved.folder))
    with in_use(saved.folder):
        _load(run, saved)
        load_rng(saved)
    run.skipped_before = saved.manifest.skipped_steps - run.engine.num_skipped
    return Position(saved.manifest.step, run.training.cursor.position)


def _load(run: Run, saved: Saved) -> None:
    """By the engine that wrote it where the layout is the same, else by name."""
    manifest, with_frozen = saved.manifest, saved.manifest.base is None
    weights_only = _asks_anew(run.spec, saved, "resume", "weights_only")
    if not weights_only and _is_own_layout(manifest, run.plan):
        run.engine.load(saved.folder, with_frozen)
        return
    state = open_state(saved.folder, "zero" if manifest.engine == "deepspeed" else "dcp")
    run.engine.adopt(state, manifest.step, with_frozen, with_optimizer=not weights_only)


def _is_own_layout(manifest: Manifest, plan: Plan) -> bool:
    """torch DCP reshards by itself; DeepSpeed reads files of the stage, offload and ranks that wrote them."""
    if manifest.engine != plan.engine:
        return False
    if plan.engine == "torch":
        return True
    if plan.chosen.layout.offload_optimizer != "nvme" and manifest.plan_digest != plan.digest():
        return False
    return manifest.strategy == plan.chosen.strategy and manifest.num_ranks == plan.num_ranks


def opening(run: Run, saved: Saved | None) -> str:
    whence = f"resuming from {saved.folder}" if saved else "starting"
    training = run.training
    samples = f"{len(training.split)} {'bins' if is_packed(run.spec) else 'samples'}, {training.num_tokens} tokens"
    return (
        f"{whence}: {run.plan.chosen.strategy} on {run.plan.num_ranks} ranks, plan {run.plan.digest()}, "
        f"{samples}, {run.num_steps} steps"
    )
