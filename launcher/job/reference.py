"""What each key of a spec means, from the same fields that check it: for `fleetune explain-key` and for a page of all keys."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from launcher.errors import SpecError
from launcher.job.load import describe
from launcher.job.other_names import OTHER_NAMES
from launcher.job.spec import ADAPTER_KEYS, JobSpec
from launcher.job.tasks import DATA_OPTIONS, TASK_OPTIONS

WIDTH = 110


class Key(NamedTuple):
    """One key, or one section of keys."""

    path: str
    """Dotted, as `--set` takes it."""
    meaning: str
    kind: str
    """What may stand there, in words."""
    default: str | None
    """As YAML writes it; None where the key must be given."""
    goes_with: str
    """Tasks or methods for which it means something; empty: all."""
    is_section: bool


def keys() -> tuple[Key, ...]:
    """Every key in the order of the spec, a section before its keys."""
    schema = JobSpec.model_json_schema()
    return tuple(_keys_of(schema, schema, ""))


def _keys_of(schema: dict[str, Any], section: dict[str, Any], path: str) -> Iterator[Key]:
    for name, raw in section["properties"].items():
        here = f"{path}.{name}" if path else name
        inner = _section_in(raw, schema["$defs"])
        is_required = name in section.get("required", ()) or (inner is not None and "default" not in raw)
        yield Key(
            here,
            (raw.get("description") or (inner or {}).get("description", "")).strip(),
            describe(schema, raw),
            None if is_required else _as_yaml(raw.get("default")),
            _goes_with(here),
            inner is not None,
        )
        if inner is not None:
            yield from _keys_of(schema, inner, here)


def _section_in(raw: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a key holds, alone, or beside null, or as the items of a list."""
    for choice in (raw, *raw.get("anyOf", ()), raw.get("items", {})):
        if "$ref" in choice:
            found: dict[str, Any] = definitions[choice["$ref"].rpartition("/")[2]]
            return found if "properties" in found else None
    return None


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _goes_with(path: str) -> str:
    section, _, key = path.partition(".")
    tables = {"task": TASK_OPTIONS, "data": DATA_OPTIONS}
    if tasks := tables.get(section, {}).get(key.partition(".")[0], ()):
        return ", ".join(tasks)
    return "method lora" if section == "method" and key in ADAPTER_KEYS else ""


def explain_key(path: str) -> str:
    """Several lines about a key, or about a section and its keys. Raises `SpecError` for one that there is not."""
    every = {key.path: key for key in keys()}
    if path not in every:
        close = _like(path, every)
        way_out = f"did you mean `{close[0]}`?" if close else "`fleetune explain-key` alone lists all"
        raise SpecError("KEY", path, "is not a key of a spec", way_out)
    key = every[path]
    lines = [key.path, *textwrap.wrap(key.meaning, WIDTH, initial_indent="  ", subsequent_indent="  ")]
    if key.is_section:
        inside = [other for other in every.values() if other.path.rpartition(".")[0] == path]
        return "\n".join([*lines, *overview(inside)])
    lines += [f"  takes      {key.kind}", f"  default    {key.default or 'none: it must be given'}"]
    return "\n".join([*lines, *([f"  goes with  {key.goes_with}"] if key.goes_with else [])])


def _like(path: str, every: dict[str, Key]) -> list[str]:
    """`lr` and `learning_rate` for `training.lr`, then what is spelt alike."""
    last = path.rpartition(".")[2]
    called = [OTHER_NAMES[last]] if last in OTHER_NAMES else []
    return [
        *called,
        *(known for known in every if known.rpartition(".")[2] == last),
        *difflib.get_close_matches(path, every, n=1, cutoff=0.5),
    ]


def overview(some: tuple[Key, ...] | list[Key]) -> list[str]:
    """A line for each key: path, then the first sentence of its meaning."""
    width = max(len(key.path) for key in some) + 2
    return [f"  {key.path:<{width}}{_first_words(key.meaning, WIDTH - width)}" for key in some]


def _first_words(meaning: str, width: int) -> str:
    return textwrap.shorten(meaning.partition(". ")[0].partition("\n")[0], max(20, width), placeholder=" ...")


def reference_page() -> str:
    """All keys as Markdown: a heading for each section, a table of its keys."""
    lines: list[str] = []
    for key in keys():
        if key.is_section or "." not in key.path:
            lines += ["", f"{'#' * (2 + key.path.count('.'))} `{key.path}`", "", key.meaning]
            lines += ["", "| key | meaning | takes | default | goes with |", "|---|---|---|---|---|"] * key.is_section
            if not key.is_section:
                lines += [
                    "",
                    f"Takes {key.kind}; {'must be given' if key.default is None else f'default `{key.default}`'}.",
                ]
            continue
        default = "must be given" if key.default is None else f"`{key.default}`"
        cells = [f"`{key.path.rpartition('.')[2]}`", key.meaning, key.kind, default, key.goes_with or "all"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines).strip() + "\n"
