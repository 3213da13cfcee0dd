"""A CSV table of published runs, read strictly: each value that cannot be used is named with its line and column."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ABSENT, DataError
from launcher.job.cluster import Cluster, load_cluster

GPUS: dict[str, tuple[str, float | None]] = {
    "a100_40gb": ("a100-40", None),
    "a100_80gb": ("a100-80", None),
    "h100_80gb": ("h100-80", None),
    "h100_96gb_500w": ("h100-80", 95.0),
}
"""Name in a table -> cluster file, and GiB where this part has another memory (torchtitan's H100s: 96 GB, 500 W)."""
FLAGS = {"true": True, "false": False}


@dataclass(frozen=True)
class Row:
    """One run; each reader raises `DataError` for a value that it cannot read."""

    table: Path
    line: int
    text: dict[str, str]

    def problem(self, column: str, rule: str, way_out: str) -> DataError:
        value = self.text.get(column)
        return DataError(f"{self.table}:{self.line}: {column}", ABSENT if value is None else value, rule, way_out)

    def positive(self, column: str) -> float:
        try:
            value = float(self._cell(column))
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise self.problem(column, "is not a number above 0", "mend the row")
        return value

    def count(self, column: str) -> int:
        value = self.positive(column)
        if value != int(value):
            raise self.problem(column, "is not a whole number", "mend the row")
        return int(value)

    def flag(self, column: str) -> bool:
        return FLAGS[self.choice(column, tuple(FLAGS))]

    def choice(self, column: str, known: tuple[str, ...]) -> str:
        value = self._cell(column)
        if value not in known:
            raise self.problem(column, "is not known here", f"give one of {', '.join(known)}")
        return value

    def _cell(self, column: str) -> str:
        if column not in self.text:
            where, rule = f"{self.table}: {column}", "is a column that the table does not have"
            raise DataError(where, ABSENT, rule, f"add it; found: {', '.join(self.text)}")
        return self.text[column]


def read_table(path: Path) -> list[Row]:
    """The rows below the header; raises `DataError` for a file that is no such table, or an empty one."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.reader(file, strict=True)
            header = next(lines, [])
            rows = [_row(path, lines.line_num, header, cells) for cells in lines if cells]
    except OSError as error:
        raise DataError(str(path), ABSENT, f"cannot be read ({error.strerror})", "give a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(str(path), ABSENT, f"is not CSV in UTF-8 ({error})", "give a CSV file") from None
    if not rows:
        raise DataError(str(path), ABSENT, "holds no run", "give a header and one row per run")
    return rows


def _row(path: Path, line: int, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        rule = f"has {len(cells)} cells where the header has {len(header)}"
        raise DataError(f"{path}:{line}", ABSENT, rule, "mend the row; quote a cell with a comma in it")
    return Row(path, line, dict(zip(header, cells, strict=True)))


def cluster_of(row: Row) -> Cluster:
    """The facts of the row's GPU."""
    name, memory_gib = GPUS[row.choice("gpu", tuple(GPUS))]
    cluster = load_cluster(name)
    if memory_gib is None:
        return cluster
    return cluster.model_copy(update={"gpu": cluster.gpu.model_copy(update={"memory_gib": memory_gib})})
