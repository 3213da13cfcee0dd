"""A step whose scaled gradients overflow is skipped, counted, and lowers the scale; the next one trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support import rank_environment

RANK = Path(__file__).with_name("fp16_rank.py")


def test_overflow_skips_a_step_and_is_counted() -> None:
    """With the real optimisers of stages 1 to 3: the first overflow is forgiven, the second halves the scale."""
    done = subprocess.run(
        [sys.executable, str(RANK)], env=rank_environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, half = 2.0**16, 2.0**15
    steps = [
        [True, 1, whole],
        [False, 1, whole],
        [False, 1, whole],
        [True, 2, half],
        [False, 2, half],
        [False, 2, half],
    ]
    assert json.loads(done.stdout.splitlines()[-1]) == {"zero1": steps, "zero2": steps, "zero3": steps}
