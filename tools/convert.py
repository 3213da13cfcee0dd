"""Turns a sharded checkpoint into a folder that any inference stack opens, one tensor in memory at a time.

    python -m tools.convert zero:runs/a/checkpoints/step-00000020 hf:out --dtype bf16

Layouts are known by `launcher/stored`, models by `tools/formats`; this file decides what is written, in which order, and that OUT appears whole or
not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TransferSpeedColumn
from rich.progress import Progress as ProgressBar

from launcher.errors import ABSENT, EXIT_DONE, EXIT_OURS, CheckpointError, UserError
from launcher.stored.dcp import DcpSource
from launcher.stored.tensors import Progress, TensorEntry, TensorSource
from launcher.stored.zero import ZeroSource
from launcher.train.manifest import read_saved
from tools.adapter import OPENERS, MergedSource, has_adapter, read_adapted, write_adapter
from tools.averages import MovingAverage, best_step, mean_of_last
from tools.formats.expected import Expected, check_tied, choose, expected_tensors
from tools.formats.hf import (
    DTYPE_NAMES,
    HfSink,
    Shard,
    copy_side_files,
    fsync_folder,
    plan_shards,
    read_config,
    write_json,
    write_side_files,
)
from tools.formats.locate import Checkpoint, Kind, locate, verify

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_SHARD_BYTES = 5 * 10**9  # the 5GB of save_pretrained before transformers 5; small enough for any file system
CHECKED_AT_ONCE = 2**20  # elements; isfinite makes copies, which must stay small beside the largest tensor
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class ConvertResult:
    """What was written."""

    folder: Path
    architecture: str
    num_tensors: int
    num_bytes: int
    """Of values, in all shards."""
    num_files: int
    """Shards."""
    library: str = "transformers"
    """That has the class `architecture`."""

    def sentence(self) -> str:
        opened = f"{self.library}.{self.architecture}.from_pretrained({json.dumps(str(self.folder))})"
        opener = f"import {self.library}; m = {opened}"
        size = f"{self.num_tensors} tensors, {self.num_bytes} bytes, {self.num_files} file(s)"
        return f"wrote {self.folder}: {size}; open it: python -c {shlex.quote(opener)}"


def convert(
    source: str,
    target: str,
    *,
    dtype: str | None = None,
    shard_size_bytes: int = DEFAULT_SHARD_BYTES,
    config_dir: str | Path | None = None,
    merge: bool = False,
    base_dir: str | Path | None = None,
    best: bool = False,
    ema: bool = False,
    average: int = 1,
    progress: Progress | None = None,
) -> ConvertResult:
    """`source` (`zero:DIR`, `dcp:DIR` or a recognisable `DIR`) to `target` (`hf:OUT`).

    `dtype` (fp32, bf16, fp16) casts floating tensors; None keeps them as stored. A run with adapters becomes a PEFT
    folder, or with `merge` the whole model, for which `base_dir` says where the base weights lie now. `best` takes the
    checkpoint that the run names as the best, `ema` its moving average of the weights, `average` the mean of so many of
    the newest checkpoints.
    Raises CheckpointError for whatever is wrong with the input; OUT then does not exist.
    """
    report = progress or _silent
    kind, path = _split(source, get_args(Kind))
    out = Path(_split(target, ("hf",))[1])
    _check_options(dtype, shard_size_bytes)
    if sum((best, ema, average > 1)) > 1 and not (best and ema):
        raise CheckpointError(
            "--average", average, "is a choice of checkpoints of its own", "give it without the others"
        )
    _check_target(out)
    checkpoint = locate(best_step(Path(path)) if best else Path(path), cast(Kind | None, kind))
    configs = _config_dir(checkpoint, Path(config_dir) if config_dir else None)
    if merge and not has_adapter(configs):
        raise CheckpointError("--merge", ABSENT, f"{path} holds no adapters", "leave it out")
    tensors = _open_source(checkpoint, report)
    if ema:
        tensors = MovingAverage(checkpoint, tensors)
    elif average > 1:
        tensors = mean_of_last(Path(path), average, lambda found: _open_source(found, report))
    opened = Opened(checkpoint, configs, tensors, _base(checkpoint, base_dir))
    if has_adapter(configs) and not merge:
        return _write_adapter(opened, out, dtype)
    plan = _plan(opened, dtype, shard_size_bytes)
    with _appearing(out, plan.num_bytes) as folder:
        _write(plan, folder, report)
    return ConvertResult(out, plan.expected.architecture, len(plan.chosen), plan.num_bytes, len(plan.shards))


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first byte is written."""

    source: TensorSource
    chosen: dict[str, str]
    """Name to write -> name to read."""
    shards: list[Shard]
    expected: Expected
    config_dir: Path
    config: dict[str, Any]

    @property
    def entries(self) -> dict[str, TensorEntry]:
        return {name: entry for shard in self.shards for name, entry in shard.tensors.items()}

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most bytes are in."""
        sizes: Counter[torch.dtype] = Counter()
        for entry in self.entries.values():
            sizes[entry.dtype] += entry.num_bytes * entry.dtype.is_floating_point
        return sizes.most_common(1)[0][0]


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was found whole."""

    checkpoint: Checkpoint
    configs: Path
    source: TensorSource
    base: dict[str, Any] | None
    """Reference to the frozen weights that the checkpoint does not hold."""

    @property
    def where(self) -> str:
        return str(self.checkpoint.folder)


