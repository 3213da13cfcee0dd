"""`fleetune status RUN`: the chain of attempts of one run, whoever started them, as one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.command.options import AsJson
from launcher.errors import ABSENT, UserError

if TYPE_CHECKING:
    from launcher.attempt.chain import Attempt


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a run.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Say how a run stands: every attempt, what ended it, the steps done, the newest checkpoint."""
    from launcher.attempt.chain import ATTEMPTS, attempts

    chain = attempts(run)
    if not chain:
        rule = f"has no {ATTEMPTS}, so no launch of fleetune wrote there"
        raise UserError(str(run), ABSENT, rule, "give the output_dir of a run that `fleetune launch` started")
    told = summary(run, chain)
    typer.echo(json.dumps(told, indent=2) if as_json else _table(run, chain, told))


def summary(run: Path, chain: list[Attempt]) -> dict[str, Any]:
    """The run as one: `state step checkpoint seconds attempts`."""
    from launcher.attempt.chain import last_step

    saved = sorted((path.parent.name for path in run.glob("checkpoints/step-*/manifest.json")), reverse=True)
    return {
        "state": _state(chain[-1]),
        "step": last_step(run),
        "checkpoint": saved[0] if saved else None,
        "seconds": sum((attempt.ended or time.time()) - attempt.began for attempt in chain),
        "attempts": [
            {
                "via": attempt.via,
                "job": attempt.job,
                "nodes": list(attempt.nodes),
                "began": attempt.began,
                "ended": attempt.ended,
                "steps": attempt.steps,
                "exit_code": attempt.exit_code,
                "message": attempt.message,
                "failed_node": attempt.failed_node,
            }
            for attempt in chain
        ],
    }


def _state(last: Attempt) -> str:
    """In words; a scheduler is asked where it is at hand."""
    from launcher.errors import EXIT_DONE, EXIT_PREEMPTED

    asked = _queue(last.job) if last.job else ""
    if last.was_cut_off:
        return asked or ("running, or cut off without a word" if not last.job else "cut off, and not in the queue")
    if last.exit_code == EXIT_DONE:
        return "done"
    if asked:
        return asked
    return "stopped and saved: start it again to go on" if last.exit_code == EXIT_PREEMPTED else "failed"


def _queue(job: str) -> str:
    from launcher.spawn import run_captured

    try:
        done = run_captured(["squeue", "-h", "-j", job, "-o", "%T (%R)"])
    except FileNotFoundError:
        return ""
    return done.stdout.strip().lower().partition("\n")[0] if done.returncode == 0 else ""


def _table(run: Path, chain: list[Attempt], told: dict[str, Any]) -> str:
    from launcher.units import show_time

    lines = [f"{run}: {told['state']}", f"  step {told['step']}, newest checkpoint {told['checkpoint'] or 'none'}"]
    lines.append(f"  {len(chain)} attempts, {show_time(told['seconds'])} together")
    for number, attempt in enumerate(chain, start=1):
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.began))
        lasted = show_time((attempt.ended or time.time()) - attempt.began)
        where = f"{attempt.via} {attempt.job}".strip() + f" on {_some(attempt.nodes)}"
        steps = f"steps {attempt.steps[0]} to {attempt.steps[1]}" if attempt.ended and attempt.steps else "no end yet"
        end = "" if attempt.was_cut_off else f": {attempt.exit_code}, {attempt.message}"
        lines.append(f"  {number}. {began}, {lasted}, {where}, {steps}{end}")
    return "\n".join(lines)


def _some(nodes: tuple[str, ...]) -> str:
    return ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")
