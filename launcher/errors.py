"""Every error that fleetune raises on purpose.

FleetuneError                 exit code 1: ours
├── UserError                 exit code 2: the user's to fix; a list of problems, each with its way out
│   ├── SpecError             the job spec, a preset or a cluster file
│   ├── PlanError             a spec that is well formed but cannot be carried out
│   ├── ModelError            a model folder or config that cannot be opened
│   ├── DataError             corpus, labels, tokenizer, prepared data
│   │   └── Interrupted       a full disk, a lost network: what was finished is kept, the same command goes on
│   └── CheckpointError       a checkpoint that is missing, incomplete or of another run
└── Preempted                 exit code 75: told to stop, saved, can be started again
"""

from __future__ import annotations

from typing import Any, NamedTuple

EXIT_DONE = 0
EXIT_OURS = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130  # Ctrl-C, by the shells' convention of 128 + signal
EXIT_PREEMPTED = 75  # EX_TEMPFAIL in sysexits.h; Slurm scripts requeue on it


class _Absent:
    """Stays the one it is when an error comes back from another process."""

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()  # "no value to show", since None and "" are values


class Problem(NamedTuple):
    """One thing that is wrong: where, what was found, the rule it breaks, and how to get out."""

    path: str
    value: Any
    rule: str
    way_out: str

    def __str__(self) -> str:
        found = "" if self.value is ABSENT else f"{_shown(self.value)} "
        return f"{self.path}: {found}{self.rule}; {self.way_out}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value and value.isprintable() and " " not in value else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


class FleetuneError(Exception):
    exit_code = EXIT_OURS


class UserError(FleetuneError):
    """`raise DataError(path, value, rule, way_out)`, or `DataError.several(problems)`."""

    exit_code = EXIT_USER

    def __init__(self, path: str, value: Any, rule: str, way_out: str, *more: Problem) -> None:
        self.problems = (Problem(path, value, rule, way_out), *more)
        super().__init__("\n".join(map(str, self.problems)))

    @classmethod
    def several(cls, problems: list[Problem]) -> UserError:
        return cls(*problems[0], *problems[1:])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).several, (list(self.problems),)


class SpecError(UserError): ...


class PlanError(UserError): ...


class ModelError(UserError): ...


class DataError(UserError): ...


class Interrupted(DataError):
    """Nothing is wrong with the input: the same command, started again, goes on where this one stopped."""


class CheckpointError(UserError): ...


class Preempted(FleetuneError):
    """Raised after the state was saved, so that the entry point can leave with exit code 75."""

    exit_code = EXIT_PREEMPTED
