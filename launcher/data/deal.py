"""Which rank computes which rows of a global batch, and in which micro-batch: pure functions of the batch's own rows.

The set of rows of a global batch is never touched here, so the loss of a step does not depend on the dealing. Ranks
wait for each other in every micro-step, so rows of like cost go into the same one, and over the step the totals even out.
"""

from __future__ import annotations

import numpy as np

from launcher.data.order import Ints

Deal = list[list[list[int]]]
"""`deal[rank][micro_step]`: places in the global batch."""


def in_turns(num_rows: int, world_size: int, micro_batch_size: int) -> Deal:
    """Row i goes to rank i modulo the ranks, in order."""
    return [
        [
            list(range(first, min(first + micro_batch_size * world_size, num_rows), world_size))
            for first in range(rank, num_rows, micro_batch_size * world_size)
        ]
        for rank in range(world_size)
    ]


def by_cost(costs: Ints, world_size: int, micro_batch_size: int) -> Deal:
    """Equally many rows for each rank and micro-step, and about equal sums of `costs` for each rank.

    From the costliest down, the next `world_size` rows go one to each rank, the costliest of them to the rank with the
    least so far (Graham's longest processing time first, with equal numbers).
    """
    num_steps = len(costs) // (world_size * micro_batch_size)
    deal: Deal = [[[] for _ in range(num_steps)] for _ in range(world_size)]
    totals = np.zeros(world_size, dtype=np.int64)
    for number, rows in enumerate(np.argsort(-costs, kind="stable").reshape(-1, world_size)):
        for rank, row in zip(np.argsort(totals, kind="stable").tolist(), rows.tolist(), strict=True):
            deal[rank][number // micro_batch_size].append(row)
            totals[rank] += costs[row]
    return deal


def by_length(lengths: Ints, world_size: int, num_steps: int) -> Deal:
    """Micro-batches of rows of like length, under the least budget of padded tokens that needs no further micro-step.

    A micro-batch has any number of rows; its padded tokens (rows x longest) are at most those of the longest rows in
    micro-batches of equal number, so what fits there fits here.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    sizes = _cuts(lengths[longest_first], world_size * num_steps)
    pieces = np.split(longest_first, np.cumsum(sizes)[:-1])
    padded = [len(piece) * int(lengths[piece[0]]) for piece in pieces]
    costliest_first = sorted(range(len(pieces)), key=lambda number: -padded[number])
    deal: Deal = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for first in range(0, len(pieces), world_size):
        ranks = sorted(range(world_size), key=lambda rank: totals[rank])
        for rank, number in zip(ranks, costliest_first[first : first + world_size], strict=True):
            deal[rank].append(pieces[number].tolist())
            totals[rank] += padded[number]
    return deal


def _cuts(falling: Ints, num_pieces: int) -> list[int]:
    """Sizes of exactly `num_pieces` consecutive pieces of falling lengths, the costliest as cheap as can be."""
    low, high = int(falling[0]), int(falling[0]) * len(falling)
    while low < high:
        budget = (low + high) // 2
        low, high = (low, budget) if len(_greedy(falling, budget)) <= num_pieces else (budget + 1, high)
    sizes = _greedy(falling, low)
    while len(sizes) < num_pieces:  # every rank computes in every micro-step
        largest = max(range(len(sizes)), key=lambda number: sizes[number])
        sizes[largest : largest + 1] = [sizes[largest] - sizes[largest] // 2, sizes[largest] // 2]
    return sizes


def _greedy(falling: Ints, budget: int) -> list[int]:
    sizes, begin = [], 0
    while begin < len(falling):
        sizes.append(min(max(1, budget // int(falling[begin])), len(falling) - begin))
        begin += sizes[-1]
    return sizes
