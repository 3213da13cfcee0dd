"""Every way to lay the job over the ranks, those that fit ranked, the best taken.

Rank: the predicted time of a step. Predictions are no better than a few per cent, so all within `TIE` of the fastest
count as equally fast, and among those the simplest wins: nothing offloaded, no recompute, parameters freed after
forward, no groups, then least communication, fewest accumulation steps, and the order of STRATEGIES.

Micro-batches need no such rule. With everything else alike, a larger one takes more memory and never more time, so of
each family of layouts the largest micro-batch that fits stands for all: `tests/unit/test_plan_search.py` tries the rest.
Where that one is tight (its highest estimate does not fit), so does the largest that is not. A tight layout is taken only
where it is faster by more than `CAUTION`: a run that ends out of memory costs more than it would have saved.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import replace

from launcher.cost.values import ModelCost
from launcher.errors import SpecError
from launcher.job.cluster import Cluster
from launcher.job.spec import JobSpec
from launcher.plan.collectives import communication_bytes
from launcher.plan.knobs import STRATEGIES, check_batch, families, micro_batches
from launcher.plan.layout import Layout
from launcher.plan.memory import checkpoint_disk, host_memory, nvme_memory, rank_memory
from launcher.plan.step_time import step_time
from launcher.plan.values import Candidate, Memory

TIE = 0.03
"""Share of the fastest step's time: the median error of the predictions on published runs (`tools.calibrate`)."""

CAUTION = 0.1
"""Share of a step's time that a tight layout must save: the 90th percentile of the predictions' error on published runs."""


class Search:
    """Layouts of one spec on one cluster, each place's memory counted once."""

    def __init__(self, spec: JobSpec, cost: ModelCost, cluster: Cluster) -> None:
        """Raises `SpecError` for what no layout can honour."""
        _check_lengths(spec, cost)
        check_batch(spec)
        self._cost, self._cluster, self._checkpoints = cost, cluster, spec.checkpoint.keep_last
        self._samples = spec.training.global_batch_size // spec.num_ranks
        self._sizes = micro_batches(spec)
        self._families = families(spec, cluster)

    def any_fits(self) -> bool:
        """Whether anything does, found without timing a step; what shards most is looked at first."""
        return any(self.fits(family, size) for family in reversed(self._families) for size in self._ends())

    def candidates(self) -> tuple[list[Candidate], list[Candidate]]:
        """Of each family the largest micro-batch that fits, and the smallest that does not; both ranked."""
        fitting, lost = [], []
        for family in self._families:
            fits, too_large = self.border(family)
            fitting += self._with_room(family, fits) if fits else []
            lost += [self.weighed(family, too_large)] if too_large else []
        return ranked(fitting), ranked(lost)

    def _with_room(self, family: Layout, largest: int) -> list[Candidate]:
        """The largest micro-batch that fits, and where that is tight the largest that is not."""
        best = self.weighed(family, largest)
        smaller = self._sizes[: self._sizes.index(largest)] if best.memory.is_tight else []
        first = bisect_left(smaller, True, key=lambda size: self._memory(family, size).is_tight)
        return [best, *([self.weighed(family, smaller[first - 1])] if first else [])]

    def _memory(self, family: Layout, size: int) -> Memory:
        return rank_memory(self._cost, self._cluster, self._at(family, size))

    def border(self, family: Layout) -> tuple[int, int]:
        """Micro-batch sizes, 0 for none. One pass a step needs no room to accumulate, so the largest is tried alone."""
        *smaller, largest = self._sizes
        if self.fits(family, largest):
            return largest, 0
        first = bisect_left(smaller, True, key=lambda size: not self.fits(family, size))
        return (smaller[first - 1] if first else 0), self._sizes[first]

    def _ends(self) -> Iterable[int]:
        return {self._sizes[0], self._sizes[-1]}

    def _at(self, family: Layout, size: int) -> Layout:
        return replace(family, micro_batch_size=size, accumulation_steps=self._samples // size)

    def fits(self, family: Layout, size: int) -> bool:
        """Whether every place holds it."""
        return all(place.fits for place in self._places(self._at(family, size)))

    def _places(self, layout: Layout) -> Iterator[Memory]:
        """Rank, node, NVMe and disk, each counted when it is asked for: most layouts fail at the first."""
        yield rank_memory(self._cost, self._cluster, layout)
        yield host_memory(self._cost, self._cluster, layout)
        yield nvme_memory(self._cost, self._cluster, layout)
        yield checkpoint_disk(self._cost, layout, self._checkpoints)

    def weighed(self, family: Layout, size: int) -> Candidate:
        """With memory and time."""
        layout = self._at(family, size)
        memory, host, nvme, disk = self._places(layout)
        time = step_time(self._cost, self._cluster, layout)
        return Candidate(layout, memory, communication_bytes(self._cost, layout), time, host, nvme, disk)


def ranked(candidates: list[Candidate]) -> list[Candidate]:
    """Best first: those as fast as the fastest, simplest first, then the others by their time; a tight one's counts `CAUTION` more."""
    limit = (1 + TIE) * min(map(_seconds, candidates), default=0.0)
    fast = [candidate for candidate in candidates if _seconds(candidate) <= limit]
    slow = [candidate for candidate in candidates if _seconds(candidate) > limit]
    return sorted(fast, key=_simplicity) + sorted(slow, key=lambda lost: (_seconds(lost), _simplicity(lost)))


def _seconds(candidate: Candidate) -> float:
    return candidate.step_time.seconds * (1 + CAUTION if candidate.memory.is_tight else 1.0)


def _simplicity(candidate: Candidate) -> tuple[bool, int, bool, bool, bool, int, int, int]:
    layout = candidate.layout
    return (
        candidate.memory.is_tight,
        (layout.offload_optimizer != "none") + (layout.offload_params != "none"),
        layout.recompute == "full",
        not layout.reshard_after_forward,
        layout.shard_group_size > 0,
        candidate.communication_bytes,
        layout.accumulation_steps,
        STRATEGIES.index(candidate.strategy),
    )


def _check_lengths(spec: JobSpec, cost: ModelCost) -> None:
    limit = cost.max_positions
    if limit is not None and spec.training.seq_len > limit:
        raise SpecError(
            "training.seq_len",
            spec.training.seq_len,
            f"is more than the model's {limit} positions",
            f"give at most {limit}",
        )
