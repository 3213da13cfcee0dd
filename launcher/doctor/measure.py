"""Starts the measuring ranks of one node and brings back what they found."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.doctor.values import Machine
from launcher.errors import FleetuneError
from launcher.spawn import run_ranks

if TYPE_CHECKING:
    from launcher.doctor.kernels import Sizes

SAYS = "measuring "
"""How a line of progress of `rank.py` begins; torchrun and libraries write others."""


def measure(
    kind: str,
    num_ranks: int,
    threads: int,
    disk: Path,
    nvme: Path | None,
    say: Callable[[str], None],
    sizes: Sizes | None = None,
) -> Machine:
    """Measure this node with so many ranks of so many threads; `say` hears what is being measured.

    kind: `cuda` or `cpu`. sizes: what is computed; None for what suits the kind. Raises `FleetuneError` with the end of
    the ranks' output when they fail.
    """
    with tempfile.TemporaryDirectory(prefix="fleetune-doctor-") as folder:
        answer, request = Path(folder, "answer.json"), Path(folder, "request.json")
        asked = {
            "kind": kind,
            "threads": threads,
            "sizes": None if sizes is None else dataclasses.asdict(sizes),
            "disk": str(disk),
            "nvme": None if nvme is None else str(nvme),
            "answer": str(answer),
        }
        request.write_text(json.dumps(asked))
        lines: list[str] = []

        def hear(line: str) -> None:
            lines.append(line)
            if line.startswith(SAYS):
                say(line.removeprefix(SAYS))

        code = run_ranks("launcher.doctor.rank", num_ranks, [str(request)], {"OMP_NUM_THREADS": str(threads)}, hear)
        if code != 0 or not answer.is_file():
            raise FleetuneError("the measuring ranks failed:\n" + "\n".join(lines[-40:]))
        return Machine.from_json(json.loads(answer.read_text()))
