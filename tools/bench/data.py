"""`python -m tools.bench data`: shuffled reading of tokens from local disk, against the loaders that others use.

The same random tokens, in each loader's own format, one loader after another, each in a process of its own. The peers
live in an environment that is made on the first run; it sees this one's torch and numpy, so that all use the same.
`memmap` is the limit: a bare gather and a cast. Figures are of this machine at this moment: run it on an idle one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import sysconfig
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launcher.data.mapped import PreparedSplit
from launcher.data.order import GlobalOrder
from launcher.data.pack import best_fit
from launcher.data.shards import Schema, write_json, write_split
from launcher.data.stream import BatchStream
from launcher.errors import DataError
from launcher.job.resources import cache_dir
from launcher.spawn import run_captured
from launcher.task.block import TokenBlock

PEERS = ("litdata==0.2.76", "mosaicml-streaming==0.13.0", "grain==0.2.18")
NEEDED = (
    *("lightning-utilities", "boto3", "botocore", "s3transfer", "jmespath", "tifffile", "obstore"),
    *("brotli", "python-snappy", "cramjam", "zstd", "zstandard", "catalogue", "xxhash"),
    *("etils", "absl-py", "array-record", "cloudpickle", "portpicker", "importlib_resources"),
)
"""What the peers import; not what they declare: their pins would bring other releases of torch and transformers."""

READERS = ("memmap", "litdata", "mds", "hf_map", "hf_iterable", "grain")
VOCAB_SIZE = 50_257
_STEP_ROWS = 256  # a global batch: 32 micro-batches of 8


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)
    folder = options.folder or cache_dir() / "bench-data"
    num_rows = options.million_tokens * 1_000_000 // options.length
    split = _prepared(folder, num_rows, options.length)
    results = {"fleetune": _ours(split, options)}
    python = None if options.no_peers else _environment(folder.parent / "bench-peers")
    for reader in READERS[:1] if python is None else READERS:
        results[reader] = _peer(python or Path(sys.executable), reader, folder, num_rows, options)
    sys.stdout.write(_table(results) + "".join(f"{line}\n" for line in _others(split)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.bench data", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--million-tokens", type=int, default=64, help="2 bytes each (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows of a tensor (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="each loader is timed for (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="for the data (default: in the cache)")
    parser.add_argument("--no-peers", action="store_true", help="only ours and the bare gather")
    return parser


def _prepared(folder: Path, num_rows: int, length: int) -> PreparedSplit:
    """Random tokens as one flat file and as shards of ours, made once."""
    made, sizes = folder / "made.json", [num_rows, length]
    if not made.exists() or json.loads(made.read_text())["sizes"] != sizes:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        random = np.random.default_rng(0)
        rows = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="w+", shape=(num_rows, length))
        for start in range(0, num_rows, 1000):
            rows[start : start + 1000] = random.integers(0, VOCAB_SIZE, (len(rows[start : start + 1000]), length))
        schema = Schema({"input_ids": "tokens"}, VOCAB_SIZE)
        entry = write_split(folder / "train", ({"input_ids": row} for row in rows), schema, "of a benchmark")
        write_json(made, {"sizes": sizes, "entry": entry})
    return PreparedSplit(folder / "train", json.loads(made.read_text())["entry"])


def _environment(folder: Path) -> Path:
    """The peers' interpreter. DataError when they cannot be installed."""
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        venv.create(folder, clear=True, with_pip=False)
        site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
        done = run_captured([*pip, *PEERS, *NEEDED])
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise DataError("peers", ", ".join(PEERS), f"cannot be installed ({last})", "use --no-peers")
        (folder / "made").touch()
    return python


def _ours(split: PreparedSplit, options: argparse.Namespace) -> dict[str, Any]:
    began, before = time.perf_counter(), _resident_bytes()
    fresh = PreparedSplit(split.folder, split.entry)
    stream = BatchStream(fresh, GlobalOrder(len(fresh), 0), _STEP_ROWS, 0, 1, options.batch)
    _read(stream, 0)
    opened, num_tokens, position = time.perf_counter(), 0, 0
    while time.perf_counter() - opened < options.seconds:
        num_tokens += _read(stream, position)
        position += _STEP_ROWS
    rate = num_tokens / (time.perf_counter() - opened)
    resident = _resident_bytes() - before
    return {"tokens_per_second": rate, "open_seconds": opened - began, "resident_bytes": resident}


def _read(stream: BatchStream, position: int) -> int:
    num_tokens = 0
    for rows in stream.micro_batches(position):
        assert isinstance(rows, TokenBlock), "the rows are equally long"
        num_tokens += torch.from_numpy(rows.tokens).numel()
    return num_tokens


def _peer(python: Path, reader: str, folder: Path, num_rows: int, options: argparse.Namespace) -> dict[str, Any]:
    script = Path(__file__).with_name("_peers.py")
    sizes = [str(num_rows), str(options.length), str(options.batch), str(options.seconds)]
    done = run_captured([str(python), str(script), reader, str(folder), *sizes])
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no word"]
    return dict(json.loads(lines[-1])) if done.returncode == 0 else {"error": lines[-1][:100]}


def _table(results: dict[str, dict[str, Any]]) -> str:
    limit = results["memmap"].get("tokens_per_second", float("nan"))
    lines = [f"{'loader':<12} {'M tokens/s':>10} {'of memmap':>10} {'first batch':>12} {'resident':>10}"]
    for name, result in results.items():
        if "error" in result:
            lines.append(f"{name:<12} did not run: {result['error']}")
            continue
        rate, resident = result["tokens_per_second"], result["resident_bytes"] / 2**20
        first = f"{result['open_seconds'] * 1e3:.1f} ms"
        lines.append(f"{name:<12} {rate / 1e6:>10.1f} {rate / limit:>10.2f} {first:>12} {resident:>6.0f} MiB")
    peers = [r["tokens_per_second"] for n, r in results.items() if n not in ("fleetune", "memmap") and "error" not in r]
    if peers:
        lines.append(f"fleetune reads {results['fleetune']['tokens_per_second'] / max(peers):.1f} x the best peer")
    return "\n".join(lines) + "\n"


def _others(split: PreparedSplit) -> list[str]:
    """A seek, the opening of 1,000 shards, a plan of bins."""
    lines = []
    for size in (10**7, 10**9):
        began = time.perf_counter()
        GlobalOrder(size, seed=1).samples(size // 10 * 9, _STEP_ROWS)
        lines.append(f"seek to sample {size // 10 * 9} of {size}: {(time.perf_counter() - began) * 1e3:.2f} ms")
    shards = [{**split.entry["shards"][0], "num_samples": 10_000} for _ in range(1000)]
    began = time.perf_counter()
    many = PreparedSplit(split.folder, {**split.entry, "num_samples": 10**7, "shards": shards})
    many.rows(np.array([5]))
    lines.append(f"first row of a split of 1000 shards: {(time.perf_counter() - began) * 1e3:.1f} ms")
    lengths = np.exp(np.random.default_rng(0).normal(6, 1.2, 1_000_000)).astype(np.int64).clip(1, 2048)
    began = time.perf_counter()
    bins = best_fit(lengths, 2048)
    share = lengths.sum() / (len(bins) * 2048)
    took = time.perf_counter() - began
    return [*lines, f"bins for 1000000 documents, 2048 tokens each: {took:.2f} s, {share:.3%} of positions are tokens"]


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
