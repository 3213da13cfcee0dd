"""Commands that only forward: what they do is in `tools/`, which is also run as `python -m tools.X`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(context: typer.Context) -> None:
    """Any checkpoint -> any other format, and ready for inference; same as `python -m tools.convert`."""
    from tools.convert import main as convert_main

    raise typer.Exit(convert_main(context.args))


def inspect(context: typer.Context) -> None:
    """What a checkpoint of any format holds, or how two differ; same as `python -m tools.inspection`."""
    from tools.inspection import main as inspect_main

    raise typer.Exit(inspect_main(context.args))


def evaluate(context: typer.Context) -> None:
    """How good a model is, how sure that is, whether it beats another; same as `python -m tools.evaluate`."""
    from tools.evaluate import main as evaluate_main

    raise typer.Exit(evaluate_main(context.args))


def report(context: typer.Context) -> None:
    """One page about one run, or several compared; same as `python -m tools.report`."""
    from tools.report.__main__ import main as report_main

    raise typer.Exit(report_main(context.args))


def explain(context: typer.Context) -> None:
    """Why a model answers so: attention and attributions of each token, as a page; needs the extra `explain`."""
    from tools.evaluation.explain import main as explain_main

    raise typer.Exit(explain_main(context.args))


def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's data and runs go.")] = Path("runs/demo"),
) -> None:
    """Train, convert and score a small GPT and a small BERT on Python's own documentation, on two CPU ranks."""
    from tools.demo import run_demo

    run_demo(folder)
