"""Writes archives of `torch.save` whose tensors do not exist yet: the object and the places of all values come first.

The layout is that of torch 2.13 (serialization.py `_save`, caffe2/serialize/inline_container.cc): a zip archive with
every record STORED and aligned to 64 bytes. Sizes beyond 4 GiB use zip64 (APPNOTE 4.3.14, 4.5.3).
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from isal.isal_zlib import crc32

from tools.formats.files import Part, Planned, Slot

ALIGNMENT = 64
LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR64 = struct.Struct("<4sIQI")
BIG = 0xFFFFFFFF
STORAGES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}  # fmt: skip
"""The classes that `torch.save` names; other dtypes go as untyped storages."""


class PlannedTensor:
    """Stands for a tensor in an object that is to be pickled; named twice, its values are written once."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, parts: Sequence[Part]) -> None:
        self.shape, self.dtype, self.parts = tuple(shape), dtype, tuple(parts)
        assert sum(part.numel for part in parts) == prod(self.shape)


class Foreign:
    """Stands for an object of a class that is not imported here: `module` and `name` are what the pickle says."""

    module, name = "", ""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class LossScaler(Foreign):
    module, name = "deepspeed.runtime.fp16.loss_scaler", "LossScaler"


class DynamicLossScaler(Foreign):
    module, name = "deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"


class FragmentAddress(Foreign):
    module, name = "deepspeed.utils.tensor_fragment", "fragment_address"


@dataclass(frozen=True)
class _Storage:
    tensor: PlannedTensor


class _Pickler(pickle._Pickler):  # the one written in Python: C's looks classes up before it writes their names
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2)
        self.tensors: dict[int, PlannedTensor] = {}
        self.keys: dict[int, str] = {}

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, PlannedTensor):
            return NotImplemented
        strides = tuple(prod(value.shape[axis + 1 :]) for axis in range(len(value.shape)))
        args: tuple[Any, ...] = (_Storage(value), 0, value.shape, strides, False, OrderedDict())
        if value.dtype in STORAGES:
            return torch._utils._rebuild_tensor_v2, args
        return torch._utils._rebuild_tensor_v3, (*args, value.dtype)

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        tensor = value.tensor
        key = self.keys.setdefault(id(tensor), str(len(self.keys)))
        self.tensors[id(tensor)] = tensor
        kind, numel = STORAGES.get(tensor.dtype), prod(tensor.shape)
        if kind is None:
            return "storage", torch.UntypedStorage, key, "cpu", numel * tensor.dtype.itemsize
        return "storage", kind, key, "cpu", numel

    def save_global(self, value: Any, name: Any = None) -> None:
        if isinstance(value, type) and issubclass(value, Foreign):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())  # type: ignore[attr-defined]
            self.memoize(value)  # type: ignore[attr-defined]
        else:
            super().save_global(value, name)  # type: ignore[misc]

    def plan(self) -> list[PlannedTensor]:
        return list(self.tensors.values())


@dataclass
class _Record:
    name: bytes
    size: int
    content: bytes | None
    """None for values, whose CRC-32 is not known yet."""
    slot: int | None = None
    header_at: int = 0
    data_at: int = 0


@dataclass
class Archive:
    """An archive to be: at `start` of its file, `num_bytes` long."""

    start: int
    num_bytes: int = 0
    slots: list[Slot] = field(default_factory=list)
    records: list[_Record] = field(default_factory=list)

    def seal(self, crcs: Sequence[int]) -> list[tuple[int, bytes]]:
        """Headers, pickle, central directory: everything but the values."""
        written, central = [], bytearray()
        for record in self.records:
            crc = crcs[record.slot] if record.slot is not None else crc32(record.content or b"")
            written.append((self.start + record.header_at, _local_header(record, crc)))
            if record.content is not None:
                written.append((self.start + record.data_at, record.content))
            central += _central_header(record, crc)
        at = self.records[-1].data_at + self.records[-1].size
        return [*written, (self.start + at, bytes(central) + _end(len(self.records), at, len(central)))]


def plan_archive(value: Any, start: int = 0) -> Archive:
    """The archive of `torch.save(value)`, its `PlannedTensor` to be filled."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(value)
    archive = Archive(start)
    _add(archive, _Record(b"archive/data.pkl", len(stream.getvalue()), stream.getvalue()))
    _add(archive, _Record(b"archive/byteorder", 6, b"little"))
    for key, tensor in enumerate(pickler.plan()):
        size = prod(tensor.shape) * tensor.dtype.itemsize
        record = _Record(f"archive/data/{key}".encode(), size, None, slot=len(archive.slots))
        _add(archive, record)
        archive.slots.append(Slot(start + record.data_at, tensor.dtype, tensor.parts))
    _add(archive, _Record(b"archive/version", 2, b"3\n"))
    last = archive.records[-1]
    central = sum(len(_central_header(record, 0)) for record in archive.records)
    archive.num_bytes = last.data_at + last.size + central + len(_end(len(archive.records), last.data_at, central))
    return archive


def archive_file(name: str, value: Any) -> Planned:
    """A file of `torch.save(value)` to be."""
    archive = plan_archive(value)
    return Planned(name, archive.num_bytes, tuple(archive.slots), archive.seal)


def _add(archive: Archive, record: _Record) -> None:
    if archive.records:
        record.header_at = archive.records[-1].data_at + archive.records[-1].size
    plain = record.header_at + LOCAL.size + len(record.name) + len(_zip64_local(record))
    record.data_at = plain + _padding(plain)
    archive.records.append(record)


def _padding(end: int) -> int:
    """Bytes of an extra field ("FB", as torch names it) that bring `end` to the alignment; it needs four itself."""
    return (-(end + 4)) % ALIGNMENT + 4


def _zip64_local(record: _Record) -> bytes:
    return struct.pack("<HHQQ", 1, 16, record.size, record.size) if record.size >= BIG else b""


def _local_header(record: _Record, crc: int) -> bytes:
    size = min(record.size, BIG)
    room = record.data_at - record.header_at - LOCAL.size - len(record.name)
    zip64 = _zip64_local(record)
    fill = room - len(zip64) - 4
    extra = zip64 + struct.pack("<2sH", b"FB", fill) + b"Z" * fill
    return LOCAL.pack(b"PK\x03\x04", 45, 0x800, 0, 0, 0, crc, size, size, len(record.name), room) + record.name + extra


def _central_header(record: _Record, crc: int) -> bytes:
    size, at = min(record.size, BIG), min(record.header_at, BIG)
    wide = [record.size] * 2 * (record.size >= BIG) + [record.header_at] * (record.header_at >= BIG)
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    fields = (45, 45, 0x800, 0, 0, 0, crc, size, size, len(record.name), len(extra), 0, 0, 0, 0, at)
    return CENTRAL.pack(b"PK\x01\x02", *fields) + record.name + extra


def _end(count: int, at: int, size: int) -> bytes:
    """Always with the zip64 records, as torch writes them."""
    wide = END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, at)
    locator = LOCATOR64.pack(b"PK\x06\x07", 0, at + size, 1)
    few = min(count, 0xFFFF)
    return wide + locator + END.pack(b"PK\x05\x06", 0, 0, few, few, min(size, BIG), min(at, BIG), 0)
