"""The one place that starts processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

_ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = _ROOT / "launcher" / "run.py"
NODE_FILE = _ROOT / "launcher" / "node.py"


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


class Ranks:
    """A launcher in the foreground, and the ranks below it; left, nothing of it is alive.

    SIGTERM and SIGUSR2 are handed to the ranks themselves as SIGUSR2, past the launcher: the ranks save and leave. Told to
    stop, torchrun would kill them, and DeepSpeed's runner leaves them running behind. The signal is sent again until they
    have left, since one that comes while a rank is still loading Python's modules would be lost.
    """

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], output: IO[str] | None = None) -> None:
        self._argv, self._output = list(argv), output
        self._environment = {**os.environ, "PYTHONPATH": _python_path(), **environment}
        self._stop_asked = self._down_since = 0.0

    def __enter__(self) -> Ranks:
        ignored = {number: signal.signal(number, signal.SIG_IGN) for number in _STOPPING}
        # The launcher begins with the stop signals ignored, as some Slurm plug-ins send them to every process.
        self._child = subprocess.Popen(self._argv, env=self._environment, stdout=self._output, stderr=self._output)
        self._before = {
            **ignored,
            signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        }  # ranks get a terminal's
        for number in _STOPPING:
            signal.signal(number, lambda *_: self.stop())
        return self

    def __exit__(self, *_: object) -> None:
        if self._child.poll() is None:
            _kill_tree(self._child.pid)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop(self) -> None:
        """Ask the ranks to save and leave."""
        self._stop_asked = self._stop_asked or time.monotonic()

    def take_down(self, at_once: bool = False) -> None:
        """Give the ranks some seconds to leave by themselves, then kill them."""
        self._down_since = self._down_since or time.monotonic()
        if at_once:
            self._down_since -= TAKE_DOWN_SECONDS

    def wait(self, look: Callable[[int], None] = lambda _: None) -> int:
        """The launcher's exit code. look: is called with its process id a few times a second."""
        told = 0.0
        while True:
            try:
                return self._child.wait(timeout=_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                look(self._child.pid)
            now = time.monotonic()
            if self._stop_asked and now - told > _SAY_AGAIN_SECONDS:
                told = now
                for pid in ranks_below(self._child.pid) or {self._child.pid: 0}:
                    _signal(pid, signal.SIGUSR2)
            if self._down_since and now - self._down_since > TAKE_DOWN_SECONDS:
                look(self._child.pid)
                _kill_tree(self._child.pid)


def run_until_done(
    argv: Sequence[str],
    environment: Mapping[str, str],
    stop_when: Callable[[], bool] | None = None,
    output: IO[str] | None = None,
    look: Callable[[int], None] = lambda _: None,
) -> int:
    """Run a launcher in the foreground, stop signals handed on as `Ranks` does; its exit code.

    stop_when: asked a few times a second; once it says yes the ranks are told to stop, which they do after saving.
    output: where what it writes goes, instead of to the screen.
    look: is called as often, with the launcher's process id.
    """
    with Ranks(argv, environment, output) as ranks:

        def asked(pid: int) -> None:
            look(pid)
            if stop_when is not None and stop_when():
                ranks.stop()

        return ranks.wait(asked)


_STOPPING = (signal.SIGTERM, signal.SIGUSR2)
_LOOK_SECONDS = 0.4
_SAY_AGAIN_SECONDS = 5.0
TAKE_DOWN_SECONDS = 8.0
"""Ranks whose peer is gone mostly notice it themselves and say so; those that hang in a collective do not."""


def ranks_below(pid: int) -> dict[int, int]:
    """Process id -> rank, of the living ranks in the tree of a launcher, or the launcher itself where it is the rank."""
    import psutil

    found = {}
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return {}
    for process in tree:
        try:
            words = process.cmdline()
            # A launcher names the file too, as one of its own arguments: Python runs the first that is no option.
            if process.status() != psutil.STATUS_ZOMBIE and str(RUN_FILE) in words[1:3] and "-m" not in words[1:3]:
                found[process.pid] = int(process.environ().get("RANK", "0"))
        except (psutil.Error, ValueError):
            continue
    return found


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _kill_tree(pid: int) -> None:
    import psutil

    try:
        launcher = psutil.Process(pid)
        tree = [*launcher.children(recursive=True), launcher]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def count_gpus() -> int:
    """CUDA devices that a rank could take here, asked of torch in a process of its own, since it takes seconds to load."""
    argv = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    said = subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()
    return int(said) if said.isdigit() else 0


def free_port() -> int:
    """A port that nothing on this machine listens on; two jobs started at once get two."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Leash:
    """Programs that read a script from their standard input and live while it is open; `stop` on it asks them to save."""

    def __init__(self, programs: Sequence[tuple[Sequence[str], str]]) -> None:
        """programs: (argv, script) of each."""
        self._programs = programs
        self._children: list[subprocess.Popen[bytes]] = []
        self._down_at = float("inf")

    def __enter__(self) -> Leash:
        self._before = {number: signal.signal(number, lambda *_: self.stop()) for number in (*_STOPPING, signal.SIGINT)}
        for argv, script in self._programs:
            # A session of its own: a terminal's Ctrl-C reaches ranks as a wish to stop, not the ssh that holds them.
            child = subprocess.Popen(list(argv), stdin=subprocess.PIPE, start_new_session=True)
            self._children.append(child)
            self._write(child, script)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            self._let_go(child)
        for child in self._children:
            child.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def codes(self) -> list[int | None]:
        if time.monotonic() > self._down_at:
            for child in self._children:
                self._let_go(child)
        return [child.poll() for child in self._children]

    def stop(self) -> None:
        for child in self._children:
            self._write(child, "stop\n")

    def take_down_later(self) -> None:
        """The nodes take each other down; one that does not is let go, and ends itself."""
        self._down_at = min(self._down_at, time.monotonic() + 2 * TAKE_DOWN_SECONDS)

    @staticmethod
    def _write(child: subprocess.Popen[bytes], text: str) -> None:
        assert child.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has left
            child.stdin.write(text.encode())
            child.stdin.flush()

    @staticmethod
    def _let_go(child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None
        with contextlib.suppress(OSError):
            child.stdin.close()


def has_program(name: str) -> bool:
    return shutil.which(name) is not None


def run_captured(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and collect its output as text."""
    return subprocess.run(list(argv), capture_output=True, text=True, check=False)


def sbatch(script: Path, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Hand a batch script to Slurm; stdout is the job's id. Raises `FileNotFoundError` where there is no sbatch."""
    return subprocess.run(["sbatch", "--parsable", *options, str(script)], capture_output=True, text=True, check=False)


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
