"""`fleetune init`, `explain-key`, `schema`: the spec itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.errors import ABSENT, UserError

if TYPE_CHECKING:
    from launcher.job.starter import Wishes


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("job.yaml"),
    task: Annotated[
        str | None,
        typer.Option(
            help="What is learnt: causal_lm, chat, masked_lm, sequence_classification, regression, token_classification, extractive_qa or preference."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a model with weights.")] = None,
    data: Annotated[str | None, typer.Option(help="File, folder, glob or data set to train on.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of this machine; 0: train on the CPU.", min=0)] = None,
    cluster: Annotated[str | None, typer.Option(help="What these GPUs are: h100-80, a100-40, ...")] = None,
) -> None:
    """Write a commented starter spec; on a terminal, what is not given is asked for."""
    import sys

    from launcher.job.starter import Wishes, starter

    wishes = Wishes(task, model, data, gpus, cluster)
    if sys.stdin.isatty() and sys.stdout.isatty() and not any(wish is not None for wish in wishes):
        wishes = _asked(wishes)
    text = starter(wishes)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(str(path), ABSENT, "exists and is not overwritten", "name another file") from None
    typer.echo(f"wrote {path}; next: fleetune plan {path}")


def _asked(wishes: Wishes) -> Wishes:
    """Four questions; an empty answer leaves the starter's own."""
    task = typer.prompt("Task (causal_lm, chat, sequence_classification, ...)", default="causal_lm")
    model = typer.prompt(
        "Model: folder or hub id (empty: a small one with random weights)", default="", show_default=False
    )
    data = typer.prompt("Training data: file, folder or glob", default="", show_default=False)
    gpus = typer.prompt("GPUs on this machine (0: CPU)", default=0, type=int)
    cluster = typer.prompt("What GPUs? (h100-80, a100-40, ...)") if gpus else None
    return wishes._replace(task=task, model=model or None, data=data or None, gpus=gpus, cluster=cluster)


def explain_key(
    key: Annotated[str | None, typer.Argument(help="Dotted path, such as training.lr; left out: all keys.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All keys as a page.")] = False,
) -> None:
    """What a key of the spec means, its unit and default, and what it goes with."""
    from launcher.job import reference

    if markdown and key is not None:
        raise UserError("--markdown", ABSENT, "is a page of all keys", "leave out the key")
    if markdown:
        typer.echo(reference.reference_page(), nl=False)
    elif key is None:
        typer.echo("\n".join(reference.overview(reference.keys())))
    else:
        typer.echo(reference.explain_key(key))


def schema() -> None:
    """Print the JSON Schema of the job spec, for editors."""
    from launcher.job.spec import JobSpec

    typer.echo(json.dumps(JobSpec.model_json_schema(), indent=2))
