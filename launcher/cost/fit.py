"""Bytes at a few batches and lengths -> functions of both. Exact: operators allocate polynomials of their sizes.

Per sample and once per batch, a constant, a share of the length T and a share of its square (scores, masks). Three lengths
at equal distances give the three coefficients by differences without rounding; batches of two and three tell the two kinds
apart, and a batch of one, which keeps views where others keep copies, is fitted by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from launcher.cost.values import LinearInBatch

BATCHES = (1, 2, 3)
Point = tuple[int, int]
"""(micro-batch, length)"""


def lengths_up_to(longest: int) -> tuple[int, int, int]:
    """Three lengths at equal distances: little to run, enough to tell constant, linear and quadratic apart."""
    unit = max(1, min(LONGEST, longest) // 3)
    return unit, 2 * unit, 3 * unit


LONGEST = 96


def points(lengths: Sequence[int]) -> list[Point]:
    return [(batch, length) for batch in BATCHES for length in lengths]


def fitted(values: Mapping[Point, float]) -> LinearInBatch:
    """The function that has these values at BATCHES and three lengths."""
    lengths = sorted({length for _, length in values})
    per_sample = {length: values[3, length] - values[2, length] for length in lengths}
    fixed = {length: values[2, length] - 2 * per_sample[length] for length in lengths}
    sample, once = parabola(per_sample), parabola(fixed)
    one = parabola({length: values[1, length] for length in lengths})
    as_others = tuple(a + b for a, b in zip(sample, once, strict=True))
    return LinearInBatch(
        per_token=sample[1],
        per_token_squared=sample[2],
        fixed_per_token=once[1],
        fixed_per_token_squared=once[2],
        per_sample=sample[0],
        fixed=once[0],
        one=None if one == as_others else one,
    )


def parabola(values: Mapping[int, float]) -> tuple[float, float, float]:
    """(c, a, b) such that `c + a T + b T^2` is the value at each of three lengths at equal distances."""
    (first, low), (middle, mid), (_, high) = sorted(values.items())
    unit = middle - first
    squared = (high - 2 * mid + low) / (2 * unit * unit)
    linear = (mid - low) / unit - squared * (first + middle)
    return low - first * (linear + squared * first), linear, squared


_GRID = [(batch, length) for batch in (1, 2, 8, 64) for length in (128, 512, 2048, 8192, 32768, 131072)]


def envelope(courses: Mapping[Point, Sequence[float]]) -> tuple[LinearInBatch, ...]:
    """The few functions whose largest is the maximum of the course, wherever it is asked.

    courses: a value after every allocation, at each point. A batch of one allocates otherwise, so it has functions of its
    own, which are zero for every other batch.
    """
    alone = {point: course for point, course in courses.items() if point[0] == 1}
    others = {point: course for point, course in courses.items() if point[0] != 1}
    return _largest(alone, _of_one, [point for point in _GRID if point[0] == 1]) + _largest(
        others, _of_others, [point for point in _GRID if point[0] != 1]
    )


def _largest(
    courses: Mapping[Point, Sequence[float]], fit: Callable[[Mapping[Point, float]], LinearInBatch], grid: list[Point]
) -> tuple[LinearInBatch, ...]:
    """Runs of equal length took the same course and are fitted place by place; of others only the maxima are."""
    if len({len(course) for course in courses.values()}) == 1:
        places = zip(*courses.values(), strict=True)
    else:
        places = zip(*([max(course, default=0)] for course in courses.values()), strict=True)
    every = [fit(dict(zip(courses, values, strict=True))) for values in dict.fromkeys(places)]
    largest = {max(range(len(every)), key=lambda i: every[i].at(*point)) for point in grid} if every else set()
    return tuple(every[number] for number in sorted(largest))


def _of_one(values: Mapping[Point, float]) -> LinearInBatch:
    return LinearInBatch(0.0, 0.0, one=parabola({length: value for (_, length), value in values.items()}))


def _of_others(values: Mapping[Point, float]) -> LinearInBatch:
    nothing = {(1, length): 0.0 for _, length in values}
    return replace(fitted({**values, **nothing}), one=(0.0, 0.0, 0.0))
