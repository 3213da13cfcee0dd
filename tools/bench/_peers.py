"""Body of a process of the data benchmark in the peers' environment: one reader, one line of JSON. Imports nothing of ours.

    python _peers.py READER FOLDER ROWS LENGTH BATCH SECONDS

FOLDER holds `tokens.bin`, ROWS x LENGTH uint16. A reader writes its own format beside it once, then gives shuffled
batches (BATCH, LENGTH) of int64 torch tensors; it is timed from its second batch on.
"""

from __future__ import annotations

import json
import sys
import time
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import torch


def rows_of(folder: Path, num_rows: int, length: int) -> Any:
    return np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r", shape=(num_rows, length))


def memmap(folder: Path, num_rows: int, length: int, batch: int) -> Iterator[torch.Tensor]:
    """The limit: a gather of random rows and a cast, nothing else."""
    rows, order = rows_of(folder, num_rows, length), np.random.default_rng(0).permutation(num_rows)
    for start in range(0, num_rows - batch + 1, batch):
        yield torch.from_numpy(rows[order[start : start + batch]].astype(np.int64))


def litdata(folder: Path, num_rows: int, length: int, batch: int) -> Iterator[torch.Tensor]:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    target = folder / "litdata"
    if not target.exists():
        writer = BinaryWriter(str(target), chunk_bytes="64MB", item_loader=TokensLoader(block_size=length))
        for number, row in enumerate(rows_of(folder, num_rows, length)):
            writer.add_item(number, torch.from_numpy(row.astype(np.int32)))
        writer.done()
        writer.merge(1)
    dataset = StreamingDataset(str(target), item_loader=TokensLoader(block_size=length), shuffle=True, drop_last=False)
    for tokens in StreamingDataLoader(dataset, batch_size=batch, num_workers=0):
        yield tokens.to(torch.int64)


def mds(folder: Path, num_rows: int, length: int, batch: int) -> Iterator[torch.Tensor]:
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets"):
        sys.modules.setdefault(name, _Images(name)).__spec__ = ModuleSpec(name, None)
    from streaming import MDSWriter, StreamingDataset

    target = folder / "mds"
    if not target.exists():
        with MDSWriter(out=str(target), columns={"tokens": f"ndarray:uint16:{length}"}, size_limit=1 << 26) as writer:
            for row in rows_of(folder, num_rows, length):
                writer.write({"tokens": np.ascontiguousarray(row)})
    dataset = StreamingDataset(local=str(target), shuffle=True, batch_size=batch)
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch, num_workers=0, collate_fn=_stacked)
    yield from loader


class _Images(types.ModuleType):
    """In place of torchvision, which it imports and uses for images only: PyPI's does not go with a torch for CPUs."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _stacked(samples: list[Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))


def _arrow(folder: Path) -> Any:
    """The prepared folder of this very benchmark: it is a data set of theirs."""
    import datasets

    return datasets.load_from_disk(folder / "train").with_format("numpy")


def hf_map(folder: Path, num_rows: int, length: int, batch: int) -> Iterator[torch.Tensor]:
    dataset, order = _arrow(folder), np.random.default_rng(0).permutation(num_rows)
    for start in range(0, num_rows - batch + 1, batch):
        tokens = dataset[order[start : start + batch].tolist()]["input_ids"]
        yield torch.from_numpy(np.asarray(tokens).astype(np.int64))


def hf_iterable(folder: Path, num_rows: int, length: int, batch: int) -> Iterator[torch.Tensor]:
    dataset = _arrow(folder).to_iterable_dataset(num_shards=1).shuffle(seed=0, buffer_size=1000)
    for some in dataset.iter(batch_size=batch):
        yield torch.from_numpy(np.stack(some["input_ids"]).astype(np.int64))


def grain(folder: Path, num_rows: int, length: int, batch: int) -> Iterator[torch.Tensor]:
    """Its order and batching over the same memory map."""
    from grain.python import MapDataset

    rows = rows_of(folder, num_rows, length)
    for some in MapDataset.source(rows).shuffle(seed=0).batch(batch):
        yield torch.from_numpy(np.asarray(some).astype(np.int64))


READERS = {reader.__name__: reader for reader in (memmap, litdata, mds, hf_map, hf_iterable, grain)}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * 4096


def main() -> None:
    name, folder, num_rows, length, batch, seconds = sys.argv[1:]
    read = READERS[name]
    sizes = (Path(folder), int(num_rows), int(length), int(batch))
    next(iter(read(*sizes)))  # writes its format, warms what it caches
    before, began = resident_bytes(), time.perf_counter()
    batches = iter(read(*sizes))
    first = next(batches)
    opened, num_tokens = time.perf_counter(), 0
    assert first.dtype == torch.int64, first.dtype
    assert tuple(first.shape) == (int(batch), int(length)), first.shape
    while time.perf_counter() - opened < float(seconds):
        tokens = next(batches, None)
        if tokens is None:
            batches = iter(read(*sizes))
            continue
        num_tokens += tokens.numel()
    took = time.perf_counter() - opened
    result = {"tokens_per_second": num_tokens / took, "open_seconds": opened - began}
    sys.stdout.write(json.dumps({**result, "resident_bytes": resident_bytes() - before}) + "\n")


if __name__ == "__main__":
    main()
