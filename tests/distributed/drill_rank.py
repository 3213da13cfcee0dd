"""Body of test_save_drills: one save, cut at each system call that matters, in a forked process each.

Counted while a save is running: opening, writing, syncing, making, renaming and removing files and folders. At the
chosen one the process is killed (a write is cut in its middle), or the disk is full from there on. Nothing of the
product knows of this: the calls are wrapped here, in the forked process.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.job.spec import CheckpointSection
from launcher.plan import make_plan
from launcher.task import task_of
from launcher.train.engine import make_engine
from launcher.train.manifest import VERSION, Manifest
from launcher.train.saver import Saver
from tests.unit.costs import cluster_of, laid_out, small_cost, spec_of
from tests.unit.test_torch_engine import batch, model

FULL_DISK_SEES = ("open", "write", "mkdir", "fsync", "sendfile")
"""What a full disk refuses; names can still be changed and removed."""


class Fault:
    """Counts; at number `at` it kills or fills the disk."""

    def __init__(self, at: int | None, kind: str) -> None:
        self.at, self.kind, self.count, self.full, self.names = at, kind, 0, False, list[str]()

    def meets(self, name: str, half: Callable[[], Any] | None = None) -> None:
        self.count += 1
        self.names.append(name)
        if self.count == self.at and self.kind == "kill":
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "full" and self.at is not None and self.count >= self.at:
            self.full = True
        if self.full and name in FULL_DISK_SEES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Torn:
    """A file that is open for writing."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self._file, self._fault = file, fault

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._fault.meets("write", half)
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)


def install(fault: Fault) -> None:
    real_open = io.open

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not any(letter in mode for letter in "wax+"):
            return real_open(path, mode, *args, **kwargs)
        fault.meets("open")
        return Torn(real_open(path, mode, *args, **kwargs), fault)

    io.open = builtins.open = opened  # type: ignore[assignment]
    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "sendfile"):
        setattr(os, name, counted(getattr(os, name), name, fault))


def counted(real: Callable[..., Any], name: str, fault: Fault) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        fault.meets(name)
        return real(*args, **kwargs)

    return called


def manifest(step: int, engine: Any) -> Manifest:
    name = "deepspeed" if engine.folder_name == "zero" else "torch"
    cursor = {"position": 2 * step}
    return Manifest(VERSION, step, "ddp", name, 1, cursor, "0123456789ab", {}, {}, {})


def engine_of(strategy: str) -> Any:
    parallel = {"strategy": strategy, "micro_batch_size": 2}
    spec = spec_of(cluster={"gpus_per_node": 1}, parallel=parallel, training__global_batch_size=2)
    plan = laid_out(make_plan(spec, small_cost(), cluster_of(10**9)))
    engine = make_engine(plan, spec, model(), task_of(spec), torch.device("cpu"))
    advance(engine, 0)
    return engine


def advance(engine: Any, step: int) -> None:
    engine.accumulate(batch(step), 1 / 22, is_last=True)
    engine.step(1e-2, step)


def one(folder: Path, strategy: str, engine: Any, fault: Fault) -> dict[str, Any]:
    """A first save, the one with the fault, and after a full disk, with room again, another."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine = engine or engine_of(strategy)
    hf = folder / "hf"
    hf.mkdir(parents=True)
    (hf / "config.json").write_text("{}")
    saver = Saver(folder / "checkpoints", hf, engine, CheckpointSection(keep_last=1))
    saver.save(manifest(1, engine))
    saver.wait()
    install(fault)
    error = attempted(saver, engine)
    reached, fault.at, fault.full = fault.count, None, False
    if error is not None:
        saver.save(manifest(3, engine))
        saver.wait()
    return {"points": reached, "names": fault.names[:reached], "error": error}


def attempted(saver: Saver, engine: Any) -> str | None:
    """The second save, the next step going on while it is written; what went wrong."""
    try:
        saver.save(manifest(2, engine))
        advance(engine, 1)
        saver.wait()
    except Exception as error:  # noqa: BLE001 - told to the parent, who judges it
        return f"{type(error).__name__}: {error}"
    return None


def drill(root: Path, strategy: str, engine: Any, at: int | None, kind: str) -> dict[str, Any]:
    """In a forked process; (how it ended, what it says)."""
    folder = root / f"{strategy}-{kind}-{at}"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            said = one(folder, strategy, engine, Fault(at, kind))
            os.write(os.open(folder / "said.json", os.O_WRONLY | os.O_CREAT), json.dumps(said).encode())
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    said_path = folder / "said.json"
    said = json.loads(said_path.read_text()) if said_path.is_file() else {}
    return {"folder": folder.name, "killed": os.WIFSIGNALED(status), "code": status, "at": at, **said}


def points(names: list[str]) -> list[int]:
    """Numbers of the calls to cut: all but the writes between the first and the last to a file, and some of these."""
    around = zip(names, [None, *names], [*names[1:], None], strict=False)
    ends = {
        at for at, (name, before, after) in enumerate(around, 1) if name != "write" or before != name or after != name
    }
    return sorted(ends | set(range(1, len(names) + 1, max(1, len(names) // 12))))


def main() -> int:
    """`drill_rank.py ROOT STRATEGY STRIDE`: every STRIDE-th point, killed and full; writes `<strategy>.json`."""
    root, strategy, stride = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if strategy == "ddp":
        engine = engine_of(strategy)  # needs no process group on one rank, so it is built once
    else:
        import deepspeed  # noqa: F401 - here, and not once in every process

        engine = None
        names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    whole = drill(root, strategy, engine, None, "kill")
    results = [whole]
    for kind in ("kill", "full"):
        results += [drill(root, strategy, engine, at, kind) for at in points(whole["names"])[::stride]]
    (root / f"{strategy}.json").write_text(json.dumps(results))
    shutil.rmtree(root / whole["folder"], ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
