"""The one place that starts processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence


def run_python(module: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `python -m module` with this interpreter and collect its output as text."""
    return subprocess.run([sys.executable, "-m", module], input=stdin, capture_output=True, text=True, check=False)


def run_until_done(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a launcher in the foreground and return its exit code.

    SIGTERM, SIGUSR2 and Ctrl-C are handed on, and the child is waited for: it saves before it leaves.
    """
    child = subprocess.Popen(list(argv), env={**os.environ, **environment})
    forwarded = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    before = {number: signal.signal(number, lambda received, _: child.send_signal(received)) for number in forwarded}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
