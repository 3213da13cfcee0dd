"""One step of the loop, with an engine that writes down what it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from launcher.train.loop import Run, Window, _step

CPU = torch.device("cpu")


class Recorder:
    def __init__(self) -> None:
        self.accumulated: list[tuple[float, bool]] = []
        self.stepped: list[tuple[float, int]] = []

    def accumulate(self, batch: Any, scale: float, is_last: bool) -> torch.Tensor:
        self.accumulated.append((scale, is_last))
        return torch.tensor(2.0)

    def step(self, lr: float, number: int) -> float:
        self.stepped.append((lr, number))
        return 1.0


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("num_batches", [1, 3])
def test_the_engine_is_told_the_step_whatever_the_accumulation(num_batches: int) -> None:
    """Gradual unfreezing counts by it. The scale is the whole step's, and the last micro-batch is named."""
    engine = Recorder()
    run: Any = SimpleNamespace(device=CPU, engine=engine, stop=SimpleNamespace(requested=False))
    run.task = SimpleNamespace(num_valid=lambda batch: 4)
    run.world = SimpleNamespace(num_ranks=1)
    window = Window.new(CPU)
    batches = [{"attention_mask": torch.ones(2, 5)} for _ in range(num_batches)]
    assert _step(cast(Run, run), batches, 1e-3, 7, window) == (1.0, False)
    assert engine.stepped == [(1e-3, 7)]
    assert [is_last for _, is_last in engine.accumulated] == [False] * (num_batches - 1) + [True]
    assert {scale for scale, _ in engine.accumulated} == {1 / (4 * num_batches)}
    assert (window.tokens, window.targets, window.loss.item()) == (10 * num_batches, 4 * num_batches, 2 * num_batches)
