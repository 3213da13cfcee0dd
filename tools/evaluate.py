"""Scores a model folder on a file of texts, or on the held-out samples of prepared data; also `fleetune eval`.

    python -m tools.evaluate out --task causal_lm --data book.txt --json
    python -m tools.evaluate out --prepared runs/a/data

Reading, rows and scores are those of training (`launcher.data`, `launcher.task`); this file opens the model, refuses
what would be scored wrongly, and shows the result. Batches are streamed: no logits are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from launcher.data.formats import Columns
from launcher.data.prepared import PreparedData, damages, read_index
from launcher.data.read import in_lists, read_records
from launcher.data.sources import find_sources
from launcher.data.tokenizer import TokenizerSource, load_tokenizer, local_files, num_ids
from launcher.errors import ABSENT, EXIT_DONE, DataError, ModelError, UserError
from launcher.job import JobSpec, parse_spec
from launcher.job.load import apply_override
from launcher.job.tasks import FIELDS, WRITERS, belongs
from launcher.task import Facts, Record, Row, Task, logits_of, task_of
from launcher.task.preference import Preference
from launcher.train.engine import model_inputs
from launcher.train.reference import answer_logps
from tools.open_model import check_length, check_vocabulary, labels_of, open_model

TASKS = tuple(FIELDS)
DEFAULT_SEQ_LEN = 1024  # tokens, where the model takes as many: the context of the published GPT-2 perplexities
TOKENIZE_RECORDS = 256  # records tokenised at once: enough for the tokenizer's threads, little beside a batch
_FILE_OPTIONS = ("text_column", "label_column", "seq_len", "format", "sample_by", "packing", "set")


@dataclass(frozen=True)
class Scores:
    """What a model scored on how many samples (blocks of tokens, or texts)."""

    num_samples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Samples:
    """Rows to score, as the task makes them."""

    task: Task
    rows: Iterable[Row]
    count: int | None
    """None where it is known only once they are read."""
    origin: str
    """The option that named them, for errors."""


def evaluate(
    model: Any,
    task: Task,
    rows: Iterable[Row],
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
    reference: Any = None,
) -> Scores:
    """Loss and scores of `rows`, in batches of `batch_size` on the model's device; the model is left in eval mode.

    progress: called with the number of samples scored so far. reference: for `preference`, the model that the other is
    measured against.
    """
    model.eval()
    metrics, num_samples, pad_id = task.metrics(), 0, _pad_id(model)
    with torch.inference_mode():
        for some in _batches(rows, batch_size):
            numbered = [{"sample": num_samples + i, **row} for i, row in enumerate(some)]
            batch = _batch(model, task, numbered, pad_id, reference)
            metrics.update(logits_of(model(**model_inputs(batch, model.config))), batch)
            num_samples += len(some)
            if progress is not None:
                progress(num_samples)
    return Scores(num_samples, metrics.result())


def _batch(model: Any, task: Task, rows: list[Row], pad_id: int, reference: Any) -> dict[str, torch.Tensor]:
    if isinstance(task, Preference):
        logps = answer_logps(
            task,
            rows,
            pad_id,
            model.device,
            lambda batch: logits_of(reference(**model_inputs(batch, reference.config))),
        )
        rows = [{**row, "reference": tuple(pair)} for row, pair in zip(rows, logps, strict=True)]
    return {name: tensor.to(model.device) for name, tensor in task.collate(rows, pad_id).items()}


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while some := list(islice(iterator, size)):
        yield some


def _pad_id(model: Any) -> int:
    """The mask hides it. Classifiers of decoders find a text's end by the config's own, which thus must be set."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    return int(model.config.pad_token_id)


def held_out_rows(data: PreparedData) -> Iterator[Row]:
    """The validation samples of prepared data, in their order."""
    split = data.split("validation")
    for i in range(len(split)):
        yield from split.rows(np.array([i]))


def open_data(folder: Path) -> PreparedData:
    """Prepared data without its spec. DataError when the folder holds none, or it is damaged."""
    index = read_index(folder)
    if index is None:
        raise DataError(
            "--prepared", str(folder), "holds no prepared data", "give a folder that `fleetune prepare` made"
        )
    problems = damages(folder, index, verify=False)
    if problems:
        raise DataError.several(problems)
    return PreparedData(folder, index)


