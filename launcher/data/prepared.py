"""Prepared data, opened for training: an ordinary `datasets` folder plus `index.json`, read by memory map.

`index.json` is written last and is the proof that the folder is complete. Rows are views of the mapped files: memory
grows neither with the data nor with the number of ranks on a machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checksum import file_digest
from launcher.data.fetched import FetchedShards, Origin
from launcher.data.fingerprint import options_fingerprint
from launcher.data.mapped import PreparedSplit
from launcher.errors import ABSENT, DataError, Problem
from launcher.job.spec import JobSpec, TaskSection, is_url
from launcher.task import Facts

INDEX_NAME = "index.json"
INDEX_VERSION = 2
_MADE_BY = "run `fleetune prepare` with the spec of this run"
_MADE_AGAIN = "make it again with `fleetune prepare --force`"


@dataclass(frozen=True)
class PreparedData:
    folder: Path
    index: dict[str, Any]
    origin: Origin | None = None
    """Where it comes from, if not from the folder: then this keeps what was fetched."""

    @property
    def fingerprint(self) -> str:
        return str(self.index["fingerprint"])

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes by id; None where the task has none."""
        return None if self.index["labels"] is None else tuple(self.index["labels"])

    def facts(self, task: TaskSection) -> Facts:
        """What the task learns from the data; labels are counted only for a task that asks for it."""
        facts = facts_of(self.index)
        if task.class_weights != "balanced":
            return facts
        return facts._replace(label_counts=self.split("train").label_counts(len(facts.labels)))

    def spec(self) -> JobSpec:
        """The part of the spec that prepared data remember: what is learnt, and how it was cut."""
        packing = {"packing": self.index["packing"]} if self.index["packing"] else {}
        return JobSpec.model_validate(
            {
                "output_dir": str(self.folder),
                "model": {"from_config": {}},
                "task": self.index["task_options"],
                "data": {"train": str(self.folder), **packing},
                "training": {"seq_len": self.index["seq_len"], "global_batch_size": 1, "max_steps": 1},
            }
        )

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self.index["vocab_size"])

    @property
    def pad_id(self) -> int:
        return int(self.index["pad_id"])

    @property
    def eos_id(self) -> int | None:
        """None for a tokenizer without an end-of-text token, as BERT's are."""
        return None if self.index["eos_id"] is None else int(self.index["eos_id"])

    @property
    def tokenizer_dir(self) -> Path:
        return self.folder / "tokenizer"

    def split(self, name: str) -> PreparedSplit:
        """`train` or `validation`; DataError if nothing was held out."""
        if name not in self.index["splits"]:
            way_out = "set data.validation, or a data.validation_fraction above 0, and prepare again"
            raise DataError(str(self.folder), ABSENT, f"has no {name} samples", way_out)
        entry = self.index["splits"][name]
        store = FetchedShards(self.origin, name, entry) if self.origin else None
        return PreparedSplit(self.folder / name, entry, store)


def facts_of(index: dict[str, Any]) -> Facts:
    """What an index says to a task; the counts of labels stand in the samples."""
    return Facts(tuple(index["labels"] or ()), (), index["vocab_size"], index["mask_id"])


def open_prepared(spec: JobSpec, *, verify: bool = False) -> PreparedData:
    """The prepared data of a spec. DataError if it is missing, of other options, or damaged.

    Sizes are always checked; `verify` also reads every shard and compares its checksum. What lies behind a URL is
    checked as it comes.
    """
    origin = Origin.of(spec.prepared_dir, spec.data) if is_url(spec.prepared_dir) else None
    folder = origin.folder if origin else Path(spec.prepared_dir)
    if origin:
        origin.fetch_index()
    index = read_index(folder)
    if index is None:
        raise DataError("data.prepared", str(folder), "holds no prepared data", _MADE_BY)
    if index["options_fingerprint"] != options_fingerprint(spec):
        rule = "was prepared with other options (task, data or seq_len)"
        way_out = "run `fleetune prepare --force`, or give another folder as data.prepared"
        raise DataError("data.prepared", spec.prepared_dir, rule, way_out)
    if origin:
        for entry in index["splits"].values():
            origin.check_room(entry)
        origin.fetch_tokenizer(index)
        return PreparedData(folder, index, origin)
    problems = damages(folder, index, verify=verify)
    if problems:
        raise DataError.several(problems)
    return PreparedData(folder, index)


def open_folder(folder: Path) -> PreparedData:
    """Prepared data without its spec. DataError when the folder holds none, or it is damaged."""
    index = read_index(folder)
    if index is None:
        rule, way_out = "holds no prepared data", "give a folder that `fleetune prepare` made"
        raise DataError("data.mixture", str(folder), rule, way_out)
    problems = damages(folder, index, verify=False)
    if problems:
        raise DataError.several(problems)
    return PreparedData(folder, index)


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a prepared folder, or None where there is none. DataError if it cannot be understood."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(str(path), ABSENT, "is not valid JSON", _MADE_AGAIN) from None
    version = index.get("version") if isinstance(index, dict) else None
    if version != INDEX_VERSION:
        rule = f"is not the version of prepared data that this release reads ({INDEX_VERSION})"
        raise DataError(f"{path}: version", version, rule, _MADE_AGAIN)
    return dict(index)


def damages(folder: Path, index: dict[str, Any], *, verify: bool) -> list[Problem]:
    """Every shard that is not as it was written, with the samples it holds."""
    problems = []
    for name, entry in index["splits"].items():
        first = 0
        for shard in entry["shards"]:
            path = folder / name / shard["file"]
            damage = _damage(path, shard, verify)
            if damage:
                held = f"{name} samples {first} to {first + shard['num_samples'] - 1}"
                problems.append(Problem(str(path), ABSENT, f"{damage} ({held})", _MADE_AGAIN))
            first += shard["num_samples"]
    return problems


def _damage(path: Path, shard: dict[str, Any], verify: bool) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != shard["size"]:
        return f"has {path.stat().st_size} bytes instead of {shard['size']}"
    if verify and file_digest(path) != shard["blake2b"]:
        return "does not have the checksum it was written with"
    return None
