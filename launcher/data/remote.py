"""Files that lie elsewhere: whatever `fsspec` opens (http, s3, gs, hf, ...), and data sets of the Hugging Face hub.

A file is fetched once, whole, into the folder where data are being made, and read from there.
"""

from __future__ import annotations

import shutil
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

from launcher.errors import ABSENT, DataError, Interrupted

_CLIENTS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
"""What `fsspec` needs to be installed for a scheme; optional extras of fleetune, by the name of the scheme."""

RETRY_SECONDS = (1.0, 4.0, 16.0)
"""Waited before each new attempt at a file; then the network is taken for lost."""


def expand(option: str, url: str) -> list[str]:
    """The files that a URL names: itself, what matches it, or what lies below it, sorted."""
    system, path = _opened(option, url)
    if url.startswith("http"):
        return [url]  # nothing can be listed, and to ask whether it is there would be to fetch it
    try:
        if any(character in path for character in "*[") or url.endswith("/"):
            found = system.glob(path) if not url.endswith("/") else system.find(path)
        else:
            found = [path] if system.isfile(path) else system.find(path)
    except (OSError, ValueError) as error:
        raise _unreachable(url, error) from None
    if not found:
        raise DataError(
            option, url, "names no file", "give the URL of a file, or of a folder where those can be listed"
        )
    return [str(system.unstrip_protocol(name)) for name in sorted(found)]


def identity(url: str) -> str:
    """Changes when the file does: the server's own mark of its content, or else the content's checksum."""
    system, path = _opened("data", url)
    try:
        about = system.info(path)
        marks = [
            about.get(key) for key in ("ETag", "etag", "md5Hash", "crc32c", "mtime", "LastModified", "partial_md5")
        ]
        if any(marks):
            return f"{about.get('size')} {' '.join(str(mark) for mark in marks if mark)}"
        with system.open(path, "rb") as file:
            digest = blake2b(digest_size=16)
            while chunk := file.read(8 << 20):
                digest.update(chunk)
            return digest.hexdigest()
    except (OSError, ValueError) as error:
        raise _unreachable(url, error) from None


def fetch(url: str, target: Path) -> None:
    """Copy the file; appears whole or not at all. Interrupted when the network stays away."""
    part = target.with_name(f"{target.name}.part")
    for wait_seconds in (*RETRY_SECONDS, None):
        try:
            system, path = _opened("data", url)
            with system.open(path, "rb") as source, part.open("wb") as copy:
                shutil.copyfileobj(source, copy, 8 << 20)
            size = system.info(path).get("size")
            if size is not None and part.stat().st_size != size:
                raise ConnectionError(f"{part.stat().st_size} of {size} bytes came")
            part.rename(target)
            return
        except FileNotFoundError as error:
            raise _unreachable(url, error) from None
        except Exception as error:  # each client has errors of its own
            if (isinstance(error, OSError) and error.filename == str(part)) or _is_full(error):
                raise
            if wait_seconds is None:
                raise _unreachable(url, error) from error
            time.sleep(wait_seconds)


def _is_full(error: BaseException) -> bool:
    import errno

    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _opened(option: str, url: str) -> tuple[Any, str]:
    import fsspec

    scheme = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError:
        package = _CLIENTS.get(scheme, "a client of fsspec")
        way_out = f"pip install {package}"
        raise DataError(option, url, f"needs the package {package} to be opened", way_out) from None
    except ValueError:
        raise DataError(option, url, f"has a scheme that fsspec does not know ({scheme})", "give another") from None
    system.invalidate_cache()
    return system, path


def _unreachable(url: str, error: BaseException) -> DataError:
    reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return DataError(url, ABSENT, "does not exist", "mend the URL")
    way_out = "see the network, and start the same command again: it goes on where it stopped"
    return Interrupted(url, ABSENT, f"cannot be fetched ({reason})", way_out)


def hub_dataset(option: str, name: str) -> list[Path]:
    """The Arrow files of a data set of the hub, as `datasets` caches them."""
    import datasets

    split = "validation" if option == "data.validation" else "train"
    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # noqa: BLE001  a dozen kinds, from offline to an unknown split
        reason = str(error).strip().split("\n")[0].rstrip(".")
        rule = f"does not exist here, nor can it be loaded from the hub ({reason})"
        raise DataError(option, name, rule, "give files, folders or globs, or a data set's id") from None
    return [Path(file["filename"]) for file in loaded.cache_files]
