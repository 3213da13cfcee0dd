"""Which features go together: one table. The checks below, the planner's choice and README's table are read from it.

What is in no limit goes with everything. A limit between two keys of `parallel` is refused by the planner, which knows
what else would do (`launcher/plan/knobs.py`); all others here, before anything is planned or started.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

from launcher.errors import Problem, SpecError
from launcher.job.optimisers import OPTIMISERS, SETTINGS
from launcher.job.spec import JobSpec, MethodSection, OptimizerName, ParallelSection, Strategy

STRATEGY, DEVICE = "parallel.strategy", "device"
SET = "set"
"""Stands for any value of a key but its default."""
_TORCH, _DEEPSPEED = ("ddp", "fsdp", "hsdp"), ("zero1", "zero2", "zero3", "hpz")
_DECODERS = ("causal_lm", "chat")


class Limit(NamedTuple):
    """With `key` at one of `values`, `other` must be one of `allowed`."""

    key: str
    values: tuple[str, ...]
    other: str
    allowed: tuple[str, ...]
    why: str


LIMITS = (
    Limit("parallel.precision", ("pure_bf16",), STRATEGY, _TORCH, "DeepSpeed keeps fp32 masters"),
    Limit("parallel.precision", ("fp16",), STRATEGY, _DEEPSPEED, "the scaled loss is DeepSpeed's"),
    Limit(
        "parallel.offload_optimizer",
        ("cpu",),
        STRATEGY,
        (*_DEEPSPEED, "fsdp", "hsdp"),
        "ddp has no shards to move",
    ),
    Limit("parallel.offload_optimizer", ("nvme",), STRATEGY, ("zero3",), "only ZeRO-Infinity reads from disk"),
    Limit("parallel.offload_params", ("cpu",), STRATEGY, ("zero3", "fsdp", "hsdp"), "the others hold whole parameters"),
    Limit("parallel.offload_params", ("nvme",), STRATEGY, ("zero3",), "only ZeRO-Infinity reads from disk"),
    Limit(
        "training.optimizer",
        ("muon",),
        STRATEGY,
        _TORCH,
        "it works on whole matrices, and DeepSpeed cuts them into flat pieces",
    ),
    Limit(
        "training.optimizer",
        ("adafactor",),
        STRATEGY,
        ("ddp",),
        "it works on rows and columns of whole matrices, and torch's does not take sharded ones",
    ),
    Limit(
        "training.optimizer",
        ("paged_adamw", "paged_adamw_8bit"),
        STRATEGY,
        ("ddp",),
        "bitsandbytes takes whole parameters",
    ),
    Limit("training.optimizer", ("paged_adamw", "paged_adamw_8bit"), DEVICE, ("cuda",), "only its driver moves pages"),
    Limit(
        "parallel.offload_optimizer",
        ("cpu", "nvme"),
        "training.optimizer",
        ("adamw",),
        "the optimiser on the host is AdamW",
    ),
    Limit("method.name", ("qlora",), STRATEGY, ("ddp",), "weights in 4 bits cannot be cut or gathered"),
    Limit("method.name", ("qlora",), "parallel.precision", ("fp32", "bf16"), "its adapters are trained in fp32"),
    Limit(
        "method.unfreeze_every_steps",
        (SET,),
        STRATEGY,
        _TORCH,
        "DeepSpeed updates all that it was given at the start",
    ),
    Limit("training.l1", (SET,), STRATEGY, _TORCH, "DeepSpeed's gradients are flat pieces of its own"),
    Limit("training.ema_decay", (SET,), STRATEGY, _TORCH, "the average follows parameters that torch keeps"),
)


def permits(spec: JobSpec, others: Mapping[str, str] = {}) -> bool:
    """Whether no limit is broken, with `others` in place of what the spec says or leaves open."""
    return not any(True for _ in _broken(spec, others))


def check_together(spec: JobSpec) -> None:
    """Raises `SpecError` for features that do not go together, and for settings of another optimiser."""
    problems = [
        *_nothing_to_quantise(spec),
        *_idle_settings(spec),
        *(_problem(spec, limit) for limit in _broken(spec) if not _is_planners(limit)),
    ]
    if problems:
        raise SpecError.several(problems)


def check_device(spec: JobSpec, kind: str) -> None:
    """The same for what a machine of this kind (`cuda` or `cpu`) cannot do."""
    for limit in _broken(spec, {DEVICE: kind}):
        if limit.other == DEVICE:
            raise SpecError(
                limit.key, _value(spec, limit.key), f"needs {' or '.join(limit.allowed)}: {limit.why}", _leave(limit)
            )


def _broken(spec: JobSpec, others: Mapping[str, str] = {}) -> Iterator[Limit]:
    for limit in LIMITS:
        value, other = (others.get(key, _value(spec, key)) for key in (limit.key, limit.other))
        if value in limit.values and other not in (*limit.allowed, "auto"):
            yield limit


def _value(spec: JobSpec, key: str) -> str:
    """Of a dotted key, as limits name it: a word, or `set` for what is not a word and not the default."""
    section, _, name = key.partition(".")
    if key == DEVICE:
        return "auto"  # the cluster's, which a spec only names
    found: Any = getattr(spec, section)
    default = type(found).model_fields[name].get_default(call_default_factory=True)
    value = getattr(found, name)
    return value if isinstance(value, str) else SET if value != default else "default"


def _is_planners(limit: Limit) -> bool:
    return limit.key.startswith("parallel.") and limit.other.startswith("parallel.")


def _problem(spec: JobSpec, limit: Limit) -> Problem:
    value = _value(spec, limit.key)
    shown = getattr(getattr(spec, limit.key.partition(".")[0]), limit.key.partition(".")[2])
    rule = f"does not go with {limit.other} {_value(spec, limit.other)}: {limit.why}"
    way_out = f"set {limit.other} to {_either(limit.allowed)}" + (f", or {_leave(limit)}" if value == SET else "")
    return Problem(limit.key, shown, rule, way_out)


def _leave(limit: Limit) -> str:
    return "leave it out" if limit.values == (SET,) else f"choose another {limit.key.rpartition('.')[2]}"


def _either(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _nothing_to_quantise(spec: JobSpec) -> Iterator[Problem]:
    if spec.method.name == "qlora" and spec.model.path is None:
        rule = "holds trained weights in 4 bits, and model.from_config has none"
        yield Problem("method.name", "qlora", rule, "give model.path, or set method to lora")


def _idle_settings(spec: JobSpec) -> Iterator[Problem]:
    training = spec.training
    for key in SETTINGS:
        value = getattr(training, key)
        if value is not None and key not in OPTIMISERS[training.optimizer].settings:
            owners = [name for name, optimiser in OPTIMISERS.items() if key in optimiser.settings]
            rule = f"has no effect on {training.optimizer}: it belongs to {', '.join(owners)}"
            yield Problem(f"training.{key}", value, rule, "leave it out")
    for key, schedule in _OF_SCHEDULE.items():
        default = type(training).model_fields[key].default
        if getattr(training, key) != default and training.schedule != schedule:
            rule = f"has no effect on the schedule {training.schedule}: it belongs to {schedule}"
            yield Problem(f"training.{key}", getattr(training, key), rule, "leave it out")


_OF_SCHEDULE = {
    "lr_cycles": "cosine_with_restarts",
    "lr_power": "polynomial",
    "decay_share": "wsd",
    "decay_shape": "wsd",
}


def table() -> str:
    """README's: what each strategy goes with, and under it all other limits. Markdown."""
    strategies = get_args(Strategy)
    lines = [f"| | {' | '.join(strategies)} |", "|---|" + ":-:|" * len(strategies)]
    for key, values in _rows().items():
        for value in values:
            marks = ["yes" if _goes(key, value, strategy) else "-" for strategy in strategies]
            name = f"`{_short(key)}`"
            lines.append(f"| {name if value == SET else f'{name}: {value}'} | {' | '.join(marks)} |")
    lines += ["", "| this | only with | because |", "|---|---|---|"]
    for limit in LIMITS:
        if limit.other != STRATEGY:
            lines.append(
                f"| `{limit.key}`{_words(limit.values)} | `{limit.other}`: {_either(limit.allowed)} | {limit.why} |"
            )
    return "\n".join(lines)


def _short(key: str) -> str:
    return "method" if key == "method.name" else key.rpartition(".")[2]


def _words(values: tuple[str, ...]) -> str:
    return "" if values == (SET,) else f": {_either(values)}"


def _goes(key: str, value: str, strategy: str) -> bool:
    return all(
        strategy in limit.allowed
        for limit in LIMITS
        if limit.key == key and value in limit.values and limit.other == STRATEGY
    )


def _rows() -> dict[str, tuple[str, ...]]:
    """Every key that some strategy limits, with all of its words."""
    words: dict[str, tuple[str, ...]] = {
        "method.name": get_args(MethodSection.model_fields["name"].annotation),
        "training.optimizer": get_args(OptimizerName),
        "parallel.precision": ("fp32", "bf16", "pure_bf16", "fp16"),
    }
    for limit in LIMITS:
        if limit.other == STRATEGY:
            words.setdefault(limit.key, ())
            words[limit.key] += tuple(value for value in limit.values if value not in words[limit.key])
    return words


assert set(OPTIMISERS) == set(get_args(OptimizerName)), "facts for every optimiser"
assert "strategy" in ParallelSection.model_fields
