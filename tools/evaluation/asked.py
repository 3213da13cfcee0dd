"""What is asked: the options of the command, checked, and the question and records that they name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.data.formats import ROWS, Columns
from launcher.data.prepared import PreparedData, damages, read_index
from launcher.data.read import read_records
from launcher.data.sources import find_sources
from launcher.data.tokenizer import TokenizerSource, load_tokenizer, local_files, num_ids
from launcher.errors import ABSENT, DataError, ModelError
from launcher.job import JobSpec, parse_spec
from launcher.job.load import apply_override
from launcher.job.tasks import FIELDS, WRITERS, belongs
from launcher.task import Facts, Record, Task, task_of
from tools.evaluation.fields import Fields
from tools.evaluation.generation import Generation
from tools.evaluation.learnt import Learnt, held_out_rows, of_rows
from tools.evaluation.likelihood import Cloze, MultipleChoice, Perplexity
from tools.evaluation.opened import Opened, fingerprint_of
from tools.evaluation.pseudo import PseudoPerplexity
from tools.evaluation.values import Part, Question
from tools.open_model import check_length, check_vocabulary, labels_of

LEARNT = tuple(FIELDS)
OWN: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "perplexity": (Perplexity, ("text",)),
    "multiple_choice": (MultipleChoice, ("query", "choices", "gold")),
    "cloze": (Cloze, ("context", "continuation")),
    "generation": (Generation, ("prompt", "answer")),
    "pseudo_perplexity": (PseudoPerplexity, ("text",)),
}
"""Questions that training does not know, and the columns that they read."""
TASKS = (*LEARNT, *OWN)
TEXTS = ("perplexity", "pseudo_perplexity")
DEFAULT_SEQ_LEN = 1024  # tokens, where the model takes as many: the context of the published GPT-2 perplexities

ONLY_FILES = ("text_column", "label_column", "seq_len", "format", "sample_by", "packing", "set", "column", "slice")
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "stride": ("perplexity",),
    "prompt": ("multiple_choice", "cloze", "generation"),
    "max_new_tokens": ("generation",),
    "stop": ("generation",),
    "extract": ("generation",),
    "apply_chat_template": ("generation",),
    "packing": ("causal_lm", "masked_lm"),
    "set": LEARNT,
    "reference": ("preference",),
}
"""Options and the tasks for which they mean something."""


@dataclass(frozen=True)
class Asked:
    question: Question
    examples: Callable[[], Iterator[list[Part]]]
    """The parts of every example; each call reads the data again."""
    count: int | None
    """None where it is known only once they are read."""
    origin: str
    """The option that named the data, for errors."""
    data: str
    data_fingerprint: str


def check_options(options: argparse.Namespace) -> None:
    """One source of samples; an option that could not take effect is refused."""
    if options.harness:
        _check_harness(options)
        return
    if options.include_path is not None:
        raise DataError("--include-path", str(options.include_path), "has no effect without --harness", "leave it out")
    if (options.data is None) == (options.prepared is None):
        rule = "need exactly one of the two"
        raise DataError("--data and --prepared", ABSENT, rule, "give files to score, or a folder of prepared data")
    idle = [name for name in ONLY_FILES if _given(options, name)] if options.prepared else []
    idle = [name for name in idle if options.slice != ["length"] or name != "slice"]
    if idle:
        rule = "has no effect on prepared data, which was read and cut before"
        way_out = "leave it out, or score files with --data"
        raise DataError(_flag(idle[0]), getattr(options, idle[0]), rule, way_out)
    for name in ("seq_len", "batch_size", "max_batch_tokens", "limit", "resamples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise DataError(_flag(name), value, "is not a positive number", "give 1 or more")
    options.task = _task_name(options)
    for name, tasks in ONLY_FOR.items():
        if _given(options, name) and options.task not in tasks:
            rule = f"has no effect on {options.task}: it belongs to {', '.join(tasks)}"
            raise DataError(_flag(name), str(getattr(options, name)), rule, "leave it out")
    if options.task == "preference" and options.reference is None:
        rule = "is missing: a preference is measured against the model before it was trained"
        raise DataError("--reference", ABSENT, rule, "give that model's folder")
    _columns(options)


def _check_harness(options: argparse.Namespace) -> None:
    """Its tasks bring their own data and scores."""
    idle = ("task", "data", "prepared", "against", "slice", "save", *ONLY_FILES, *ONLY_FOR)
    given = [name for name in dict.fromkeys(idle) if name != "seq_len" and _given(options, name)]
    if given:
        rule = "has no effect on tasks of lm-evaluation-harness, which bring their own"
        raise DataError(_flag(given[0]), ABSENT, rule, "leave it out")


def _given(options: argparse.Namespace, name: str) -> bool:
    return getattr(options, name) not in (None, False)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _task_name(options: argparse.Namespace) -> str:
    """`--task`, which prepared data knows of itself."""
    found = open_data(options.prepared).index["task"] if options.prepared else None
    if options.task is None and found is None:
        raise DataError("--task", ABSENT, "is missing", f"give one of {', '.join(TASKS)}")
    if found is not None and options.task not in (None, found):
        raise DataError("--task", options.task, f"is not what {options.prepared} was prepared for", f"use {found}")
    return str(options.task or found)


def auto_class(task: str) -> str:
    """The head that the task asks for; nothing of the data matters for that."""
    if task in OWN:
        return str(OWN[task][0].auto_class)
    spec = _spec({"name": task}, {"train": "none"}, DEFAULT_SEQ_LEN, [])
    return task_of(spec, Facts(labels=("one", "other"))).auto_class


def asked(model: Opened, options: argparse.Namespace, reference: Opened | None = None) -> Asked:
    """Raises UserError for data and model that do not go together."""
    if options.prepared:
        return _prepared(model, options, reference)
    tokenizer = tokenizer_of(model, options)
    check_vocabulary(model.modules[0], num_ids(tokenizer), "MODEL")
    seq_len = seq_len_of(model, options)
    if options.task in WRITERS and tokenizer.eos_token_id is None:
        rule = "has a tokenizer without an end-of-text token (eos), with which a text ends"
        raise ModelError("MODEL", str(model.folder), rule, "give the tokenizer an eos_token")
    fields = _fields(options)
    if options.task in OWN:
        question: Question = _own(options, tokenizer, seq_len, fields)
        spec, columns = _file_spec(options, "causal_lm", seq_len), _own_columns(options)
        labels: tuple[str, ...] = ()
    else:
        spec = _file_spec(options, options.task, seq_len)
        labels = labels_of(model.modules[0]) if belongs("task", "labels", options.task) else ()
        task = task_of(spec, Facts(labels, (), num_ids(tokenizer), tokenizer.mask_token_id))
        _refuse_slices_of_blocks(task, options)
        question = Learnt(task, tokenizer, fields, reference)
        columns = _replaced(Columns.of(spec))
    assert not isinstance(spec.data.train, str)
    sources = find_sources("--data", spec.data.train, spec.data.format)

    def examples() -> Iterator[list[Part]]:
        records = _known(read_records(sources, columns, spec.data.sample_by), columns, labels)
        return islice(question.parts(records), options.limit)

    fingerprint = fingerprint_of([Path(source.path) for source in sources])
    return Asked(question, examples, None, "--data", ", ".join(options.data), fingerprint)


def tokenizer_of(model: Opened, options: argparse.Namespace) -> Any:
    if options.trust_remote_code:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model.folder, trust_remote_code=True)
    return load_tokenizer(TokenizerSource("MODEL", str(model.folder)))


def seq_len_of(model: Opened, options: argparse.Namespace) -> int:
    limit = getattr(model.config, "max_position_embeddings", None) or DEFAULT_SEQ_LEN
    seq_len = options.seq_len or min(DEFAULT_SEQ_LEN, limit)
    check_length(model.modules[0], seq_len, "--seq-len")
    return int(seq_len)


def _own(options: argparse.Namespace, tokenizer: Any, seq_len: int, fields: Fields) -> Question:
    kind = OWN[options.task][0]
    if kind is Perplexity:
        return Perplexity(tokenizer, seq_len, fields, options.stride)
    if kind is Generation:
        return Generation(
            tokenizer,
            seq_len,
            fields,
            max_new_tokens=128 if options.max_new_tokens is None else options.max_new_tokens,
            stop=tuple(options.stop or ()),
            extract=options.extract or "text",
            is_chat=bool(options.apply_chat_template),
        )
    question: Question = kind(tokenizer, seq_len, fields)
    return question


def _refuse_slices_of_blocks(task: Task, options: argparse.Namespace) -> None:
    columns = [name for name in options.slice or () if name != "length"]
    if columns and getattr(task, "packing", "none") != "none":
        rule = "is a column of records, which are joined into blocks here"
        raise DataError("--slice", columns[0], rule, "give --packing none, or --task perplexity")


def _replaced(columns: Columns) -> Columns:
    from dataclasses import replace

    return replace(columns, keep_rows=True)


def _own_columns(options: argparse.Namespace) -> Columns:
    if options.task in TEXTS:
        return Columns("causal_lm", _columns(options), keep_rows=True)
    return Columns(ROWS, {}, keep_rows=True)


def _columns(options: argparse.Namespace) -> dict[str, str]:
    """What is read -> its column: `--column FIELD=NAME`, and the two that have flags of their own."""
    found = {"text": options.text_column, "label": options.label_column}
    known = OWN[options.task][1] if options.task in OWN else FIELDS[options.task]
    for pair in options.column or ():
        field, has_name, name = pair.partition("=")
        if not has_name or field not in known:
            raise DataError("--column", pair, f"is not FIELD=NAME with one of {', '.join(known)}", "e.g. text=body")
        found[field] = name
    return {field: name for field, name in found.items() if name}


def _fields(options: argparse.Namespace) -> Fields:
    prompt = options.prompt.replace("\\n", "\n").replace("\\t", "\t") if options.prompt else None
    return Fields(_columns(options), tuple(options.slice or ()), prompt)


def _known(records: Iterator[Record], columns: Columns, labels: tuple[str, ...]) -> Iterator[Record]:
    """The records of the files, each label one that the model knows."""
    for record in records:
        unknown = [label for label in record.labels if labels and label not in labels]
        if unknown:
            rule = f"is not a label of the model, which knows {', '.join(labels)}"
            where = f"{record.where}: {columns.name('label')}"
            raise DataError(where, unknown[0], rule, "score it on texts of these labels")
        yield record


def _file_spec(options: argparse.Namespace, task: str, seq_len: int) -> JobSpec:
    """A job that would read these files so; its options are checked like any job's."""
    given = {key: getattr(options, key) for key in ("format", "sample_by", "packing") if getattr(options, key)}
    if options.task in LEARNT:
        given["columns"] = _columns(options)
    return _spec({"name": task}, {"train": list(options.data), **given}, seq_len, options.set or [])


