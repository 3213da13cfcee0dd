"""`fleetune prepare`: corpus -> tokenizer, labels, token shards, index. Needs no torch, no accelerator, no process group.

Records are read in order by one process, cut into chunks, and encoded by as many workers as there are cores; the chunks
are joined in their order. Everything is written to a folder beside the target, the index last, and renamed at the end:
what is there is whole, and what a killed process had finished is used by the next.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.checksum import file_digest
from launcher.data.building import Building, locked
from launcher.data.chunks import Chunk, Encoder, Setting, batches_of, schema_of
from launcher.data.corpus import Corpus, Progress, libraries
from launcher.data.fingerprint import digest_of, options_fingerprint
from launcher.data.prepared import INDEX_NAME, INDEX_VERSION, damages, facts_of, read_index
from launcher.data.problems import Problems
from launcher.data.quick import facts_of as tokenizer_facts
from launcher.data.shards import write_batches, write_json
from launcher.data.split import share_of
from launcher.data.tokenizer import TokenizerSource, load_tokenizer, num_ids, tokenizer_source
from launcher.data.workers import run_over
from launcher.errors import ABSENT, DataError, Interrupted
from launcher.job.spec import JobSpec, is_url
from launcher.job.tasks import WRITERS, belongs
from launcher.task.templates import give_template

TOKENIZER_TEXT_CHARACTERS = 64 << 20
"""Text that a new tokenizer is trained on, at most; of more, a share is drawn by record. SentencePiece keeps it in memory."""

_BYTES_PER_WORKER = 2 << 20
"""Input below which another worker process costs more time to start than it saves."""


@dataclass(frozen=True)
class PreparedInfo:
    """What `prepare` left behind: the folder, its index, and whether it was made now or found."""

    folder: Path
    index: dict[str, Any]
    is_new: bool


def prepare(
    spec: JobSpec, *, force: bool = False, num_workers: int | None = None, progress: Progress | None = None
) -> PreparedInfo:
    """Prepare the data of a spec, or find it prepared. DataError for any input or option that will not do.

    Prepared data of other inputs or options is replaced only with `force`; a folder of anything else never is.
    num_workers: processes; left out, one per core, and fewer where the input is small. The shards are the same.
    """
    if is_url(spec.prepared_dir):
        way_out = "prepare into a folder (--out DIR), copy it there with your store's own tool, and train from the URL"
        raise DataError("data.prepared", spec.prepared_dir, "is a URL, where nothing is written", way_out)
    progress = progress or _no_progress
    corpus = Corpus(spec, progress)
    folder = Path(spec.prepared_dir)
    fingerprint = corpus.fingerprint
    found = None if force else _found(folder, fingerprint)
    if found is not None:
        return PreparedInfo(folder, found, is_new=False)
    _refuse_foreign(folder)
    try:
        with locked(folder, lambda: progress("waiting for another process that prepares the same folder", 0)):
            return _prepared(corpus, folder, force, num_workers)
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error})"
        way_out = "make room or mend the file system, and start the same command again: it goes on where it stopped"
        raise Interrupted(str(folder), ABSENT, rule, way_out) from error


def _prepared(corpus: Corpus, folder: Path, force: bool, num_workers: int | None) -> PreparedInfo:
    found = None if force else _found(folder, corpus.fingerprint)  # another process may just have made it
    if found is not None:
        return PreparedInfo(folder, found, is_new=False)
    building = Building(folder, corpus.fingerprint)
    try:
        index = _build(corpus, building, num_workers)
    except Interrupted:
        raise
    except DataError:
        building.remove()  # another input or another option is another building
        raise
    _put_in_place(building.folder / "data", folder)
    building.remove()
    return PreparedInfo(folder, index, is_new=True)


def _default_workers(corpus: Corpus) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, corpus.num_bytes // _BYTES_PER_WORKER))


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


def _build(corpus: Corpus, building: Building, num_workers: int | None) -> dict[str, Any]:
    """Write the whole folder, `data` below the building, and return its index."""
    corpus.fetch(building)
    labels = _settle_labels(corpus, building)
    tokenizer = _make_tokenizer(corpus, building)
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
        "libraries": libraries(),
    }
    chunks_folder = building.folder / "chunks"
    chunks_folder.mkdir(exist_ok=True)
    setting = Setting(
        corpus.spec, facts_of(index), chunks_folder, building.folder / "tokenizer", tokenizer_facts(tokenizer)
    )
    problems: dict[str, Problems] = {}
    entries = _encoded(corpus, building, setting, problems, num_workers or _default_workers(corpus))
    index["skipped"] = {role: found.to_json() for role, found in problems.items() if found.count}
    index["cleaned"] = {role: cleaner.to_json() for role, cleaner in corpus.cleaners.items()}
    _assemble(corpus, building, setting, entries, index)
    return index


def _encoded(
    corpus: Corpus, building: Building, setting: Setting, problems: dict[str, Problems], num_workers: int
) -> list[dict[str, Any]]:
    """The entries of all chunks in their order; those that a former process finished are not made again."""
    entries: dict[str, dict[str, Any] | None] = {}

    def missing() -> Iterator[Chunk]:
        for chunk in corpus.chunks(problems):
            found = building.found(chunk.name)
            entries[chunk.name] = found if found and found["origin"] == chunk.origin else None
            if entries[chunk.name] is None:
                yield chunk

    for entry in run_over(Encoder, setting, missing(), num_workers):
        entries[entry["name"]] = building.note(entry["name"], entry)
    return [entry for entry in entries.values() if entry is not None]


def _assemble(
    corpus: Corpus, building: Building, setting: Setting, entries: list[dict[str, Any]], index: dict[str, Any]
) -> None:
    """Chunks -> shards; the index is written last."""
    folder = building.folder / "data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copytree(setting.tokenizer_folder, folder / "tokenizer")
    for split in corpus.splits:
        corpus.progress(f"writing {split}", 0)
        parts = [part for entry in entries for part in entry["files"] if part["split"] == split]
        batches = batches_of((building.folder / part["file"] for part in parts), setting)
        fingerprint = digest_of([index["fingerprint"], split])
        entry = write_batches(folder / split, batches, schema_of(setting), fingerprint)
        num_records = sum(part["num_records"] for part in parts)
        if entry["num_samples"] == 0:
            raise _empty(corpus, split, num_records, any(entry["files"] for entry in entries))
        totals = {key: entry.pop(key) for key in ("num_samples", "num_tokens")}
        num_augmented = sum(part["num_augmented"] for part in parts)
        index["splits"][split] = {**totals, "num_records": num_records, "num_augmented": num_augmented, **entry}
    index["tokenizer_files"] = [
        {"file": path.name, "size": path.stat().st_size, "blake2b": file_digest(path)}
        for path in sorted((folder / "tokenizer").iterdir())
    ]
    write_json(folder / "dataset_dict.json", {"splits": corpus.splits})
    write_json(folder / INDEX_NAME, index)


def _settle_labels(corpus: Corpus, building: Building) -> list[str] | None:
    """The names of the classes by id; from here on the reader refuses any other."""
    if not belongs("task", "labels", corpus.spec.task.name):
        return None
    found = building.found("labels")
    labels = corpus.spec.task.labels or (found["labels"] if found else corpus.find_labels())
    if not labels:
        raise _empty(corpus, "train", 0, has_records=False)
    if len(set(labels)) < len(labels):
        raise DataError("task.labels", ", ".join(labels), "names a label twice", "give each class its own name")
    if len(labels) == 1:
        way_out = "give records of two labels or more"
        raise DataError(
            "data.train", ABSENT, f"holds one label only ({labels[0]}): there is nothing to tell apart", way_out
        )
    building.note("labels", {"labels": list(labels)})
    corpus.columns = replace(corpus.columns, labels=frozenset(labels))
    return list(labels)


def _make_tokenizer(corpus: Corpus, building: Building) -> Any:
    folder = building.folder / "tokenizer"
    if building.found("tokenizer"):
        return load_tokenizer(TokenizerSource("data.train_tokenizer", str(folder)))
    wanted = corpus.spec.data.train_tokenizer
    if wanted is not None:
        from launcher.data.train_pieces import train_sentencepiece

        texts = _tokenizer_texts(corpus)
        is_framed = corpus.spec.task.name not in WRITERS
        tokenizer = train_sentencepiece(texts, wanted.kind, wanted.vocab_size, folder, add_cls_sep=is_framed)
        _finish(tokenizer, corpus, folder)
        building.note("tokenizer", {"files": [building.described(path) for path in sorted(folder.iterdir())]})
        return tokenizer
    source = tokenizer_source(corpus.spec)
    tokenizer = load_tokenizer(source)
    if corpus.spec.task.name in WRITERS and tokenizer.eos_token_id is None:
        rule = f"has no end-of-text token (eos), with which a text of {corpus.spec.task.name} ends"
        raise DataError(source.option, source.name, rule, "give a tokenizer with an eos_token, or data.train_tokenizer")
    _finish(tokenizer, corpus, folder)
    return tokenizer


def _finish(tokenizer: Any, corpus: Corpus, folder: Path) -> None:
    """Save it, for conversations with the template that writes them out."""
    if belongs("task", "chat_template", corpus.spec.task.name):
        give_template(tokenizer, corpus.spec.task.chat_template)
    tokenizer.save_pretrained(folder)


def _tokenizer_texts(corpus: Corpus) -> Iterator[str]:
    """The training texts, or of much text a share, drawn by record and so the same on every machine."""
    num_characters = sum(len(record.text) for record in corpus.training_records("measuring the text"))
    share = min(1.0, TOKENIZER_TEXT_CHARACTERS / max(1, num_characters))
    for record in corpus.training_records("training the tokenizer"):
        if share_of(record, "tokenizer") < share:
            yield record.text


def _pad_id(tokenizer: Any) -> int:
    """What fills a row; the mask hides it, so any token does where the tokenizer has none for it."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token_id for token_id in known if token_id is not None))


def _empty(corpus: Corpus, split: str, num_records: int, has_records: bool) -> DataError:
    option = "data.validation" if split == "validation" and corpus.validation is not None else "data.train"
    if num_records > 0:
        way_out = "give longer texts, or a seq_len of 2 or more"
        return DataError(option, ABSENT, f"gives no sample of two tokens from {num_records} records", way_out)
    if has_records and corpus.validation is None:
        fraction = corpus.spec.data.validation_fraction
        rule = f"leaves no record for {split}"
        return DataError("data.validation_fraction", fraction, rule, "give more records, or data.validation")
    return DataError(option, ABSENT, "holds no record", "give files with text in them")
