"""What a batch script asks before and after its ranks: `scheduled.py began|ended`. One line of answer on standard output.

began: closes an attempt that was cut off, notes this one, and answers the nodes that this job must not run on.
ended: `code action nodes`: the run's own exit code, `finish`, `restart` or `fail`, and the nodes to leave out then.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Starting a file puts its own folder first on sys.path, where launcher's modules could shadow others' names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import re
import time
from dataclasses import replace
from datetime import datetime

from launcher.attempt.chain import Attempt, attempts, bad_nodes, began, cut_off, last_step
from launcher.attempt.ending import close
from launcher.errors import EXIT_USER, UserError
from launcher.job import JobSpec, load_spec
from launcher.spawn import run_captured


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        spec = load_spec(options.spec, options.set)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.stdout.write("" if options.what == "began" else f"{EXIT_USER} fail\n")
        return 0 if options.what == "ended" else EXIT_USER
    answer = _began(spec, options.nodes) if options.what == "began" else _ended(spec, options.code)
    sys.stdout.write(answer + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Keeps the chain of attempts of a batch job.")
    parser.add_argument("what", choices=("began", "ended"))
    parser.add_argument("--spec", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--nodes", default="", help="began: their names, one a line")
    parser.add_argument("--code", type=int, default=0, help="ended: what srun left with")
    return parser


def _began(spec: JobSpec, nodes: str) -> str:
    output_dir, job = Path(spec.output_dir), os.environ["SLURM_JOB_ID"]
    cut_off(output_dir, _lost_nodes(output_dir))
    step = last_step(output_dir)
    here = tuple(nodes.split())
    bad = bad_nodes(_of_job(output_dir, job))
    if bad and set(bad) & set(here):
        return ",".join(bad)
    began(output_dir, Attempt("slurm", job, here, time.time(), steps=(step, step)))
    (output_dir / "outcome.json").unlink(missing_ok=True)
    return ""


def _ended(spec: JobSpec, code: int) -> str:
    output_dir = Path(spec.output_dir)
    chain = _of_job(output_dir, os.environ["SLURM_JOB_ID"])
    closed = close(spec, chain, code)
    return f"{closed.code} {closed.verdict.action} {','.join(closed.verdict.bad_nodes)}".rstrip()


def _of_job(output_dir: Path, job: str) -> list[Attempt]:
    """The attempts of this submission: it keeps its number when it is queued again."""
    return [replace(attempt) for attempt in attempts(output_dir) if attempt.job == job]


def _lost_nodes(output_dir: Path) -> dict[str, str]:
    """Of the nodes of an attempt that never ended, those that Slurm says are down, or were started again since."""
    chain = attempts(output_dir)
    if not chain or not chain[-1].was_cut_off:
        return {}
    last, lost = chain[-1], {}
    shown = run_captured(["scontrol", "-o", "show", "node", ",".join(last.nodes)]).stdout
    for line in shown.splitlines():
        facts = dict(re.findall(r"(\w+)=(\S+)", line))
        name = facts.get("NodeName", "")
        if re.search(r"DOWN|FAIL|NOT_RESPONDING|\*", facts.get("State", "")):
            lost[name] = "went down"
        elif _seconds(facts.get("SlurmdStartTime", "")) > last.began:
            lost[name] = "was started again"
    return lost


def _seconds(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


if __name__ == "__main__":
    raise SystemExit(main())
