"""The bytes of a source, uncompressed; what is wrong with the file as a whole is a DataError."""

from __future__ import annotations

import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from launcher.data.sources import Source
from launcher.errors import ABSENT, DataError


@contextmanager
def opened(source: Source) -> Iterator[IO[bytes]]:
    """A stream to read from; DataError for a file that is empty, cannot be read, or is not whole."""
    try:
        if source.path.stat().st_size == 0:
            raise DataError(source.name, ABSENT, "is empty", "give files with text in them")
        with source.path.open("rb") as raw:
            yield _uncompressed(source, raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            source.name, ABSENT, f"is not a whole gzip file ({error})", "copy it again, or unzip it"
        ) from None
    except OSError as error:
        if source.compression == "zstd" and error.errno is None:
            rule = f"is not a whole zstd file ({str(error).rstrip('.')})"
            raise DataError(source.name, ABSENT, rule, "copy it again, or unpack it") from None
        raise DataError(
            source.name, ABSENT, f"cannot be read ({error.strerror or error})", "see its permissions"
        ) from None


def _uncompressed(source: Source, raw: IO[bytes]) -> Any:
    if source.compression == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if source.compression == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw


@contextmanager
def seekable(source: Source, file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Parquet is read from its end, a compressed file only from its start: unpack to a temporary file, not to memory."""
    if source.compression is None:
        yield file
        return
    with tempfile.TemporaryFile() as unpacked:
        shutil.copyfileobj(file, unpacked)
        unpacked.seek(0)
        yield unpacked
