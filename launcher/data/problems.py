"""Records that will not do: each one counted, the first ones told in full."""

from __future__ import annotations

from typing import Any

from launcher.errors import ABSENT, DataError, Problem

TOLD = 5
"""Problems that an error tells in full."""

LISTED = 50
"""Skipped records that the index lists."""


class Problems:
    def __init__(self, *, skips: bool) -> None:
        self._skips = skips
        self._listed: list[Problem] = []
        self.count = 0

    def add(self, error: DataError) -> None:
        self.count += 1
        if len(self._listed) < LISTED:
            self._listed.append(error.problems[0])

    @property
    def stops(self) -> bool:
        """Whether nothing will come of this input: only more problems are looked for."""
        return self.count > 0 and not self._skips

    def check(self, option: str) -> None:
        """DataError telling what was found under `option`, unless bad records are skipped."""
        if not self.stops:
            return
        told = self._listed[:TOLD]
        if self.count > len(told):
            rule = f"holds {self.count - len(told):,} more records that will not do"
            told = [*told, Problem(option, ABSENT, rule, "mend them, or leave them out with data.on_error: skip")]
        raise DataError.several(told)

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "first": [str(problem) for problem in self._listed]}
