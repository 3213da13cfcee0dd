"""`fleetune lr-find`: the loss while the learning rate rises by equal factors (Smith 2015), and what to take from it."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from launcher.command.options import AsJson, Overrides, SpecPath
from launcher.errors import EXIT_DONE, FleetuneError, UserError

SMOOTHING = 0.9
"""Weight of the losses before in the running mean that is judged; fastai's is 0.98 over more steps."""
DIVERGED = 4.0
"""Times the lowest loss, from where on nothing is learnt."""
FEWEST = 10
"""Steps from which something can be said."""


class Curve(NamedTuple):
    rates: list[float]
    losses: list[float]
    """Smoothed, up to where the loss diverged."""
    steepest: float
    """Rate at which the loss falls fastest."""
    lowest: float
    """Rate at the lowest loss: too high already."""

    @property
    def suggested(self) -> float:
        """The steepest, but at most a tenth of the lowest."""
        return min(self.steepest, self.lowest / 10)


def lr_find(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006
    start: Annotated[float, typer.Option("--from", help="Lowest learning rate.")] = 1e-7,
    end: Annotated[float, typer.Option("--to", help="Highest learning rate.")] = 1.0,
    steps: Annotated[int, typer.Option(min=FEWEST, help="Optimiser steps between them.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Train some steps with a rising learning rate, and suggest one; the run itself is not touched."""
    from launcher.job import load_spec
    from launcher.spawn import run_until_done

    if not 0 < start < end:
        raise UserError("--from", start, f"is not between 0 and --to {end:g}", "give e.g. --from 1e-7 --to 1")
    spec = load_spec(spec_path, overrides)
    folder = Path(spec.output_dir) / "lr-find"
    if folder.exists():
        shutil.rmtree(folder)
    told = [*overrides, *_range(spec.prepared_dir, str(folder), start, end, steps)]
    argv = [sys.executable, "-m", "launcher", "launch", str(spec_path)]
    code = run_until_done([*argv, *(word for one in told for word in ("--set", one))], {})
    rates, losses = _recorded(folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if len(losses) < FEWEST:
        if code not in (EXIT_DONE, 1):
            raise typer.Exit(code)
        raise FleetuneError(f"only {len(losses)} steps gave a finite loss: lower --from, or see {folder / 'logs'}")
    curve = judged(rates, losses)
    typer.echo(json.dumps(curve._asdict() | {"suggested": curve.suggested}) if as_json else _shown(curve))


def _range(prepared: str, folder: str, start: float, end: float, steps: int) -> list[str]:
    """The spec's own job, but for its length, its rates and what it leaves behind."""
    told: dict[str, Any] = {
        "output_dir": folder,
        "data.prepared": prepared,
        "training.max_steps": steps,
        "training.num_epochs": None,
        "training.schedule": "lr_range",
        "training.lr": end,
        "training.min_lr_ratio": start / end,
        "training.warmup_steps": 0,
        "training.warmup_ratio": 0.0,
        "training.warmup_tokens": 0,
        "training.lr_cycles": 1,
        "training.lr_power": 1.0,
        "training.decay_share": 0.2,
        "training.decay_shape": "cosine",
        "training.on_nonfinite": "stop",
        "evaluation": {"max_samples": 1},
        "checkpoint": {},
        "tracking": {"log_every_steps": 1},
    }
    return [f"{key}={json.dumps(value)}" for key, value in told.items()]


def _recorded(folder: Path) -> tuple[list[float], list[float]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [record for record in map(json.loads, lines) if record["kind"] == "train" and record["loss"] is not None]
    return [record["lr"] for record in records], [record["loss"] for record in records]


def judged(rates: list[float], losses: list[float]) -> Curve:
    """Smoothed losses, cut where they diverge; slopes are per factor of e in the rate."""
    smooth, mean = [], 0.0
    for step, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smooth.append(mean / (1 - SMOOTHING**step))
        if smooth[-1] > DIVERGED * min(smooth):
            break
    low = min(range(len(smooth)), key=lambda at: smooth[at])
    slopes = [
        (smooth[at + 1] - smooth[at - 1]) / math.log(rates[at + 1] / rates[at - 1])
        for at in range(1, max(2, min(low, len(smooth) - 1)))
    ]
    steepest = 1 + min(range(len(slopes)), key=lambda at: slopes[at])
    return Curve(rates[: len(smooth)], smooth, rates[steepest], rates[low])


def _shown(curve: Curve) -> str:
    """Twenty lines of the curve, and what follows."""
    width = max(curve.losses)
    every = max(1, len(curve.losses) // 20)
    lines = [
        f"{rate:9.2e}  {loss:8.4f}  {'█' * max(1, round(40 * loss / width))}"
        for rate, loss in list(zip(curve.rates, curve.losses, strict=True))[::every]
    ]
    said = f"falls fastest at {curve.steepest:.2e}, lowest at {curve.lowest:.2e}"
    return "\n".join([*lines, f"{said}; try --set training.lr={curve.suggested:.2g}"])
