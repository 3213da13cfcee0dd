"""What the model thought of both answers before it was trained: the reference of `preference`, two numbers per sample.

Computed through the engine itself before the first step, when its weights are the ones that the run starts from, and
kept in `<output_dir>/reference`. So no second model stands beside the trained one, on any engine; with adapters, which
add nothing before they are trained, the reference is the frozen model beneath them, without having to switch them off.
A run that goes on reads what was kept, and computes what is missing before its checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from launcher.data.order import Ints
from launcher.data.stream import RowSource
from launcher.task import Batch, Row, TokenScores
from launcher.task.preference import Preference
from launcher.train.agree import decide_on_first

if TYPE_CHECKING:
    from launcher.train.start import Run

Scores = NDArray[np.float64]
"""(samples of a split, 2): log-probability in nats of the chosen and of the rejected answer; nan where not computed."""


class Reference:
    """Scores by split."""

    def __init__(self, scores: dict[str, Scores]) -> None:
        self._scores = scores

    def attached(self, split: str, rows: Sequence[Row]) -> list[Row]:
        """The rows with their `reference`; one that is no sample (of a rank that has run out) keeps its own."""
        scores = self._scores[split]
        return [row if row["sample"] < 0 else {**row, "reference": tuple(scores[row["sample"]])} for row in rows]


def reference_of(run: Run, is_resumed: bool) -> Reference | None:
    """The reference of a run whose engine still holds the weights it starts from; None for a task without one."""
    if not isinstance(run.task, Preference):
        return None
    splits: dict[str, tuple[RowSource, Ints]] = {"train": (run.training.split, _ids_to_come(run))}
    if "validation" in run.data.index["splits"]:
        held_out = run.data.split("validation")
        splits["validation"] = (held_out, np.arange(len(held_out)))
    folder = Path(run.spec.output_dir) / "reference"
    return Reference({name: _scores(run, folder / f"{name}.npy", *split, is_resumed) for name, split in splits.items()})


def _ids_to_come(run: Run) -> Ints:
    num_drawn = run.num_steps * run.spec.training.global_batch_size
    if num_drawn >= len(run.training.split):
        return np.arange(len(run.training.split))
    return np.unique(run.training.order.samples(0, num_drawn))


def _scores(run: Run, path: Path, split: RowSource, ids: Ints, is_resumed: bool) -> Scores:
    kept = decide_on_first(lambda: _kept(path, len(split)) if is_resumed else None)
    scores = np.full((len(split), 2), np.nan) if kept is None else kept
    missing = ids[np.isnan(scores[ids, 0])]
    if len(missing):
        scores[missing] = _computed(run, split, missing)
        decide_on_first(lambda: _keep(path, scores))
    return scores


def _kept(path: Path, num_samples: int) -> Scores | None:
    if not path.is_file():
        return None
    scores: Scores = np.load(path, allow_pickle=False)
    return scores if scores.shape == (num_samples, 2) else None


def _keep(path: Path, scores: Scores) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp.npy")
    np.save(partial, scores)
    partial.replace(path)


def _computed(run: Run, split: RowSource, ids: Ints) -> Scores:
    """(len(ids), 2), the ranks taking turns; every rank computes as many batches as any other."""
    task, rank, size = run.task, run.world.rank, run.plan.chosen.layout.micro_batch_size
    assert isinstance(task, Preference)
    found = np.zeros((len(ids), 2))
    for start in range(0, len(ids), size * run.world.num_ranks):
        mine = np.arange(start + rank, min(start + size * run.world.num_ranks, len(ids)), run.world.num_ranks)
        rows = split.rows(ids[mine]) if len(mine) else task.dummy_rows(1)
        logps = answer_logps(task, rows, run.data.pad_id, run.device, run.engine.score)
        if len(mine):
            found[mine] = logps
    whole = torch.from_numpy(found).to(run.device)
    dist.all_reduce(whole)
    return np.asarray(whole.cpu().numpy())


def answer_logps(
    task: Preference,
    rows: Sequence[Row],
    pad_id: int,
    device: torch.device,
    answers_of: Callable[[Batch], torch.Tensor | TokenScores],
) -> Scores:
    """Log-probabilities of both answers of each row, by a model that is not trained."""
    batch = {name: tensor.to(device) for name, tensor in task.collate(rows, pad_id).items()}
    return np.asarray(task.answer_logps(answers_of(batch), batch).double().cpu().numpy())
