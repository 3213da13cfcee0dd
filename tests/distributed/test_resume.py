"""Training goes on under any engine and number of ranks as if nothing had happened: weights, moments, steps, settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.distributed.resume_ranks import LOADERS, pairs
from tests.support import run_ranks

RANKS = Path(__file__).with_name("resume_ranks.py")
RELATIVE = 1e-5
"""fp32; other worlds sum in another order. Seen: 1.5e-7."""
CASES = [(saver, loader) for ranks in LOADERS for saver, loader in pairs(ranks)]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Of every case: one process imports, and forks the ranks of each world."""
    folder = tmp_path_factory.mktemp("resume")
    log = folder / "log"
    assert run_ranks([sys.executable, str(RANKS), str(folder)], log) == 0, log.read_text()[-6000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize(("saver", "loader"), CASES, ids=lambda case: case.name)
def test_the_curve_goes_on(losses: dict[str, list[float]], saver: tuple[str, ...], loader: tuple[str, ...]) -> None:
    """Three steps after the change equal the three that the saving engine took itself.

    The engine that takes over starts from other weights and another weight decay, so that nothing is right by chance.
    """
    _, strategy, ranks = loader
    expected = losses["-".join(map(str, saver))]
    got = losses[f"{'-'.join(map(str, saver))}--{strategy}-{ranks}"]
    assert got == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.parametrize(("saver", "loader"), [case for case in CASES if case[1].ranks == 1], ids=lambda c: c.name)
def test_weights_alone_go_elsewhere(
    losses: dict[str, list[float]], saver: tuple[str, ...], loader: tuple[str, ...]
) -> None:
    """The control: with a fresh optimiser the first loss is the same, the next one is not."""
    _, strategy, ranks = loader
    expected = losses["-".join(map(str, saver))]
    got = losses[f"{'-'.join(map(str, saver))}--{strategy}-{ranks}-weights"]
    assert got[0] == pytest.approx(expected[0], rel=RELATIVE)
    assert abs(got[1] - expected[1]) > 1.5 * RELATIVE * expected[1]
