"""An attempt ends: the run's own code behind its launchers', the first failure on top, the chain's next line, the verdict."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.attempt.chain import Attempt, Verdict, decide, ended, last_step
from launcher.attempt.records import RankRecord, first_failure, read_records
from launcher.errors import EXIT_DONE, EXIT_OURS
from launcher.job.spec import JobSpec


@dataclass(frozen=True)
class Closed:
    code: int
    verdict: Verdict


def close(spec: JobSpec, chain: list[Attempt], code: int) -> Closed:
    """chain: this submission's attempts, the one that ended last. code: what the launcher left with."""
    output_dir, attempt = Path(spec.output_dir), chain[-1]
    failure = first_failure(read_records(output_dir))
    own, message = _outcome(output_dir, attempt.began, code, failure)
    node = failure.host if failure is not None and failure.may_pass and own == EXIT_OURS else ""
    closed = replace(
        attempt,
        ended=time.time(),
        exit_code=own,
        message=message,
        failed_node=node,
        steps=(attempt.steps[0] if attempt.steps else 0, last_step(output_dir)),
    )
    launch = spec.launch
    verdict = decide([*chain[:-1], closed], own, failure, launch.max_restarts, launch.max_requeues)
    ended(output_dir, replace(closed, action=verdict.action))
    if own != EXIT_DONE:
        _say(own, message, failure, verdict)
    return Closed(own, verdict)


def _outcome(output_dir: Path, since: float, code: int, failure: RankRecord | None) -> tuple[int, str]:
    """The run's own exit code and words: launchers report 1 for anything that is not 0."""
    try:
        outcome = json.loads((output_dir / "outcome.json").read_text())
        is_of_now = outcome["time"] >= since
    except (OSError, ValueError, KeyError):
        outcome, is_of_now = {}, False
    if code == EXIT_DONE:
        return EXIT_DONE, "done"
    if is_of_now and outcome["exit_code"] not in (EXIT_DONE, EXIT_OURS):
        return int(outcome["exit_code"]), str(outcome.get("message", ""))
    if failure is not None:
        return EXIT_OURS, str(failure)
    if is_of_now and outcome["exit_code"] == EXIT_OURS:
        return EXIT_OURS, str(outcome.get("message", ""))
    return (
        EXIT_OURS,
        f"the launcher ended with {code}, and no rank left a word; see the lines above and {output_dir}/logs",
    )


def _say(code: int, message: str, failure: RankRecord | None, verdict: Verdict) -> None:
    """The cause first; what else failed is its echo, and stays in the logs."""
    cause = f"fleetune: exit code {code}: {message}"
    sys.stderr.write(
        f"{cause}\nfleetune: {'trying again' if verdict.action == 'restart' else 'not again'}: {verdict.reason}\n"
    )
    if failure is not None and code == EXIT_OURS:
        sys.stderr.write(f"fleetune: its log: logs/rank-{failure.rank:05d}.log in the run's folder\n")