def _open_source(checkpoint: Checkpoint, report: Progress) -> TensorSource:
    """Checked as well. Our own are vouched for by a manifest, others by the CRC-32 of each record."""
    if checkpoint.step_dir is not None:
        verify(checkpoint, report)
    source: TensorSource = ZeroSource(checkpoint.folder) if checkpoint.kind == "zero" else DcpSource(checkpoint.folder)
    if checkpoint.step_dir is None:
        _check_records(source, report)
    return source


def _base(checkpoint: Checkpoint, given: str | Path | None) -> dict[str, Any] | None:
    base = read_saved(checkpoint.step_dir).manifest.base if checkpoint.step_dir is not None else None
    if base is None and given is not None:
        raise CheckpointError("--base", str(given), "is not needed: the checkpoint holds every weight", "leave it out")
    return {**base, "folder": str(given)} if base and given else base


def _write_adapter(opened: Opened, out: Path, dtype: str | None) -> ConvertResult:
    """A PEFT folder: the adapters, and the tokenizer beside them."""
    if opened.base is None:
        rule = "holds adapters of a base model that exists only in this checkpoint"
        raise CheckpointError(opened.where, ABSENT, rule, "write the merged model: --merge")
    adapted = read_adapted(opened.source, opened.configs, opened.where)
    num_bytes = sum(tensor.numel() * 4 for tensor in adapted.tensors.values())
    with _appearing(out, num_bytes) as folder:
        written, num_bytes = write_adapter(adapted, opened.base, folder, DTYPES[dtype] if dtype else None)
        copy_side_files(opened.configs, folder)
    task = str(adapted.model.peft_config["default"].task_type)
    return ConvertResult(out, OPENERS.get(task, "AutoPeftModel"), written, num_bytes, 1, library="peft")


def _plan(opened: Opened, dtype: str | None, shard_bytes: int) -> Plan:
    configs, source, where = opened.configs, opened.source, opened.where
    config = read_config(configs)
    if has_adapter(configs):
        source = MergedSource(source, configs, opened.base, where)
    expected = expected_tensors(configs, config)
    chosen = choose(source.tensors, source.aliases, expected, where)
    check_tied(source, chosen, expected, where)
    entries = {name: _written_as(source.tensors[kept], dtype, name) for name, kept in chosen.items()}
    return Plan(source, chosen, plan_shards(entries, shard_bytes), expected, configs, config)


def _config_dir(checkpoint: Checkpoint, given: Path | None) -> Path:
    found = given or checkpoint.config_dir
    if found is None:
        rule = "comes without a config.json"
        way_out = "name the folder with the model's config and tokenizer: --config DIR"
        raise CheckpointError(str(checkpoint.folder), ABSENT, rule, way_out)
    return found


def _check_records(source: TensorSource, report: Progress) -> None:
    records = source.records()
    done, total = 0, sum(record.num_bytes for record in records)
    for record in records:
        record.check()
        done += record.num_bytes
        report("checking", done, total)


def _written_as(entry: TensorEntry, dtype: str | None, name: str) -> TensorEntry:
    """The entry after the cast, which is for floating tensors only: an index or a mask keeps its type."""
    if entry.dtype not in DTYPE_NAMES:
        raise CheckpointError(name, str(entry.dtype), "cannot be held by safetensors", "save the model without it")
    return TensorEntry(entry.shape, DTYPES[dtype]) if dtype and entry.dtype.is_floating_point else entry


