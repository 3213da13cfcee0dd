"""What a rising learning rate is judged by: curves whose answer is known."""

from __future__ import annotations

import math

import pytest

from launcher.command.find import judged

RATES = [1e-6 * 10 ** (step / 20) for step in range(121)]


def falling(middle: float, low: float, diverges: float) -> list[float]:
    """Flat, then down around `middle` (by its logarithm), up from `diverges` on."""
    return [4.0 - 2.0 / (1 + math.exp(-4 * math.log10(rate / middle))) + (rate / diverges) ** 4 * low for rate in RATES]


@pytest.mark.parametrize("middle", [1e-4, 1e-3, 1e-2])
def test_the_steepest_fall_and_the_lowest_loss_are_found(middle: float) -> None:
    """Within the lag of the smoothing, which is ten steps: half a decade."""
    curve = judged(RATES, falling(middle, 1.0, 100 * middle))
    assert abs(math.log10(curve.steepest / middle)) < 0.6
    assert middle < curve.lowest < 100 * middle
    assert curve.suggested == min(curve.steepest, curve.lowest / 10)


def test_what_diverged_is_cut_off() -> None:
    curve = judged(RATES, falling(1e-3, 1.0, 1e-2))
    assert max(curve.losses[:-1]) <= 4 * min(curve.losses)
    assert curve.rates[-1] < RATES[-1]


def test_a_loss_that_only_rises_is_lowest_at_once() -> None:
    curve = judged(RATES, [1.0 + step for step in range(121)])
    assert curve.lowest == RATES[0]
    assert curve.suggested == RATES[0] / 10
