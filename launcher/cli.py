"""`fleetune`, also `python -m launcher`: one word per stage of a job, each in a file of `command/`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from launcher.command import cost, data, doctor, find, launch, plan, save, spec, status, tools, tune
from launcher.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER, FleetuneError

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One job spec in, a fine-tuned GPT- or BERT-style model out: init, plan, prepare, launch, convert, eval, report.",
)

# What typer raises for a wrong command line. Newer releases carry their own copy of click, whose classes are not click's.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]

FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command()(spec.init)
app.command()(spec.explain_key)
app.command()(spec.schema)
app.command()(plan.plan)
app.command()(cost.cost)
app.command()(data.prepare)
app.add_typer(data.data_app, name="data")
app.command()(launch.launch)
app.command("lr-find")(find.lr_find)
app.command()(tune.sweep)
app.command()(status.status)
app.command()(save.save)
app.command(context_settings=FORWARDED, add_help_option=False)(tools.convert)
app.command(context_settings=FORWARDED, add_help_option=False)(tools.inspect)
app.command("eval", context_settings=FORWARDED, add_help_option=False)(tools.evaluate)
app.command("explain", context_settings=FORWARDED, add_help_option=False)(tools.explain)
app.command(context_settings=FORWARDED, add_help_option=False)(tools.report)
app.command()(tools.demo)
app.command()(doctor.doctor)


def main(argv: list[str] | None = None) -> None:
    """Entry point: exit codes 0, 2 (the user's to fix), 75 (saved, can go on), 1 (ours)."""
    raise SystemExit(guarded(lambda: app(args=argv, prog_name="fleetune", standalone_mode=False)))


def guarded(body: Callable[[], Any]) -> int:
    """Run a command; a mistake of the user's is a message on stderr, not a traceback."""
    try:
        result = body()
    except USAGE_ERROR as error:
        error.show()  # type: ignore[attr-defined]
        return EXIT_USER
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except FleetuneError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return result if isinstance(result, int) else EXIT_DONE


if __name__ == "__main__":
    main()
