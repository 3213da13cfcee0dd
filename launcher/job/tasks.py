"""Which keys of a spec belong to which task: one table, used by the check, by the starter and by the readers of data."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from launcher.errors import ABSENT, Problem, SpecError
from launcher.job.spec import DataSection, JobSpec, Section, TaskSection

_TEXT = ("text",)
_LABELLED = ("text", "text_pair", "label")
_TURNS = ("messages", "conversations", "system", "tools")
_ALPACA = ("instruction", "input", "history")
FIELDS: dict[str, tuple[str, ...]] = {
    "causal_lm": _TEXT,
    "sequence_classification": _LABELLED,
}
"""What a record of the task may hold; each is a key of `data.columns`, and the column of that name unless mapped."""

TASK_OPTIONS: dict[str, tuple[str, ...]] = {
    "labels": ("sequence_classification",),
}
DATA_OPTIONS: dict[str, tuple[str, ...]] = {
    "packing": ("causal_lm",),
}
"""Key of the section -> the tasks for which it means something. A key that is not here belongs to all."""

SHAPE_ROWS = ("labels",)
"""Options of the task that decide what is in the prepared rows; the others only say how they are learnt."""

WRITERS = ("causal_lm",)
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
