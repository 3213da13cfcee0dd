"""A chunk of records -> its rows, in files of its own. What a worker does; chunks are joined in `prepare`.

Chunks are cut by their records alone and joined in their order, so the shards do not depend on who made which chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launcher.checksum import file_digest
from launcher.data.augment import copies_of, masked
from launcher.data.quick import QuickTokenizer
from launcher.data.shards import Schema, num_tokens, record_batches
from launcher.data.split import is_held_out
from launcher.errors import DataError
from launcher.job.spec import JobSpec
from launcher.task import Facts, Record, Row, task_of

CHUNK_RECORDS = 1000
CHUNK_CHARACTERS = 1 << 20
"""A chunk ends with the record that reaches either: a second of work, and some tens of MiB while it is done."""

_JOINED_TOKENS = 1 << 18
"""Documents are joined and cut in pieces of about this size: 2 MiB while it is done."""

_ANY_LENGTH = 1 << 62


class Chunk(NamedTuple):
    number: int
    split: str
    """Where its records go; `train` may have some held out for `validation`."""
    records: list[Record]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}"

    @property
    def origin(self) -> str:
        """Where it begins and ends: a chunk that was found again must be of the same records."""
        return f"{len(self.records)} records, {self.records[0].where} to {self.records[-1].where}"


def in_chunks(records: Iterable[Record], split: str) -> Iterator[Chunk]:
    """The records in order, cut where a chunk is full."""
    held: list[Record] = []
    number = num_characters = 0
    for record in records:
        held.append(record)
        num_characters += len(record.text) + 4 * len(record.parts.get("ids", ()))
        if len(held) == CHUNK_RECORDS or num_characters >= CHUNK_CHARACTERS:
            yield Chunk(number, split, held)
            held, number, num_characters = [], number + 1, 0
    if held:
        yield Chunk(number, split, held)


@dataclass(frozen=True)
class Setting:
    """What every worker is told once."""

    spec: JobSpec
    facts: Facts
    folder: Path
    """Where the files go."""
    tokenizer_folder: Path
    tokenizer_facts: dict[str, Any]

    @property
    def fraction(self) -> float:
        """Of the training records, held out."""
        return 0.0 if self.spec.data.validation is not None else self.spec.data.validation_fraction

    @property
    def is_joined(self) -> bool:
        """Whether documents are joined and cut into blocks, over the ends of chunks."""
        return self.spec.task.name == "causal_lm" and self.spec.data.packing == "concat"


class Encoder:
    """`Encoder(setting)(chunk)` is the chunk's entry in the journal."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._tokenizer = QuickTokenizer(setting.tokenizer_folder, setting.tokenizer_facts)
        spec = _of_whole_documents(setting.spec) if setting.is_joined else setting.spec
        self._task = task_of(spec, setting.facts)
        self._schema = schema_of(setting)

    def __call__(self, chunk: Chunk) -> dict[str, Any]:
        parts = self._parts(chunk)
        files = [self._write(chunk, split, records) for split, records in parts.items() if records]
        return {"name": chunk.name, "origin": chunk.origin, "files": files}

    def _parts(self, chunk: Chunk) -> dict[str, list[Record]]:
        """Each split's share of the records."""
        if chunk.split == "validation" or self._setting.fraction == 0:
            return {chunk.split: chunk.records}
        parts: dict[str, list[Record]] = {"train": [], "validation": []}
        for record in chunk.records:
            is_out = is_held_out(record, self._setting.fraction)
            parts["validation" if is_out else "train"].append(record)
        return parts

    def _write(self, chunk: Chunk, split: str, records: list[Record]) -> dict[str, Any]:
        import pyarrow

        path = self._setting.folder / f"{chunk.name}-{split}.arrow"
        part = path.with_suffix(".part")
        copies = self._copies(records) if split == "train" else []
        counts = {"num_records": len(records), "num_augmented": len(copies), "num_samples": 0, "num_tokens": 0}
        with pyarrow.ipc.new_stream(str(part), self._schema.arrow()) as stream:
            for batch in record_batches(self._rows(records, copies), self._schema):
                stream.write_batch(batch)
                counts["num_samples"] += batch.num_rows
                counts["num_tokens"] += num_tokens(batch)
        part.rename(path)
        return {
            "split": split,
            **counts,
            "file": f"{self._setting.folder.name}/{path.name}",
            "size": path.stat().st_size,
            "blake2b": file_digest(path),
        }

    def _copies(self, records: list[Record]) -> list[Record]:
        options, seed = self._setting.spec.data.augment, self._setting.spec.seed
        return [copy for record in records for copy in copies_of(record, options, seed)] if options else []

    def _rows(self, records: list[Record], copies: list[Record]) -> Iterator[Row]:
        """Of the records, then of their altered copies: the tasks that know copies give one row per record."""
        yield from _foreign_rows(records, self._setting)
        texts = [record for record in records if "ids" not in record.parts]
        yield from self._task.rows([texts], self._tokenizer) if texts else ()
        options, seed = self._setting.spec.data.augment, self._setting.spec.seed
        if options is not None and copies:
            for copy, row in zip(copies, self._task.rows([copies], self._tokenizer), strict=True):
                yield masked(row, copy, options, seed, self._tokenizer)


