"""Which keys of a spec belong to which task: one table, used by the check, by the starter and by the readers of data."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from launcher.errors import ABSENT, Problem, SpecError
from launcher.job.spec import DataSection, JobSpec, Section, TaskSection, is_url

_TURNS = ("messages", "conversations", "instruction", "input", "output", "history", "system", "prompt", "completion")
FIELDS: dict[str, tuple[str, ...]] = {
    "causal_lm": ("text",),
    "chat": (*_TURNS, "tools"),
    "masked_lm": ("text",),
    "sequence_classification": ("text", "text_pair", "label"),
    "regression": ("text", "text_pair", "label"),
    "token_classification": ("tokens", "tags"),
    "extractive_qa": ("id", "question", "context", "answers"),
    "preference": (*_TURNS, "tools", "chosen", "rejected"),
}
"""What a record of the task may hold; each is a key of `data.columns`, and the column of that name unless mapped."""

TASK_OPTIONS: dict[str, tuple[str, ...]] = {
    "labels": ("sequence_classification", "token_classification"),
    "multi_label": ("sequence_classification",),
    "class_weights": ("sequence_classification",),
    "label_smoothing": ("sequence_classification",),
    "mask_probability": ("masked_lm",),
    "whole_words": ("masked_lm",),
    "label_all_tokens": ("token_classification",),
    "doc_stride": ("extractive_qa",),
    "max_answer_tokens": ("extractive_qa",),
    "no_answer": ("extractive_qa",),
    "null_threshold": ("extractive_qa",),
    "beta": ("preference",),
    "chat_template": ("chat", "preference"),
}
DATA_OPTIONS: dict[str, tuple[str, ...]] = {
    "packing": ("causal_lm", "masked_lm"),
    "stride": ("causal_lm", "masked_lm"),
    "label_separator": ("sequence_classification",),
    "augment": ("sequence_classification", "regression"),
}
"""Key of the section -> the tasks for which it means something. A key that is not here belongs to all."""

_OF_LANGUAGE = ("loss", "perplexity", "accuracy")
METRICS: dict[str, tuple[str, ...]] = {
    "causal_lm": _OF_LANGUAGE,
    "chat": _OF_LANGUAGE,
    "masked_lm": _OF_LANGUAGE,
    "sequence_classification": (
        *("loss", "accuracy", "precision", "recall", "f1"),
        *("precision_micro", "recall_micro", "f1_micro", "f1_binary", "matthews"),
    ),
    "regression": ("loss", "mae", "pearson", "spearman"),
    "token_classification": ("loss", "accuracy", "precision", "recall", "f1", "f1_macro"),
    "extractive_qa": ("loss", "exact_match", "f1"),
    "preference": ("loss", "accuracy", "chosen_reward", "rejected_reward", "reward_margin"),
}
"""Scores of the held-out samples by which a checkpoint may be called the best; some only where the labels allow them."""
LOWER_IS_BETTER = ("loss", "perplexity", "mae")

SHAPE_ROWS = ("labels", "multi_label", "whole_words", "doc_stride", "chat_template")
"""Options of the task that decide what is in the prepared rows; the others only say how they are learnt."""

PREDICT_TOKENS = ("causal_lm", "chat", "masked_lm", "preference")
"""Tasks whose targets are tokens of the vocabulary."""

WRITERS = ("causal_lm", "chat", "preference")
"""Tasks that write text from left to right: their rows end with an end-of-text token, the others' are framed by
`[CLS]` and `[SEP]` where the tokenizer has them."""


def belongs(section: str, key: str, task: str) -> bool:
    tables = {"task": TASK_OPTIONS, "data": DATA_OPTIONS}
    return task in tables.get(section, {}).get(key, (task,))


def check_task(spec: JobSpec) -> None:
    """Raises `SpecError` for every key that another task's data or head would need, and this one has no use for."""
    problems = [
        *_idle("task", spec.task, TaskSection, spec.task.name),
        *_idle("data", spec.data, DataSection, spec.task.name),
        *_unknown_columns(spec),
        *_idle_batching(spec),
        *_remote(spec),
        *_idle_stride(spec),
        *_contradictions(spec),
        *_unknown_metric(spec),
        *_idle_loss(spec),
    ]
    if problems:
        raise SpecError.several(problems)


def _idle(name: str, section: Section, kind: type[Section], task: str) -> Iterator[Problem]:
    for key, field in kind.model_fields.items():
        value = getattr(section, key)
        if value != field.get_default(call_default_factory=True) and not belongs(name, key, task):
            tables = {"task": TASK_OPTIONS, "data": DATA_OPTIONS}
            rule = f"has no effect on {task}: it belongs to {', '.join(tables[name][key])}"
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
            yield Problem(f"{name}.{key}", shown, rule, "leave it out")


