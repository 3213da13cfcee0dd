"""Numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.units import GIB, KIB, MIB, show_bytes, show_count, show_seconds


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 * KIB, "10.0 KiB"),
        (100 * KIB, "100 KiB"),
        (999 * KIB, "999 KiB"),
        (1000 * KIB, "0.98 MiB"),
        (MIB, "1.00 MiB"),
        (80 * GIB, "80.0 GiB"),
        (1000 * GIB, "0.98 TiB"),
        (5000 * 1024 * GIB, "5000 TiB"),
        (-3 * GIB, "-3.00 GiB"),
    ],
)
def test_bytes(num_bytes: int, text: str) -> None:
    """Powers of two, three digits, never four before the point except in the largest unit."""
    assert show_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (12, "12"),
        (0.5, "0.5"),
        (999, "999"),
        (1000, "1.00 K"),
        (52_600, "52.6 K"),
        (999_499, "999 K"),
        (999_500, "1.00 M"),
        (124_439_808, "124 M"),
        (1_540_000_000, "1.54 B"),
        (405_853_388_800, "406 B"),
        (15.6e12, "15.6 T"),
    ],
)
def test_counts(count: float, text: str) -> None:
    """Powers of ten with the words of the field: thousand, million, billion, trillion."""
    assert show_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (59.6, "1:00"),
        (75, "1:15"),
        (3600, "1:00:00"),
        (3725, "1:02:05"),
        (1e6, "277:46:40"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text


@given(st.integers(0, 10**18))
def test_bytes_shown_are_right_to_a_hundredth(num_bytes: int) -> None:
    """Three digits of the number: what is shown is within 0.6 % of it (within 0.005 of a unit below 1)."""
    number, unit = show_bytes(num_bytes).split()
    size = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024 * GIB}[unit]
    assert float(number) * size == pytest.approx(num_bytes, rel=0.006)