def _spec(task: dict[str, Any], data: dict[str, Any], seq_len: int, overrides: Sequence[str]) -> JobSpec:
    training = {"seq_len": seq_len, "global_batch_size": 1, "max_steps": 1}
    raw = {"output_dir": "none", "model": {"path": "none"}, "task": task, "data": data, "training": training}
    for override in overrides:
        apply_override(raw, override)
    return parse_spec(raw)


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


def _prepared(model: Opened, options: argparse.Namespace, reference: Opened | None) -> Asked:
    data = open_data(options.prepared)
    module = model.modules[0]
    _same_tokenizer(model.folder, data)
    check_vocabulary(module, data.vocab_size, "--prepared")
    check_length(module, data.index["seq_len"], "--prepared")
    packing = {"packing": data.index["packing"]} if data.index["packing"] else {}
    spec = _spec(data.index["task_options"], {"train": str(data.folder), **packing}, data.index["seq_len"], [])
    task = task_of(spec, data.facts(spec.task))
    if data.labels is not None and data.labels != labels_of(module):
        rule = f"has the labels {', '.join(data.labels)}, the model {', '.join(labels_of(module))}"
        raise DataError("--prepared", str(options.prepared), rule, "give data prepared for this model")
    tokenizer = load_tokenizer(TokenizerSource("--prepared", str(data.tokenizer_dir)))
    question = Learnt(task, tokenizer, Fields(slices=tuple(options.slice or ())), reference)
    count = len(data.split("validation"))
    named = str(options.prepared)
    return Asked(
        question,
        lambda: islice(of_rows(held_out_rows(data)), options.limit),
        min(count, options.limit or count),
        "--prepared",
        named,
        data.fingerprint,
    )


def _same_tokenizer(folder: Path, data: PreparedData) -> None:
    """Ids of another tokenizer name other pieces. A model folder without a tokenizer is taken at its word."""
    source = TokenizerSource("MODEL", str(folder))
    if not local_files(source):
        return
    theirs = load_tokenizer(TokenizerSource("--prepared", str(data.tokenizer_dir)))
    if load_tokenizer(source).get_vocab() != theirs.get_vocab():
        rule = "was prepared with another tokenizer than the model's"
        raise DataError("--prepared", str(data.folder), rule, "score the texts themselves: --data FILE")


def question_digest(options: argparse.Namespace) -> dict[str, Any]:
    """Every option that changes an answer; batches and ranks do not."""
    reading = ("format", "sample_by", "packing", "set", "column", "text_column", "label_column", "slice", "limit")
    asking = ("stride", "prompt", "max_new_tokens", "stop", "extract", "apply_chat_template")
    names = ("task", "seq_len", *reading, *asking)
    given = {name: getattr(options, name) for name in names if _given(options, name)}
    return dict(json.loads(json.dumps(given)))