def _prepared_samples(model: Any, options: argparse.Namespace) -> Samples:
    data = open_data(options.prepared)
    _same_tokenizer(options.model, data)
    check_vocabulary(model, data.vocab_size, "--prepared")
    check_length(model, data.index["seq_len"], "--prepared")
    spec = _prepared_spec(data)
    task = task_of(spec, data.facts(spec.task))
    if data.labels is not None and data.labels != labels_of(model):
        rule = f"has the labels {', '.join(data.labels)}, the model {', '.join(labels_of(model))}"
        raise DataError("--prepared", str(options.prepared), rule, "give data prepared for this model")
    return Samples(task, held_out_rows(data), len(data.split("validation")), "--prepared")


def _same_tokenizer(folder: Path, data: PreparedData) -> None:
    """Ids of another tokenizer name other pieces. A model folder without a tokenizer is taken at its word."""
    source = TokenizerSource("MODEL", str(folder))
    if not local_files(source):
        return
    theirs = load_tokenizer(TokenizerSource("--prepared", str(data.tokenizer_dir)))
    if load_tokenizer(source).get_vocab() != theirs.get_vocab():
        rule = "was prepared with another tokenizer than the model's"
        raise DataError("--prepared", str(data.folder), rule, "score the texts themselves: --data FILE")


def _file_samples(model: Any, options: argparse.Namespace) -> Samples:
    tokenizer = load_tokenizer(TokenizerSource("MODEL", str(options.model)))
    check_vocabulary(model, num_ids(tokenizer), "MODEL")
    limit = getattr(model.config, "max_position_embeddings", None) or DEFAULT_SEQ_LEN
    seq_len = options.seq_len or min(DEFAULT_SEQ_LEN, limit)
    check_length(model, seq_len, "--seq-len")
    if options.task in WRITERS and tokenizer.eos_token_id is None:
        rule = "has a tokenizer without an end-of-text token (eos), with which a text ends"
        raise ModelError("MODEL", str(options.model), rule, "give the tokenizer an eos_token")
    spec = _file_spec(options, seq_len)
    labels = labels_of(model) if belongs("task", "labels", options.task) else ()
    facts = Facts(labels, (), num_ids(tokenizer), tokenizer.mask_token_id)
    task = task_of(spec, facts)
    rows = task.rows(in_lists(_records(spec, labels), TOKENIZE_RECORDS), tokenizer)
    return Samples(task, rows, None, "--data")


def _prepared_spec(data: PreparedData) -> JobSpec:
    """The part of the spec that prepared data remember: what was learnt, and how it was cut."""
    packing = {"packing": data.index["packing"]} if data.index["packing"] else {}
    return _spec(data.index["task_options"], {"train": str(data.folder), **packing}, data.index["seq_len"], [])


def _file_spec(options: argparse.Namespace, seq_len: int) -> JobSpec:
    """A job that would read these files so; its options are checked like any job's."""
    given = {key: getattr(options, key) for key in ("format", "sample_by", "packing") if getattr(options, key)}
    columns = {"text": options.text_column, "label": options.label_column}
    given["columns"] = {field: name for field, name in columns.items() if name}
    return _spec({"name": options.task}, {"train": list(options.data), **given}, seq_len, options.set or [])


def _spec(task: dict[str, Any], data: dict[str, Any], seq_len: int, overrides: Sequence[str]) -> JobSpec:
    training = {"seq_len": seq_len, "global_batch_size": 1, "max_steps": 1}
    raw = {"output_dir": "none", "model": {"path": "none"}, "task": task, "data": data, "training": training}
    for override in overrides:
        apply_override(raw, override)
    return parse_spec(raw)


def _records(spec: JobSpec, labels: tuple[str, ...]) -> Iterator[Record]:
    """The records of the files, each label one that the model knows."""
    assert not isinstance(spec.data.train, str)
    sources = find_sources("--data", spec.data.train, spec.data.format)
    columns = Columns.of(spec)
    for record in read_records(sources, columns, spec.data.sample_by):
        unknown = [label for label in record.labels if labels and label not in labels]
        if unknown:
            rule = f"is not a label of the model, which knows {', '.join(labels)}"
            where = f"{record.where}: {columns.name('label')}"
            raise DataError(where, unknown[0], rule, "score it on texts of these labels")
        yield record


