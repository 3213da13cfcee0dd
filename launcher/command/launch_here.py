"""`fleetune launch` on this machine: the launcher in the foreground, again after a failure that may pass."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launcher.command.options import Via
from launcher.command.plan import emitted
from launcher.errors import ABSENT, UserError

if TYPE_CHECKING:
    from launcher.emit import Launch
    from launcher.emit import Via as Starter
    from launcher.job import JobSpec
    from launcher.plan import Plan


def launch_here(spec: JobSpec, made: Plan, spec_path: Path, overrides: list[str], via: Via, dry_run: bool) -> None:
    from launcher.emit import launch_command
    from launcher.job.packages import check_packages
    from launcher.plan.explain import explain
    from launcher.spawn import free_port, run_until_done

    starter: Starter = "deepspeed" if via is Via.deepspeed else "torchrun"

    def command() -> Launch:
        return launch_command(made, str(spec_path), tuple(overrides), os.cpu_count() or 1, free_port(), starter)

    if dry_run:
        typer.echo(explain(made))
        for name, text in emitted(spec, made).items():
            if name not in ("plan.json", "accelerate.yaml"):  # said above; not what is run here
                typer.echo(f"\n# {name}\n{text}")
        typer.echo(f"\n# command\n{command()}")
        return

    check_packages(spec)

    def start(look: Callable[[int], None]) -> int:
        ready = command()
        return run_until_done(ready.argv, ready.environment, look=look)

    raise typer.Exit(run_chain(spec, via.value, (platform.node(),), start))


def run_chain(
    spec: JobSpec, via: str, nodes: tuple[str, ...], start: Callable[[Callable[[int], None]], int], told: bool = True
) -> int:
    """Start, and start again while failures may pass; the run's own exit code. start: takes what looks at the ranks.

    told: whether ranks are below this process, so that one that vanishes is seen from here.
    """
    from launcher.attempt.chain import Attempt, attempts, began, cut_off, last_step
    from launcher.attempt.ending import close
    from launcher.attempt.records import clear_records
    from launcher.attempt.watch import RankWatch
    from launcher.errors import EXIT_PREEMPTED

    output_dir, first = Path(spec.output_dir), time.time()
    _refuse_a_folder_that_is_none(output_dir)
    cut_off(output_dir, {})
    while True:
        step = last_step(output_dir)
        began(output_dir, Attempt(via, "", nodes, time.time(), steps=(step, step)))
        clear_records(output_dir)
        (output_dir / "outcome.json").unlink(missing_ok=True)
        watch = RankWatch(output_dir)
        code = start(watch.look if told else lambda _: None)
        watch.ended(code)
        chain = [attempt for attempt in attempts(output_dir) if attempt.began >= first]
        closed = close(spec, chain, code)
        if closed.verdict.action != "restart" or closed.code == EXIT_PREEMPTED:
            return closed.code  # told to stop: whoever said so knows when to go on


def _refuse_a_folder_that_is_none(output_dir: Path) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError("output_dir", ABSENT, f"{output_dir} is a file", "name a folder")
