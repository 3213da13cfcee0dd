"""Metrics to TensorBoard, W&B and MLflow, beside `metrics.jsonl`, where the spec asks for it. Rank 0 alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from launcher.job.spec import JobSpec

Values = dict[str, float]


class Tracker(NamedTuple):
    """What one of them is asked for."""

    log: Callable[[Values, int], None]
    """Numbers by name, of a step."""
    close: Callable[[], None]


def open_trackers(spec: JobSpec, first_step: int) -> list[Tracker]:
    """Those of `tracking.to`; a run that goes on is the same run there."""
    makers = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    return [makers[name](spec, first_step) for name in spec.tracking.to]


def numbers(kind: str, values: dict[str, Any]) -> Values:
    """`train/loss` and so on; what is no number is left out."""
    return {
        f"{kind}/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }


def _name(spec: JobSpec) -> str:
    return spec.tracking.run_name or Path(spec.output_dir).name


def _id(spec: JobSpec) -> str:
    """The same at every start of a run, and of no other on this machine."""
    return hashlib.blake2b(str(Path(spec.output_dir).absolute()).encode(), digest_size=8).hexdigest()


def _settings(spec: JobSpec) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(spec.model_dump_json())
    return settings


def _tensorboard(spec: JobSpec, first_step: int) -> Tracker:
    from torch.utils.tensorboard.writer import SummaryWriter

    folder = str(Path(spec.output_dir) / "tensorboard")
    writer = SummaryWriter(folder, purge_step=first_step + 1 if first_step else None)
    writer.add_text("spec", f"```\n{spec.model_dump_json(indent=1)}\n```", first_step)

    def log(values: Values, step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _wandb(spec: JobSpec, first_step: int) -> Tracker:
    import wandb

    run = wandb.init(
        project=spec.tracking.project,
        name=_name(spec),
        id=_id(spec),
        resume="allow",
        dir=spec.output_dir,
        config=_settings(spec),
    )
    return Tracker(lambda values, step: run.log(values, step=step), run.finish)


def _mlflow(spec: JobSpec, first_step: int) -> Tracker:
    """Where MLFLOW_TRACKING_URI says; a run that goes on is found by its tag."""
    import mlflow

    experiment = mlflow.set_experiment(spec.tracking.project)
    found = mlflow.search_runs(
        [experiment.experiment_id], f"tags.fleetune = '{_id(spec)}'", output_format="list", max_results=1
    )
    if found:
        mlflow.start_run(run_id=found[0].info.run_id)
    else:
        mlflow.start_run(run_name=_name(spec), tags={"fleetune": _id(spec)})
        mlflow.log_dict(_settings(spec), "spec.json")
    return Tracker(lambda values, step: mlflow.log_metrics(values, step=step), mlflow.end_run)
