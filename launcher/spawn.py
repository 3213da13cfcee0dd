"""The one place that starts processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

_ROOT = Path(__file__).resolve().parents[1]


def run_python(module: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `python -m module` with this interpreter and collect its output as text.

    The module is found beside this one: `deepspeed launcher/run.py` works in a checkout that was never installed.
    """
    environment = {**os.environ, "PYTHONPATH": _python_path()}
    argv = [sys.executable, "-m", module]
    return subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, env=environment)


def _python_path() -> str:
    """This checkout first, so that modules are found beside this one."""
    return os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))


def start_python(module: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start `python -m module` with pipes to its standard input and output; it is to leave when its input ends."""
    argv = [sys.executable, "-m", module]
    told = {**os.environ, "PYTHONPATH": _python_path(), **environment}
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=told)


POLL_SECONDS = 0.5


def run_until_done(
    argv: Sequence[str],
    environment: Mapping[str, str],
    stop_when: Callable[[], bool] | None = None,
    output: IO[str] | None = None,
) -> int:
    """Run a launcher in the foreground and return its exit code.

    stop_when: asked twice a second; once it says yes the ranks are told to stop, which they do after saving.
    output: where what it writes goes, instead of to the screen.

    SIGTERM and SIGUSR2 are handed to the ranks themselves, past the launcher, and then waited for: the ranks save and
    leave. Told to stop, torchrun would kill them after 30 seconds, and DeepSpeed's runner leaves them running behind.
    """
    told = {**os.environ, "PYTHONPATH": _python_path(), **environment}
    child = subprocess.Popen(list(argv), env=told, stdout=output, stderr=output)
    forwarded = (signal.SIGTERM, signal.SIGUSR2)
    before = {
        number: signal.signal(number, lambda received, _: _signal_leaves(child.pid, received)) for number in forwarded
    }
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the ranks as well
    try:
        while stop_when is not None and child.poll() is None:
            if stop_when():
                _signal_leaves(child.pid, signal.SIGTERM)
                break
            time.sleep(POLL_SECONDS)
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A port that nothing on this machine listens on; two jobs started at once get two."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _signal_leaves(pid: int, number: int) -> None:
    """Signal the processes of the tree that have no children: the ranks, whatever launchers stand above them."""
    import psutil

    try:
        tree = psutil.Process(pid).children(recursive=True) or [psutil.Process(pid)]
        parents = {process.ppid() for process in tree}
        for process in tree:
            if process.pid not in parents:
                process.send_signal(number)
    except psutil.NoSuchProcess:
        return  # it has just ended by itself


def run_captured(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and collect its output as text."""
    return subprocess.run(list(argv), capture_output=True, text=True, check=False)


def sbatch(script: Path) -> subprocess.CompletedProcess[str]:
    """Hand a batch script to Slurm; stdout is the job's id. Raises `FileNotFoundError` where there is no sbatch."""
    return subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)


def run_ranks(
    module: str, num_ranks: int, arguments: Sequence[str], environment: Mapping[str, str], hear: Callable[[str], None]
) -> int:
    """Run `module` in ranks of this machine under torchrun; `hear` gets each line they write. Returns the exit code."""
    ranks = ["--standalone", "--nproc-per-node", str(num_ranks), "-m", module, *arguments]
    child = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *ranks],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": _python_path(), **environment},
    )
    assert child.stdout is not None
    for line in child.stdout:
        hear(line.rstrip())
    return child.wait()
