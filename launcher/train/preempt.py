"""Told to stop: a signal sets a flag, the loop reads it at a step's end, all ranks agree in the step's own all-reduce."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""Slurm and the launchers send TERM. USR2 and not USR1 for `--signal`: NCCL may catch USR1."""


class StopFlag:
    """`requested` turns True at the first signal. A second TERM kills as usual, for a loop that hangs."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._request)

    def _request(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else self._request)
