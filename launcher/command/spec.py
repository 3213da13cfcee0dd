"""`fleetune init`, `schema`: the spec itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from launcher.errors import ABSENT, UserError


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("job.yaml"),
    task: Annotated[
        str,
        typer.Option(
            help="What is learnt: causal_lm, chat, masked_lm, sequence_classification, regression, token_classification, extractive_qa or preference."
        ),
    ] = "causal_lm",
) -> None:
    """Write a commented starter spec."""
    from launcher.job.starter import starter

    text = starter(task)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(str(path), ABSENT, "exists and is not overwritten", "name another file") from None
    typer.echo(f"wrote {path}; next: fleetune plan {path}")


def schema() -> None:
    """Print the JSON Schema of the job spec, for editors."""
    from launcher.job.spec import JobSpec

    typer.echo(json.dumps(JobSpec.model_json_schema(), indent=2))
