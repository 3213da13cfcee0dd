"""The inputs of a spec: which files, what is in them, read as often as needed and never held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.checksum import file_digest
from launcher.data import remote
from launcher.data.building import Building
from launcher.data.chunks import CHUNK_RECORDS, Chunk, in_chunks
from launcher.data.clean import Cleaner, check_cleaning
from launcher.data.fingerprint import digest_of, options_fingerprint
from launcher.data.formats import Columns
from launcher.data.problems import Problems
from launcher.data.read import read_records
from launcher.data.sources import Source, find_sources
from launcher.data.split import is_held_out
from launcher.data.tokenizer import tokenizer_digest, tokenizer_source
from launcher.errors import ABSENT, DataError
from launcher.job.spec import JobSpec
from launcher.task import Record

Progress = Callable[[str, int], None]
"""Called with what is being done and how many records (for "reading files": files) are through."""


class Corpus:
    """`columns` may be narrowed once the labels are known: from then on the reader refuses any other."""

    def __init__(self, spec: JobSpec, progress: Progress) -> None:
        self.spec = spec
        self.progress = progress
        self.train = find_sources("data.train", spec.data.train, spec.data.format)
        held_out = spec.data.validation
        self.validation = find_sources("data.validation", held_out, spec.data.format) if held_out else None
        self.columns = Columns.of(spec)
        check_cleaning(spec.task.name, spec.data.clean)
        roles = ("train", "validation") if self.validation is not None else ("train",)
        self.cleaners = {role: Cleaner(spec.data.clean) for role in roles} if spec.data.clean else {}

    @cached_property
    def fingerprint(self) -> str:
        """Of the contents of the inputs, the tokenizer and the options."""
        inputs = [[self._checksums(sources)] for sources in (self.train, self.validation or [])]
        learns = self.spec.data.train_tokenizer is not None
        tokenizer = "learnt from the inputs" if learns else tokenizer_digest(tokenizer_source(self.spec))
        return digest_of(["prepared", options_fingerprint(self.spec), inputs, tokenizer])

    def _checksums(self, sources: list[Source]) -> list[str]:
        digests = []
        for number, source in enumerate(sources):
            digests.append(remote.identity(source.url) if source.url else _checksum(source.path))
            self.progress("reading files", number + 1)
        return digests

    def fetch(self, building: Building) -> None:
        """Copy remote files into the building; those that a former process copied are not fetched again."""
        self.train = [self._fetched(source, building) for source in self.train]
        self.validation = self.validation and [self._fetched(source, building) for source in self.validation]

    def _fetched(self, source: Source, building: Building) -> Source:
        if source.url is None:
            return source
        name = f"inputs/{digest_of([source.url])}"
        target = building.folder / name
        if building.found(name) is None:
            self.progress(f"fetching {source.url}", 0)
            target.parent.mkdir(exist_ok=True)
            remote.fetch(source.url, target)
            building.note(name, {"files": [building.described(target)]})
        return replace(source, path=target)

    @property
    def num_bytes(self) -> int:
        """Of the files as they lie on disk."""
        return sum(source.path.stat().st_size for source in (*self.train, *(self.validation or ())))

    @property
    def splits(self) -> list[str]:
        holds_out = self.validation is not None or self.spec.data.validation_fraction > 0
        return ["train", "validation"] if holds_out else ["train"]

    def records_of(self, role: str, problems: Problems) -> Iterator[Record]:
        """The records of `data.train` or `data.validation`, in the order of the files, cleaned as the spec says.

        With `on_error: fail`, what comes after a bad record is only checked, and a DataError at the end tells of all.
        """
        checked = self._checked(role, problems)
        return self.cleaners[role](checked) if role in self.cleaners else checked

    def _checked(self, role: str, problems: Problems) -> Iterator[Record]:
        sources = self.train if role == "train" else self.validation or []
        for record in read_records(sources, self.columns, self.spec.data.sample_by, problems.add):
            if not problems.stops:
                yield record
        problems.check(f"data.{role}")

    def training_records(self, stage: str) -> Iterator[Record]:
        """The records that are not held out."""
        fraction = 0.0 if self.validation is not None else self.spec.data.validation_fraction
        for record in self._counted(self.records_of("train", self._problems()), stage):
            if fraction == 0 or not is_held_out(record, fraction):
                yield record

    def chunks(self, problems: dict[str, Problems]) -> Iterator[Chunk]:
        """All records of all files; `problems` is filled, by role, with what was skipped."""
        for role in ("train", "validation") if self.validation is not None else ("train",):
            problems[role] = self._problems()
            records = self._counted(self.records_of(role, problems[role]), f"tokenizing {role}")
            yield from in_chunks(records, role)

    def find_labels(self) -> tuple[str, ...]:
        """The labels of the training files, sorted: as numbers if all are, so that class 10 is not before 2."""
        records = self.records_of("train", self._problems())
        labels = {label for record in self._counted(records, "finding labels") for label in record.labels}
        are_numbers = all(label.removeprefix("-").isdecimal() for label in labels)
        return tuple(sorted(labels, key=lambda label: (int(label), label) if are_numbers else (0, label)))

    def _problems(self) -> Problems:
        return Problems(skips=self.spec.data.on_error == "skip")

    def _counted(self, records: Iterable[Record], stage: str) -> Iterator[Record]:
        number = 0
        for number, record in enumerate(records, start=1):
            if number % CHUNK_RECORDS == 0:
                self.progress(stage, number)
            yield record
        self.progress(stage, number)


def _checksum(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(str(path), ABSENT, f"cannot be read ({error.strerror})", "see its permissions") from None


def libraries() -> dict[str, Any]:
    """What the shards were made with."""
    from importlib.metadata import version

    return {name: version(name) for name in ("pyarrow", "sentencepiece", "tokenizers", "transformers")}
