"""From measured rates to the planner's constants. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping


def width_law(rates: Mapping[int, float]) -> tuple[float, float]:
    """(r, w0) such that products of width w run at about `r w / (w + w0)`, the law of `launcher.plan.step_time`.

    Seconds per FLOP are linear in 1 / w, `1 / rate = 1 / r + (w0 / r) / w`: least squares of the relative error. Widths
    that help nothing (a law that would fall with the width) give the mean rate and w0 = 0.
    """
    points = [(1 / width, 1 / rate) for width, rate in rates.items()]
    weights = [1 / cost**2 for _, cost in points]  # relative errors
    total = sum(weights)
    mean_x = sum(weight * x for weight, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(weight * y for weight, (_, y) in zip(weights, points, strict=True)) / total
    variance = sum(weight * (x - mean_x) ** 2 for weight, (x, _) in zip(weights, points, strict=True))
    if variance == 0:
        return 1 / mean_y, 0.0
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)) / variance
    at_infinity = mean_y - slope * mean_x
    if slope <= 0 or at_infinity <= 0:
        return 1 / mean_y, 0.0
    return 1 / at_infinity, slope / at_infinity