def _write(plan: Plan, folder: Path, report: Progress) -> None:
    """The one loop that moves values: read, cast, write, forget."""
    sink, done = HfSink(folder, plan.shards), 0
    with closing(sink):
        for name, entry in plan.entries.items():
            sink.write(name, _cast(plan.source.read(plan.chosen[name]), entry.dtype, name))
            done += entry.num_bytes
            report("writing", done, plan.num_bytes)
        write_side_files(plan.config_dir, plan.config, plan.dtype, folder)
        generation = plan.expected.generation_config
        if generation is not None and not (folder / "generation_config.json").exists():
            write_json(folder / "generation_config.json", generation)
        sink.finish()


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """To `dtype`; a finite weight that fp16 cannot hold would become infinite without a word."""
    if tensor.dtype == dtype:
        return tensor
    narrow = tensor.to(dtype)
    pieces = zip(tensor.reshape(-1).split(CHECKED_AT_ONCE), narrow.reshape(-1).split(CHECKED_AT_ONCE), strict=True)
    if any(bool((wide.isfinite() & ~short.isfinite()).any()) for wide, short in pieces):
        rule = f"holds values beyond the range of {dtype} (largest {tensor.abs().max():.3g})"
        raise CheckpointError(name, ABSENT, rule, "use --dtype bf16 or fp32")
    return narrow


def _check_options(dtype: str | None, shard_bytes: int) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError("--dtype", dtype, "is not a dtype that is written", f"use one of {', '.join(DTYPES)}")
    if shard_bytes < 1:
        raise CheckpointError("--shard-size", shard_bytes, "is not a positive size", "e.g. 5GB")


def _check_target(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise CheckpointError(str(out), ABSENT, "exists and is not an empty folder", "name another, or remove it first")


@contextmanager
def _appearing(out: Path, num_bytes: int) -> Iterator[Path]:
    """A folder beside `out` that is renamed to `out` when the body succeeds and removed when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes:
        raise CheckpointError(
            str(out), ABSENT, f"needs {num_bytes} bytes, the disk has {free} free", "name another disk"
        )
    folder = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        fsync_folder(folder)
        folder.rename(out)
        fsync_folder(out.parent)
    finally:
        if folder.exists():  # not renamed: an error, or Ctrl-C
            shutil.rmtree(folder)


def _split(text: str, known: tuple[str, ...]) -> tuple[str | None, str]:
    """`zero:DIR` -> ("zero", "DIR"); without a prefix (None, text)."""
    prefix, colon, rest = text.partition(":")
    if colon and prefix in known:
        return prefix, rest
    if colon and re.fullmatch(r"[a-z0-9_]+", prefix) and not Path(text).exists():
        raise CheckpointError(text, prefix, "is not a format that can stand here", f"use {' or '.join(known)}")
    return None, text


def _silent(_what: str, _done: int, _total: int) -> None:
    """No progress is shown when nobody asked for it."""


def parse_size(text: str) -> int:
    """`5GB`, `200 MiB`, `1000` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise CheckpointError("--shard-size", text, "is not a size", "e.g. 5GB, 500MB or 2GiB")
    return int(float(match[1]) * unit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.convert", description=str(__doc__).partition("\n")[0])
    parser.add_argument("source", metavar="SRC", help="zero:DIR or dcp:DIR; a fleetune run or step needs no prefix")
    parser.add_argument("target", metavar="DST", help="hf:OUT, a folder that does not exist yet")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="cast floating tensors; default: as stored (fp32 masters)"
    )
    parser.add_argument("--shard-size", default="5GB", help="largest size of one weights file (default: %(default)s)")
    parser.add_argument("--config", metavar="DIR", help="folder with config.json and tokenizer, if the source has none")
    parser.add_argument("--merge", action="store_true", help="adapters: write the model with them merged into it")
    parser.add_argument("--best", action="store_true", help="the checkpoint with the best held-out score")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (training.ema_decay)")
    parser.add_argument("--average", type=int, default=1, metavar="N", help="the mean of the last N checkpoints")
    parser.add_argument("--base", metavar="DIR", help="adapters: folder of the base model, where it has moved")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)
    columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with ProgressBar(*columns, console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, TaskID] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what)
                bar.update(tasks[what], completed=done, total=total)

            result = convert(
                options.source,
                options.target,
                dtype=options.dtype,
                shard_size_bytes=parse_size(options.shard_size),
                config_dir=options.config,
                merge=options.merge,
                base_dir=options.base,
                best=options.best,
                ema=options.ema,
                average=options.average,
                progress=show,
            )
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:  # a disk that is full or not ours: no fault of the input, and no traceback helps
        sys.stderr.write(f"error: {error.filename or options.target}: {error.strerror}\n")
        return EXIT_OURS
    sys.stdout.write(result.sentence() + "\n")
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main())
