"""Bytes, counts and durations as people read them. Powers of two are KiB, MiB, GiB; nothing here rounds a value kept."""

from __future__ import annotations

KIB = 1024
MIB = 1024**2
GIB = 1024**3


def _three_digits(size: float) -> str:
    return f"{size:.0f}" if abs(size) >= 100 else f"{size:.1f}" if abs(size) >= 10 else f"{size:.2f}"


def show_bytes(num_bytes: float) -> str:
    """`1536 -> '1.50 KiB'`; three significant digits."""
    if abs(num_bytes) < KIB:
        return f"{num_bytes:.0f} B"
    size = float(num_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if abs(size) < 1000:
            return f"{_three_digits(size)} {unit}"
    return f"{_three_digits(size / 1024)} TiB"


def show_count(count: float) -> str:
    """`1_540_000_000 -> '1.54 B'` (thousand, million, billion, trillion)."""
    if abs(count) < 1000:
        return f"{count:g}"
    size = float(count)
    for unit in ("K", "M", "B"):
        size /= 1000
        if abs(size) < 999.5:
            return f"{_three_digits(size)} {unit}"
    return f"{_three_digits(size / 1000)} T"


def show_time(seconds: float) -> str:
    """`0.0042 -> '4.20 ms'`, `75 -> '75.0 s'`, `7200 -> '2.00 h'`; three significant digits."""
    if seconds >= 3600:
        return f"{_three_digits(seconds / 3600)} h"
    if seconds >= 1:
        return f"{_three_digits(seconds)} s"
    return f"{_three_digits(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{_three_digits(seconds * 1e6)} us"


def show_seconds(seconds: float) -> str:
    """`75 -> '1:15'`, `3725 -> '1:02:05'`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
