"""What several commands take, and the live line that they show while they work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="Job spec in YAML.", show_default=False)]
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one key: training.lr=1e-4.")]


class Via(str, Enum):
    auto = "auto"
    local = "local"
    torchrun = "torchrun"
    deepspeed = "deepspeed"
    slurm = "slurm"
    kubernetes = "kubernetes"


ViaOption = Annotated[
    Via, typer.Option(help="Who starts the ranks; auto: what launch.via of the spec says, else torchrun.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]


@contextmanager
def progress() -> Iterator[Callable[[str, int], None]]:
    """`show(stage, number)`: one live line on a terminal, nothing when piped."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting") as status:
        yield lambda stage, number: status.update(f"{stage}: {number:,}")
