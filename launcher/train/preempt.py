"""Told to stop: a signal sets a flag, the loop reads it at a step's end, all ranks agree in the step's own all-reduce.

Before the first step there is nothing to save, and loading or compiling a model may take minutes: a rank that is told
then leaves by itself.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""Slurm and the launchers send TERM. USR2 and not USR1 for `--signal`: NCCL may catch USR1."""
PATIENCE_SECONDS = 20.0
"""For a first step that is on its way."""


class StopFlag:
    """`requested` turns True at the first signal. A second TERM kills as usual, for a loop that hangs."""

    def __init__(self) -> None:
        self.requested = False
        self.has_begun = False
        """Whether a step was done: from then on it is the loop that leaves."""

    def install(self, leave: Callable[[], None] | None = None, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """leave: ends the process when nothing has begun; it is called in a thread, since compilers keep the main one."""
        for number in SIGNALS:
            signal.signal(number, self._request)
        if leave is not None:
            read, write = socket.socketpair()
            write.setblocking(False)
            signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)  # written in C, whatever Python is doing
            ends = (read, write)  # the thread keeps both open
            threading.Thread(target=self._wait, args=(ends, leave, patience_seconds), daemon=True).start()

    def _wait(self, ends: tuple[socket.socket, socket.socket], leave: Callable[[], None], patience: float) -> None:
        while True:
            heard = ends[0].recv(1)
            if not heard or self.has_begun:
                return
            if heard[0] in SIGNALS:
                break
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if self.has_begun:
                return
            time.sleep(0.2)
        leave()

    def _request(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else self._request)
