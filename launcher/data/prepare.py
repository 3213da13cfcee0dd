"""`fleetune prepare`: corpus -> tokenizer, labels, token shards, index. Needs no torch and no accelerator.

Everything is written to a temporary folder beside the target, the index last, and renamed at the end: what is there is
whole. The inputs are read several times (checksum, labels, tokenizer, once per split) so that memory never holds them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import filterfalse
from pathlib import Path
from typing import Any

from launcher.checksum import file_digest
from launcher.data.fingerprint import digest_of, options_fingerprint
from launcher.data.formats import Columns
from launcher.data.prepared import INDEX_NAME, INDEX_VERSION, damages, facts_of, read_index
from launcher.data.read import in_lists, read_records
from launcher.data.shards import Schema, write_json, write_split
from launcher.data.sources import Source, find_sources
from launcher.data.split import is_held_out, share_of
from launcher.data.tokenizer import load_tokenizer, num_ids, tokenizer_digest, tokenizer_source
from launcher.errors import ABSENT, DataError
from launcher.job.spec import JobSpec
from launcher.job.tasks import WRITERS, belongs
from launcher.task import Record, task_of
from launcher.task.templates import give_template

Progress = Callable[[str, int], None]
"""Called with what is being done and how many records (for "reading files": files) are through."""

TOKENIZE_RECORDS = 1000
"""Records given to the tokenizer at once: enough for its threads, little enough for memory."""

TOKENIZER_TEXT_CHARACTERS = 64 << 20
"""Text that a new tokenizer is trained on, at most; of more, a share is drawn by record. SentencePiece keeps it in memory."""


@dataclass(frozen=True)
class PreparedInfo:
    """What `prepare` left behind: the folder, its index, and whether it was made now or found."""

    folder: Path
    index: dict[str, Any]
    is_new: bool


def prepare(spec: JobSpec, *, force: bool = False, progress: Progress | None = None) -> PreparedInfo:
    """Prepare the data of a spec, or find it prepared. DataError for any input or option that will not do.

    Prepared data of other inputs or options is replaced only with `force`; a folder of anything else never is.
    """
    corpus = _Corpus(spec, progress or _no_progress)
    folder = Path(spec.prepared_dir)
    fingerprint = corpus.fingerprint
    if not force:
        found = _found(folder, fingerprint)
        if found is not None:
            return PreparedInfo(folder, found, is_new=False)
    _refuse_foreign(folder)
    building = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    building.mkdir(parents=True)
    try:
        index = _build(corpus, building)
        _put_in_place(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return PreparedInfo(folder, index, is_new=True)


def _no_progress(stage: str, num_done: int) -> None:
    """Nobody watches."""


def _found(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """The index of what is there, if it is whole and the same; None if nothing is there."""
    index = read_index(folder)
    if index is None:
        return None
    if index["fingerprint"] != fingerprint:
        rule = "holds data prepared from other inputs or options"
        way_out = "replace it with `fleetune prepare --force`, or give another folder as data.prepared"
        raise DataError("data.prepared", str(folder), rule, way_out)
    problems = damages(folder, index, verify=False)
    if problems:
        raise DataError.several(problems)
    return index


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not (folder / INDEX_NAME).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        rule = "is in use for something other than prepared data"
        raise DataError("data.prepared", str(folder), rule, "give another folder as data.prepared")


def _put_in_place(building: Path, folder: Path) -> None:
    """Rename; what was there goes aside first, so that at no moment half of each is to be seen."""
    aside = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(aside)
    building.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


class _Corpus:
    """The inputs of a spec, read as often as needed."""

    def __init__(self, spec: JobSpec, progress: Progress) -> None:
        self.spec = spec
        self.progress = progress
        self.train = find_sources("data.train", spec.data.train, spec.data.format)
        held_out = spec.data.validation
        self.validation = find_sources("data.validation", held_out, spec.data.format) if held_out else None
        self.columns = Columns.of(spec)

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
            digests.append(_checksum(source.path))
            self.progress("reading files", number + 1)
        return digests

    def records(self, split: str, stage: str) -> Iterator[Record]:
        """The records of `train` or `validation`, in the order of the files."""
        data = self.spec.data
        own = self.validation if split == "validation" and self.validation is not None else self.train
        records = self._counted(read_records(own, self.columns, data.sample_by), stage)
        if self.validation is not None or data.validation_fraction == 0:
            return records
        pick = filter if split == "validation" else filterfalse
        return pick(lambda record: is_held_out(record, data.validation_fraction), records)

    def _counted(self, records: Iterator[Record], stage: str) -> Iterator[Record]:
        number = 0
        for number, record in enumerate(records, start=1):
            if number % TOKENIZE_RECORDS == 0:
                self.progress(stage, number)
            yield record
        self.progress(stage, number)

    @property
    def splits(self) -> list[str]:
        holds_out = self.validation is not None or self.spec.data.validation_fraction > 0
        return ["train", "validation"] if holds_out else ["train"]

    def find_labels(self) -> tuple[str, ...]:
        """The labels of the training files, sorted: as numbers if all are, so that class 10 is not before 2."""
        records = read_records(self.train, self.columns, self.spec.data.sample_by)
        labels = {label for record in self._counted(records, "finding labels") for label in record.labels}
        are_numbers = all(label.removeprefix("-").isdecimal() for label in labels)
        return tuple(sorted(labels, key=lambda label: (int(label), label) if are_numbers else (0, label)))


def _checksum(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(str(path), ABSENT, f"cannot be read ({error.strerror})", "see its permissions") from None


def _build(corpus: _Corpus, folder: Path) -> dict[str, Any]:
    """Write the whole folder and return its index."""
    labels = _settle_labels(corpus)
    tokenizer = _make_tokenizer(corpus, folder / "tokenizer")
    index: dict[str, Any] = {
        "version": INDEX_VERSION,
        "fingerprint": corpus.fingerprint,
        "options_fingerprint": options_fingerprint(corpus.spec),
        "task": corpus.spec.task.name,
        "task_options": corpus.spec.task.model_dump(mode="json"),
        "labels": labels,
        "seq_len": corpus.spec.training.seq_len,
        "packing": corpus.spec.data.packing if belongs("data", "packing", corpus.spec.task.name) else None,
        "vocab_size": num_ids(tokenizer),
        "eos_id": tokenizer.eos_token_id,
        "pad_id": _pad_id(tokenizer),
        "mask_id": tokenizer.mask_token_id,
        "splits": {},
        "libraries": {name: version(name) for name in ("pyarrow", "sentencepiece", "tokenizers", "transformers")},
    }
    for split in corpus.splits:
        index["splits"][split] = _write(corpus, split, tokenizer, index, folder)
    write_json(folder / "dataset_dict.json", {"splits": corpus.splits})
    write_json(folder / INDEX_NAME, index)
    return index


def _settle_labels(corpus: _Corpus) -> list[str] | None:
    """The names of the classes by id; from here on the reader refuses any other."""
    if not belongs("task", "labels", corpus.spec.task.name):
        return None
    labels = corpus.spec.task.labels or corpus.find_labels()
    if not labels:
        raise _empty(corpus, "train", 0)
    if len(set(labels)) < len(labels):
        raise DataError("task.labels", ", ".join(labels), "names a label twice", "give each class its own name")
    if len(labels) == 1:
        way_out = "give records of two labels or more"
        raise DataError(
            "data.train", ABSENT, f"holds one label only ({labels[0]}): there is nothing to tell apart", way_out
        )
    corpus.columns = replace(corpus.columns, labels=frozenset(labels))
    return list(labels)


def _make_tokenizer(corpus: _Corpus, folder: Path) -> Any:
    wanted = corpus.spec.data.train_tokenizer
    if wanted is not None:
        from launcher.data.train_pieces import train_sentencepiece

        texts = _tokenizer_texts(corpus)
        is_framed = corpus.spec.task.name not in WRITERS
        tokenizer = train_sentencepiece(texts, wanted.kind, wanted.vocab_size, folder, add_cls_sep=is_framed)
        _finish(tokenizer, corpus, folder)
        return tokenizer
    source = tokenizer_source(corpus.spec)
    tokenizer = load_tokenizer(source)
    if corpus.spec.task.name in WRITERS and tokenizer.eos_token_id is None:
        rule = f"has no end-of-text token (eos), with which a text of {corpus.spec.task.name} ends"
        raise DataError(source.option, source.name, rule, "give a tokenizer with an eos_token, or data.train_tokenizer")
    _finish(tokenizer, corpus, folder)
    return tokenizer


def _finish(tokenizer: Any, corpus: _Corpus, folder: Path) -> None:
    """Save it, for conversations with the template that writes them out."""
    if belongs("task", "chat_template", corpus.spec.task.name):
        give_template(tokenizer, corpus.spec.task.chat_template)
    tokenizer.save_pretrained(folder)


def _tokenizer_texts(corpus: _Corpus) -> Iterator[str]:
    """The training texts, or of much text a share, drawn by record and so the same on every machine."""
    num_characters = sum(len(record.text) for record in corpus.records("train", "measuring the text"))
    share = min(1.0, TOKENIZER_TEXT_CHARACTERS / max(1, num_characters))
    for record in corpus.records("train", "training the tokenizer"):
        if share_of(record, "tokenizer") < share:
            yield record.text


def _pad_id(tokenizer: Any) -> int:
    """What fills a row; the mask hides it, so any token does where the tokenizer has none for it."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token_id for token_id in known if token_id is not None))


