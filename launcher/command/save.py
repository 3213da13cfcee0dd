"""`fleetune save`: ask a run that is going on for a checkpoint now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.errors import ABSENT, UserError


def save(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a run that is going on.")],
) -> None:
    """Ask for a checkpoint at the end of the step that is being taken."""
    from launcher.train.due import WISH

    if not (run / "plan.json").is_file():
        raise UserError(str(run), ABSENT, "is not the folder of a run: it has no plan.json", "name its output_dir")
    (run / WISH).touch()
    typer.echo(f"asked: {run / WISH} is removed when the save begins; then see {run / 'checkpoints' / 'latest'}")