def _check_options(options: argparse.Namespace) -> None:
    """One source of samples; an option that could not take effect is refused."""
    if (options.data is None) == (options.prepared is None):
        rule = "need exactly one of the two"
        raise DataError("--data and --prepared", ABSENT, rule, "give files to score, or a folder of prepared data")
    idle = [name for name in _FILE_OPTIONS if getattr(options, name) is not None] if options.prepared else []
    if idle:
        option = f"--{idle[0].replace('_', '-')}"
        rule = "has no effect on prepared data, which was read and cut before"
        raise DataError(option, getattr(options, idle[0]), rule, "leave it out, or score files with --data")
    for name in ("seq_len", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise DataError(f"--{name.replace('_', '-')}", value, "is not a positive number", "give 1 or more")
    options.task = _task_name(options)
    _check_reference(options)


def _check_reference(options: argparse.Namespace) -> None:
    if options.task == "preference" and options.reference is None:
        rule = "is missing: a preference is measured against the model before it was trained"
        raise DataError("--reference", ABSENT, rule, "give that model's folder")
    if options.task != "preference" and options.reference is not None:
        rule = f"has no effect on {options.task}: it belongs to preference"
        raise DataError("--reference", str(options.reference), rule, "leave it out")


def _task_name(options: argparse.Namespace) -> str:
    """`--task`, which prepared data knows of itself."""
    found = open_data(options.prepared).index["task"] if options.prepared else None
    if options.task is None and found is None:
        raise DataError("--task", ABSENT, "is missing", f"give one of {', '.join(TASKS)}")
    if found is not None and options.task not in (None, found):
        raise DataError("--task", options.task, f"is not what {options.prepared} was prepared for", f"use {found}")
    return str(options.task or found)


def _auto_class(options: argparse.Namespace) -> str:
    """The head that the task asks for; nothing of the data matters for that."""
    spec = _spec({"name": options.task}, {"train": "none"}, DEFAULT_SEQ_LEN, [])
    return task_of(spec, Facts(labels=("one", "other"))).auto_class


def _run(options: argparse.Namespace) -> Scores:
    _check_options(options)
    model = open_model(options.model, _auto_class(options), options.task)
    reference = None if options.reference is None else open_model(options.reference, _auto_class(options), options.task)
    samples = (_prepared_samples if options.prepared else _file_samples)(model, options)
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("scoring", total=samples.count)
        scores = evaluate(
            model,
            samples.task,
            samples.rows,
            options.batch_size,
            lambda done: bar.update(shown, completed=done),
            reference,
        )
    if scores.num_samples == 0:
        found = ", ".join(options.data or [str(options.prepared)])
        raise DataError(samples.origin, found, "holds no sample to score", "give files with text in them")
    return scores


def _shown(options: argparse.Namespace, scores: Scores) -> str:
    source = str(options.prepared) if options.prepared else ", ".join(options.data)
    if options.json:
        said = {"task": options.task, "model": str(options.model), "data": source}
        return json.dumps({**said, "num_samples": scores.num_samples, "metrics": scores.metrics}) + "\n"
    lines = [f"{options.model} on {source}: {scores.num_samples} samples"]
    return "\n".join([*lines, *(f"  {name:<18} {value:.6g}" for name, value in scores.metrics.items())]) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.evaluate", description=str(__doc__).partition("\n")[0])
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder that transformers opens")
    parser.add_argument("--task", choices=TASKS, help="what is scored; prepared data knows it")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="files, folders or globs, as in a job spec")
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="prepared data: its held-out samples are scored")
    parser.add_argument("--text-column", help="default: text")
    parser.add_argument("--label-column", help="default: label")
    parser.add_argument("--format", help="as in a job spec; default: by the suffix")
    parser.add_argument("--sample-by", choices=("document", "paragraph", "line"), help="text files; default: document")
    parser.add_argument("--packing", choices=("concat", "none"), help="causal_lm, as in a job spec; default: concat")
    parser.add_argument(
        "--seq-len", type=int, help=f"tokens per sample; default: the model's, at most {DEFAULT_SEQ_LEN}"
    )
    parser.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="a key of task or data as in a job spec: task.doc_stride=64"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="samples at once (default: %(default)s)")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="preference: the model before it was trained")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)
    try:
        sys.stdout.write(_shown(options, _run(options)))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main())