def _foreign_rows(records: list[Record], setting: Setting) -> Iterator[Row]:
    """Documents that came as token ids: ended like others where they are whole, cut like others."""
    eos_id, length = setting.tokenizer_facts["eos_token_id"], setting.spec.training.seq_len
    for record in records:
        ids = record.parts.get("ids")
        if ids is None:
            continue
        if ids.min() < 0 or ids.max() >= setting.facts.vocab_size:
            rule = f"is not an id of the tokenizer, which has {setting.facts.vocab_size}"
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise DataError(
                f"{record.where}: token", bad, rule, "give the tokenizer they were made with, or token_dtype"
            )
        if record.parts["is_document"] and ids[-1] != eos_id:
            ids = np.append(ids.astype(np.int64), eos_id)
        step = ids.size if setting.is_joined else length
        yield from ({"input_ids": ids[at : at + step]} for at in range(0, ids.size, step))


def schema_of(setting: Setting) -> Schema:
    return Schema(task_of(setting.spec, setting.facts).columns, setting.facts.vocab_size, setting.facts.labels)


def _of_whole_documents(spec: JobSpec) -> JobSpec:
    data = spec.data.model_copy(update={"packing": "none"})
    training = spec.training.model_copy(update={"seq_len": _ANY_LENGTH})
    return spec.model_copy(update={"data": data, "training": training})


def batches_of(paths: Iterable[Path], setting: Setting) -> Iterator[Any]:
    """The record batches of these chunk files, in their order; documents joined where that is asked."""
    batches = (batch for path in paths for batch in _read(path))
    return _joined(batches, setting) if setting.is_joined else batches


def _read(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        yield from stream


def _joined(batches: Iterable[Any], setting: Setting) -> Iterator[Any]:
    """Blocks of exactly `seq_len` tokens of all documents, and what is left over as a shorter one if it has a target."""
    held: list[Any] = []
    num_held, seq_len, schema = 0, setting.spec.training.seq_len, schema_of(setting).arrow()
    for batch in batches:
        tokens = batch.column("input_ids").flatten().to_numpy()
        held.append(tokens)
        num_held += tokens.size
        if num_held >= max(seq_len, _JOINED_TOKENS):
            joined = np.concatenate(held)
            end = num_held - num_held % seq_len
            yield _blocks(joined[:end], seq_len, schema)
            held, num_held = [joined[end:].copy()], num_held - end
    if num_held > 1:
        joined = np.concatenate(held)
        yield _blocks(joined[: num_held - (num_held % seq_len == 1)], seq_len, schema)


def _blocks(tokens: Any, seq_len: int, schema: Any) -> Any:
    import pyarrow

    offsets = np.append(np.arange(0, tokens.size, seq_len), tokens.size).astype(np.int32)
    lists = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(tokens), type=schema.field(0).type)
    return pyarrow.RecordBatch.from_arrays([lists], schema=schema)
