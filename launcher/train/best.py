"""The best held-out score so far: which checkpoint is kept for it, and when to stop waiting for a better one."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from launcher.errors import DataError
from launcher.job.spec import EvaluationSection
from launcher.job.tasks import LOWER_IS_BETTER


@dataclass
class Best:
    """Of `evaluation.metric`. All ranks hold the same, since scores are summed over ranks."""

    metric: str
    patience: int | None
    min_delta: float
    value: float | None = None
    step: int | None = None
    stale: int = 0
    """Evaluations since."""

    @classmethod
    def of(cls, evaluation: EvaluationSection, saved: dict[str, Any] | None) -> Best | None:
        """saved: what a checkpoint's manifest says; of another metric it means nothing."""
        if evaluation.metric is None:
            return None
        best = cls(evaluation.metric, evaluation.patience, evaluation.min_delta)
        if saved and saved["metric"] == evaluation.metric:
            best.value, best.step, best.stale = saved["value"], saved["step"], saved["stale"]
        return best

    def see(self, step: int, scores: dict[str, float]) -> bool:
        """Whether this is the best so far, by more than `min_delta`."""
        if self.metric not in scores:
            way_out = f"choose one of {', '.join(scores)}" if scores else "hold samples out: data.validation_fraction"
            raise DataError("evaluation.metric", self.metric, "is not scored on this data", way_out)
        found = scores[self.metric]
        sign = -1.0 if self.metric in LOWER_IS_BETTER else 1.0
        better = not math.isnan(found) and (self.value is None or sign * (found - self.value) > self.min_delta)
        if better:
            self.value, self.step, self.stale = found, step, 0
        else:
            self.stale += 1
        return better

    @property
    def is_exhausted(self) -> bool:
        return self.patience is not None and self.stale >= self.patience

    def to_json(self) -> dict[str, Any]:
        kept = ("metric", "value", "step", "stale")
        return {key: value for key, value in asdict(self).items() if key in kept}
