"""What a run leaves to read: a log per rank, `metrics.jsonl`, and on rank 0 a progress bar or plain lines."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launcher.train.trackers import Tracker, numbers
from launcher.units import show_count

METRICS = "metrics.jsonl"
LOG = logging.getLogger("fleetune")


def open_rank_log(output_dir: Path, rank: int) -> None:
    """Everything that is logged in this process goes to `logs/rank-RRRRR.log`; warnings of rank 0 to stderr as well."""
    folder = output_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / f"rank-{rank:05d}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(file)
    if rank == 0:
        shown = logging.StreamHandler(sys.stderr)
        shown.setLevel(logging.WARNING)
        shown.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        LOG.addHandler(shown)


class Reporter:
    """Rank 0's; the other ranks' reporters only log."""

    def __init__(
        self,
        output_dir: Path,
        is_first: bool,
        first_step: int,
        num_steps: int,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._trackers = trackers
        self._path = output_dir / METRICS if is_first else None
        self._console = Console(stderr=True, quiet=not is_first)
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (is_first and self._console.is_terminal),
        )
        self._bar = self._progress.add_task("train", total=num_steps, completed=first_step, note="")
        if self._path is not None:
            _forget_after(self._path, first_step)

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        for tracker in self._trackers:
            tracker.close()

    def advance(self, step: int) -> None:
        self._progress.update(self._bar, completed=step)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """One line of `metrics.jsonl`, on disk when this returns, and one on the screen."""
        LOG.info("%s %s", kind, values)
        if self._path is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")
        for tracker in self._trackers:
            tracker.log(numbers(kind, values), int(values["step"]))
        text = _shown(kind, values)
        if kind == "train":
            self._progress.update(self._bar, note=text)
        if kind != "train" or not self._console.is_terminal:
            self.say(f"{kind} step {values['step']}: {text}")

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def _shown(kind: str, values: dict[str, Any]) -> str:
    if kind != "train":
        return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))
    rate = f"{show_count(values['tokens_per_second'])} tokens/s"
    norm = values["grad_norm"]
    step = "not finite: skipped" if norm is None else f"grad norm {norm:.3g}"
    loss = "none" if values["loss"] is None else f"{values['loss']:.4f}"
    return f"loss {loss}  lr {values['lr']:.2e}  {step}  {rate}"


def _forget_after(path: Path, step: int) -> None:
    """A killed run may have recorded steps that no checkpoint holds; they are trained, and recorded, again."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(f"{line}\n" for line in kept))
    os.replace(partial, path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by the kill
