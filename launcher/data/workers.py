"""A function over many inputs, on worker processes that read and answer by pipe.

The processes belong to no process group of a training run and share nothing: a worker is told its function and
setting once, then one input after another. It leaves when its pipe ends, so none outlives a parent that was killed.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import IO, Any

from launcher.errors import FleetuneError
from launcher.spawn import start_python

_ENVIRONMENT = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
"""As many threads as processes: workers are counted in cores."""

_SIZE_BYTES = 8

MakeWork = Callable[[Any], Callable[[Any], Any]]
"""`make_work(setting)` is what is done to an item; a function or class of a module, so that a worker can import it."""


def run_over(make_work: MakeWork, setting: Any, items: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """`make_work(setting)(item)` of each item, in no order. With one worker, here; memory holds an item per worker.

    An error of the work or of `items` is raised here as it was there.
    """
    if num_workers == 1:
        yield from map(make_work(setting), items)
        return
    with _started(make_work, setting, num_workers) as workers:
        yield from _answers(workers, items)


def _answers(workers: list[_Worker], items: Iterable[Any]) -> Iterator[Any]:
    """One thread per worker takes items in turn; an error anywhere ends all."""
    source, lock, stop = iter(items), threading.Lock(), threading.Event()
    answers: SimpleQueue[tuple[str, Any]] = SimpleQueue()

    def serve(worker: _Worker) -> None:
        try:
            while not stop.is_set():
                with lock:
                    item = next(source)
                answers.put(("answer", worker.ask(item)))
        except StopIteration:
            pass
        except BaseException as error:  # noqa: BLE001  raised in the caller's thread
            answers.put(("error", error))
        finally:
            answers.put(("done", None))

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        yield from _until_done(answers, len(threads))
    finally:
        stop.set()


def _until_done(answers: SimpleQueue[tuple[str, Any]], num_threads: int) -> Iterator[Any]:
    while num_threads:
        kind, value = answers.get()
        if kind == "error":
            raise value
        if kind == "done":
            num_threads -= 1
        else:
            yield value


@contextmanager
def _started(make_work: MakeWork, setting: Any, num_workers: int) -> Iterator[list[_Worker]]:
    workers = [_Worker() for _ in range(num_workers)]
    try:
        for worker in workers:
            worker.send((make_work, setting))
        yield workers
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """The parent's side of one process."""

    def __init__(self) -> None:
        self._process = start_python(__name__, _ENVIRONMENT)

    def send(self, value: Any) -> None:
        assert self._process.stdin is not None
        try:
            _write(self._process.stdin, value)
        except BrokenPipeError:
            raise self._died() from None

    def ask(self, item: Any) -> Any:
        self.send(item)
        assert self._process.stdout is not None
        answer = _read(self._process.stdout)
        if answer is None:
            raise self._died()
        kind, value = answer
        if kind == "error":
            raise value
        return value

    def end(self) -> None:
        """Its work is done, or of no more use."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _died(self) -> FleetuneError:
        code = self._process.wait()
        reason = "perhaps for want of memory: try fewer --workers" if code == -signal.SIGKILL else "see above"
        return FleetuneError(f"a worker process ended with code {code}, {reason}; what it had finished is kept")


def _write(pipe: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(len(data).to_bytes(_SIZE_BYTES, "big") + data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> Any:
    """What the other side wrote, or None where it has left."""
    head = pipe.read(_SIZE_BYTES)
    data = pipe.read(int.from_bytes(head, "big")) if len(head) == _SIZE_BYTES else b""
    whole = len(head) == _SIZE_BYTES and len(data) == int.from_bytes(head, "big")
    return pickle.loads(data) if whole else None  # from our own child or parent only


def _serve() -> None:
    """The worker's side, until the pipe ends. What libraries print goes to the error stream, not into the answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    told, work = _read(sys.stdin.buffer), None
    while told is not None and (item := _read(sys.stdin.buffer)) is not None:
        try:
            work = work or told[0](told[1])
            answer = ("answer", work(item))
        except Exception as error:  # noqa: BLE001  raised again in the parent
            answer = ("error", error)
        _write(answers, answer)


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # the parent was killed while we worked
        _serve()
