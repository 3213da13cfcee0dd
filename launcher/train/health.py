"""What is watched while a run trains: numbers that are not finite, losses that jump, ranks that hang."""

from __future__ import annotations

import faulthandler
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher.errors import FleetuneError
from launcher.task import Batch, Row
from launcher.train.report import LOG

if TYPE_CHECKING:
    from launcher.train.start import Run

MOST_IN_A_ROW = 20
"""Updates left out one after another, with `on_nonfinite: skip`, after which weights or data are beyond help."""
SAMPLES_SHOWN = 16


class Nonfinite:
    """The answer to a step whose loss or gradient is NaN or infinite: stop or skip, as the spec says, with what it was."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._in_a_row = 0

    def answer(self, norm: float | None, step: int, batches: Sequence[Batch], rows: Callable[[], Any]) -> None:
        """All ranks together, after every step (number `step`, from 1). rows: this rank's micro-batches, read again.

        Raises `FleetuneError` where the run is to stop.
        """
        if norm is None or math.isfinite(norm):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        words = f"step {step}: the gradient norm is {norm}; {self._finding(batches, rows())}"
        if self._run.spec.training.on_nonfinite == "stop":
            way_out = "lower training.lr or training.max_grad_norm, look at these samples, or set training.on_nonfinite"
            raise FleetuneError(f"{words}: {way_out} to skip")
        if self._in_a_row >= MOST_IN_A_ROW:
            raise FleetuneError(f"{words}: {MOST_IN_A_ROW} updates in a row were left out; start from an earlier step")
        LOG.warning("%s; its update is left out", words)

    def _finding(self, batches: Sequence[Batch], rows: Sequence[Sequence[Row]]) -> str:
        """In words: the first layer whose output is not finite, else the first gradient, and the samples it was seen in."""
        mine: list[tuple[str | None, list[int]]] = []
        for batch, held in zip(batches, rows, strict=True):
            mine.append((self._first_layer(batch), [int(row["sample"]) for row in held if row["sample"] >= 0]))
        whole: list[Any] = [None] * self._run.world.num_ranks
        dist.all_gather_object(whole, (mine, self._run.engine.first_nonfinite))
        seen = [found for found, _ in whole for found in found]
        bad = [(layer, samples) for layer, samples in seen if layer is not None]
        samples = sorted(number for _, numbers in bad or seen for number in numbers)
        LOG.warning("samples of this step: %s", samples)
        shown = ", ".join(map(str, samples[:SAMPLES_SHOWN])) + (", ..." if len(samples) > SAMPLES_SHOWN else "")
        gradient = next((name for _, name in whole if name is not None), None)
        where = f"first in layer {bad[0][0]}" if bad else "the forward pass is finite"
        if not bad and gradient is not None:
            where += f", first in the gradient of {gradient}"
        return f"{where}, samples {shown}"

    def _first_layer(self, batch: Batch) -> str | None:
        """The first module, in the order of the forward pass, that gives out a number that is not finite."""
        found: list[str] = []

        def hook_of(name: str) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                if not found and any(not torch.isfinite(tensor).all() for tensor in _floats(output)):
                    found.append(name)

            return hook

        with ExitStack() as hooks:
            for name, module in self._run.model.named_modules():
                hooks.callback(module.register_forward_hook(hook_of(name or type(module).__name__)).remove)
            self._run.engine.evaluate({name: tensor.to(self._run.device) for name, tensor in batch.items()})
        return found[0] if found else None


def _floats(output: Any) -> list[torch.Tensor]:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else [output]
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


class Spikes:
    """Losses that lie far above those before: a running mean and deviation of the recorded losses."""

    MEMORY = 20
    """Records that the mean reaches back to, about; as many are seen before any is judged."""
    DEVIATIONS = 6.0
    """Of a normal loss one record in 1e9 is so far away."""

    def __init__(self) -> None:
        self._mean, self._square, self._count = 0.0, 0.0, 0

    def see(self, step: int, loss: float) -> bool:
        """Whether it is a spike, which is then logged and not learnt from."""
        deviation = math.sqrt(max(0.0, self._square - self._mean**2))
        is_spike = self._count >= self.MEMORY and loss > self._mean + self.DEVIATIONS * max(
            deviation, 1e-3 * abs(self._mean)
        )
        if is_spike:
            LOG.warning("step %d: the loss jumped to %.4g from about %.4g", step, loss, self._mean)
            return True
        self._count += 1
        share = max(1.0 / self._count, 1.0 / self.MEMORY)
        self._mean += share * (loss - self._mean)
        self._square += share * (loss**2 - self._square)
        return False


class Watchdog:
    """Writes the stack of every thread of this rank to a file when no progress is seen for some time.

    The timer is faulthandler's, a thread of C: it fires also where Python itself is stuck.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._seconds = path, seconds

    def __enter__(self) -> Watchdog:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a")
        self.seen()
        return self

    def seen(self) -> None:
        """There is progress: the time begins again."""
        faulthandler.dump_traceback_later(self._seconds, repeat=False, file=self._file)

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self._path.stat().st_size:
            self._path.unlink()