def _unknown_columns(spec: JobSpec) -> Iterator[Problem]:
    known = FIELDS[spec.task.name]
    for key in spec.data.columns:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            way_out = f"did you mean `{close[0]}`?" if close else f"valid here: {', '.join(known)}"
            yield Problem(f"data.columns.{key}", ABSENT, f"is nothing that {spec.task.name} reads", way_out)


def _idle_batching(spec: JobSpec) -> Iterator[Problem]:
    joins = spec.data.packing != "none" and belongs("data", "packing", spec.task.name)
    if spec.data.batching == "by_length" and joins:
        rule = f"has nothing to sort: with packing {spec.data.packing} all rows are about `seq_len` long"
        yield Problem("data.batching", "by_length", rule, "leave it out, or set data.packing to none")
    if spec.data.mixture and spec.training.num_epochs is not None:
        rule = "is no length of a mixture, whose sources have epochs of their own"
        yield Problem("training.num_epochs", spec.training.num_epochs, rule, "set training.max_steps instead")


def _unknown_metric(spec: JobSpec) -> Iterator[Problem]:
    metric, known = spec.evaluation.metric, METRICS[spec.task.name]
    if metric is not None and metric not in known:
        rule = f"is no score of {spec.task.name}"
        yield Problem("evaluation.metric", metric, rule, f"choose one of {', '.join(known)}")


def _remote(spec: JobSpec) -> Iterator[Problem]:
    """Of data that lie behind a URL, and of options for such."""
    data = spec.data
    if not is_url(spec.prepared_dir):
        for key in ("cache_dir", "cache_gib"):
            if (value := getattr(data, key)) is not None:
                rule = "has no effect: data.prepared is no URL, so its shards are read where they lie"
                yield Problem(f"data.{key}", value, rule, "leave it out")
    elif data.packing == "best_fit":
        rule = "plans its bins over the lengths of all samples, which lie behind a URL"
        yield Problem("data.packing", "best_fit", rule, "copy data.prepared to a folder, or set `none` or `concat`")
    windowed = is_url(spec.prepared_dir) or data.window_shards is not None
    if windowed and data.mixture:
        rule = "draws from all shards of its sources, not from a window of them"
        way_out = "leave out data.window_shards, and copy data.prepared to a folder if it is a URL"
        yield Problem("data.mixture", ABSENT, rule, way_out)
    if data.window_shards is not None and data.packing == "best_fit" and not is_url(spec.prepared_dir):
        rule = "has no effect with packing best_fit, whose bins hold samples of any shard"
        yield Problem("data.window_shards", data.window_shards, rule, "leave out one of the two")
    for number, source in enumerate(data.mixture):
        if is_url(source.prepared):
            path = f"data.mixture[{number}].prepared"
            yield Problem(path, source.prepared, "is a URL, which a mixture cannot draw from", "copy it to a folder")


def _idle_stride(spec: JobSpec) -> Iterator[Problem]:
    data = spec.data
    if data.stride is None or not belongs("data", "stride", spec.task.name):
        return
    if data.packing == "concat":
        rule = "has no effect with packing concat, which joins documents and cuts them into blocks"
        yield Problem("data.stride", data.stride, rule, "leave it out, or set data.packing to none or best_fit")
    elif data.stride >= spec.training.seq_len:
        rule = f"is not less than training.seq_len ({spec.training.seq_len})"
        yield Problem("data.stride", data.stride, rule, "give about a third of it")


def _idle_loss(spec: JobSpec) -> Iterator[Problem]:
    if spec.training.loss == "chunked" and spec.task.name not in PREDICT_TOKENS:
        rule = f"has no effect on {spec.task.name}, whose head does not answer over a vocabulary"
        yield Problem("training.loss", "chunked", rule, "leave it out")


def _contradictions(spec: JobSpec) -> Iterator[Problem]:
    """Of options that belong to the task, but not together."""
    task, data = spec.task, spec.data
    if task.multi_label:
        for key in ("class_weights", "label_smoothing"):
            if getattr(task, key):
                rule = "is defined for one label per text, not for multi_label"
                yield Problem(f"task.{key}", ABSENT, rule, "leave out one of the two")
    elif data.label_separator is not None:
        yield Problem("data.label_separator", data.label_separator, "has no effect without task.multi_label", "set it")
    if isinstance(task.class_weights, tuple):
        if task.labels is None:
            rule = "are in the order of task.labels, which are left out"
            yield Problem("task.class_weights", ABSENT, rule, "give task.labels, or `balanced`")
        elif len(task.class_weights) != len(task.labels):
            rule = f"are {len(task.class_weights)} for {len(task.labels)} labels"
            yield Problem("task.class_weights", ABSENT, rule, "give one for each label")
    if task.null_threshold and not task.no_answer:
        yield Problem("task.null_threshold", task.null_threshold, "has no effect without task.no_answer", "set it")
    if task.doc_stride is not None and task.doc_stride >= spec.training.seq_len:
        rule = f"is not less than training.seq_len ({spec.training.seq_len})"
        yield Problem("task.doc_stride", task.doc_stride, rule, "give about a third of it")
