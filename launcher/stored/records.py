"""Tensors that lie in a file and have not been read: where their bytes are, and how to fetch and check them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from launcher.errors import ABSENT, CheckpointError

COPY_BYTES = 16 * 2**20  # large enough for the disk's full rate, small beside any tensor that matters
DAMAGED = "was cut short or damaged, or is not a file of torch.save"
USE_ANOTHER = "copy it again from where it was written, or take another checkpoint"


@dataclass(frozen=True)
class StoredBytes:
    """One record of one archive: the bytes of a storage."""

    file: Path
    offset: int
    """Of the first byte, from the start of the file."""
    num_bytes: int
    crc32: int | None
    """None where the format has none."""

    def check(self) -> None:
        """Reads the record once, in pieces, and compares its CRC-32: no reader of torch or safetensors does."""
        crc, left = 0, self.num_bytes
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset)
            while left and (chunk := stream.read(min(left, COPY_BYTES))):
                crc = zlib.crc32(chunk, crc)
                left -= len(chunk)
        if left or (self.crc32 is not None and crc != self.crc32):
            raise CheckpointError(
                str(self.file), ABSENT, f"has changed bytes (record at {self.offset}: wrong CRC-32)", USE_ANOTHER
            )


@dataclass(frozen=True)
class Storage:
    record: StoredBytes
    dtype: torch.dtype | None
    """None for an untyped storage: the tensor says its dtype."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read; `offset` and `stride` count elements, as in torch."""

    record: StoredBytes
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def span(self) -> int:
        """Elements of the storage from the first used to the last used."""
        if not self.numel:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    def read(self) -> torch.Tensor:
        """The values, contiguous, on the CPU."""
        flat = torch.empty(self.span, dtype=self.dtype)
        self.read_run(flat, 0)
        if not self.numel:
            return flat.reshape(self.shape)
        return flat.as_strided(self.shape, self.stride).contiguous()

    def read_run(self, into: torch.Tensor, start: int) -> None:
        """Fills the contiguous 1-D `into` with the elements of the storage from `offset + start`."""
        if not into.numel():
            return
        begin, size = (self.offset + start) * self.dtype.itemsize, into.numel() * self.dtype.itemsize
        buffer = into.view(torch.uint8).numpy().data
        with self.record.file.open("rb", buffering=0) as stream:
            stream.seek(self.record.offset + begin)
            while buffer and (count := stream.readinto(buffer)):
                buffer = buffer[count:]
        if buffer or begin + size > self.record.num_bytes:
            raise CheckpointError(str(self.record.file), ABSENT, DAMAGED, USE_ANOTHER)
