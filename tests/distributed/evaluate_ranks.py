"""Body of a rank: one question at several batch sizes. The first rank prints a line of JSON for each.

torchrun ... evaluate_ranks.py MODEL TASK DATA SIZE...
"""

from __future__ import annotations

import sys

import torch.distributed as dist

from tools.evaluate import main


def run() -> int:
    model, task, data, *sizes = sys.argv[1:]
    dist.init_process_group("gloo")
    codes = [
        main([model, "--task", task, "--data", data, "--batch-size", size, "--resamples", "50", "--json"])
        for size in sizes
    ]
    dist.destroy_process_group()
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(run())
