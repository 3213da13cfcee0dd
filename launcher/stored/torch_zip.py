"""Opens archives of `torch.save` without running what is in them and without loading their tensors.

Such a file is a zip archive, every record STORED: `<stem>/data.pkl` (the object, pickled) and `<stem>/data/<key>` (one
storage each), so that a tensor can be read at a known offset.
Source of the layout: torch/serialization.py (`_save`) and the zip specification (APPNOTE 4.3), torch 2.13.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.records import DAMAGED, USE_ANOTHER, StoredBytes
from launcher.stored.safe_pickle import unpickle

LOCAL_HEADER = struct.Struct(
    "<4s22xHH"
)  # signature, ..., length of the name, length of the extra field (APPNOTE 4.3.7)

# What zipfile raises for bytes that are no archive, or a damaged one.
NOT_AN_ARCHIVE = (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError, struct.error, zlib.error)


def load(file: Path) -> Any:
    """The object in a file of torch.save; its tensors are `StoredTensor`."""
    return load_part(file, 0, file.stat().st_size)


def load_part(file: Path, start: int, size: int) -> Any:
    """The object in the archive that lies at bytes `start` to `start + size` of `file`."""
    with file.open("rb") as stream:
        try:
            pickled, storages = _read_archive(file, stream, start, size)
        except NOT_AN_ARCHIVE as error:
            raise CheckpointError(str(file), ABSENT, DAMAGED, USE_ANOTHER) from error
    return unpickle(io.BytesIO(pickled), file, storages)


def _read_archive(file: Path, stream: BinaryIO, start: int, size: int) -> tuple[bytes, dict[str, StoredBytes]]:
    """The pickle (its CRC-32 is compared by zipfile) and the place of every storage by its key."""
    with zipfile.ZipFile(_Window(stream, start, size)) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        _check_form(file, archive, records)
        storages = {
            name.removeprefix("data/"): _locate(file, stream, start, size, info)
            for name, info in records.items()
            if name.startswith("data/")
        }
        return archive.read(records["data.pkl"]), storages


def _check_form(file: Path, archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo]) -> None:
    """Stored, not compressed; little-endian; with a pickle: what torch.save writes on every machine that trains."""
    plain = all(info.compress_type == zipfile.ZIP_STORED for info in records.values())
    if "data.pkl" not in records or not plain:
        raise CheckpointError(str(file), ABSENT, DAMAGED, USE_ANOTHER)
    if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
        raise CheckpointError(
            str(file), ABSENT, "was written by a big-endian machine", "save it on a little-endian machine"
        )


def _locate(file: Path, stream: BinaryIO, start: int, size: int, info: zipfile.ZipInfo) -> StoredBytes:
    """The place of a record's bytes; only its local header knows how long it is itself."""
    stream.seek(start + info.header_offset)
    header = stream.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise CheckpointError(str(file), ABSENT, DAMAGED, USE_ANOTHER)
    _, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
    offset = info.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    if offset + info.file_size > size:
        raise CheckpointError(str(file), ABSENT, DAMAGED, USE_ANOTHER)
    return StoredBytes(file, start + offset, info.file_size, info.CRC)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own: DCP puts one archive after another into each `.distcp`."""

    def __init__(self, stream: Any, start: int, size: int) -> None:
        self.stream, self.start, self.size, self.at = stream, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence])
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.at)
        self.stream.seek(self.start + self.at)
        found: bytes = self.stream.read(left if size < 0 else min(size, left))
        self.at += len(found)
        return found
