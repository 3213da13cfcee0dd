"""When a checkpoint is due besides every so many steps: rank 0 looks at the clock and for a wish in the run's folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from launcher.job.spec import CheckpointSection

WISH = "save.now"
"""A file of this name in the output folder asks for a checkpoint; it is removed when one has begun."""


class Due:
    """Rank 0's; the others hear of it in the step's all-reduce."""

    def __init__(self, rule: CheckpointSection, run: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._rule, self._wish, self._clock = rule, run / WISH, clock
        self._started = self._saved = clock()

    def save(self) -> bool:
        every = self._rule.every_minutes
        late = every is not None and self._clock() - self._saved >= 60 * every
        return late or self._wish.exists()

    def stop(self) -> bool:
        limit = self._rule.stop_after_minutes
        return limit is not None and self._clock() - self._started >= 60 * limit

    def begun(self) -> None:
        """A save has begun: the clock starts again, and a wish is fulfilled."""
        self._saved = self._clock()
        self._wish.unlink(missing_ok=True)