def _write(corpus: _Corpus, split: str, tokenizer: Any, index: dict[str, Any], folder: Path) -> dict[str, Any]:
    num_records = 0

    def counted() -> Iterator[list[Record]]:
        nonlocal num_records
        for some in in_lists(corpus.records(split, f"tokenizing {split}"), TOKENIZE_RECORDS):
            num_records += len(some)
            yield some

    task = task_of(corpus.spec, facts_of(index))
    columns = Schema(task.columns, index["vocab_size"], index["labels"])
    rows = task.rows(counted(), tokenizer)
    entry = write_split(folder / split, rows, columns, digest_of([index["fingerprint"], split]))
    if entry["num_samples"] == 0:
        raise _empty(corpus, split, num_records)
    return {"num_samples": entry["num_samples"], "num_tokens": entry["num_tokens"], "num_records": num_records, **entry}


def _empty(corpus: _Corpus, split: str, num_records: int) -> DataError:
    option = "data.validation" if split == "validation" and corpus.validation is not None else "data.train"
    if num_records > 0:
        way_out = "give longer texts, or a seq_len of 2 or more"
        return DataError(option, ABSENT, f"gives no sample of two tokens from {num_records} records", way_out)
    first = next(read_records(corpus.train, corpus.columns, corpus.spec.data.sample_by), None)
    if first is not None and corpus.validation is None:
        fraction = corpus.spec.data.validation_fraction
        rule = f"leaves no record for {split}"
        return DataError("data.validation_fraction", fraction, rule, "give more records, or data.validation")
    return DataError(option, ABSENT, "holds no record", "give files with text in them")
