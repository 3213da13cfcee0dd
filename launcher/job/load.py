"""From a YAML file and `--set` overrides to a `JobSpec`, or to one clear message per mistake.

Owns the words of every spec error. What is allowed is `spec.py`'s.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from launcher.errors import ABSENT, Problem, SpecError
from launcher.job.other_names import OTHER_NAMES
from launcher.job.spec import JobSpec, ShorthandSection
from launcher.job.stages import one_stage
from launcher.job.tasks import check_task
from launcher.job.together import check_together

ModelT = TypeVar("ModelT", bound=BaseModel)
_MISSING = "is missing"
_GUESS = "did you mean `"
_KINDS = {
    "integer": "an integer",
    "number": "a number",
    "string": "a non-empty text",
    "boolean": "true or false",
    "array": "a non-empty list of texts",
    "object": "a mapping",
    "null": "null",
}


def load_spec(path: str | Path, overrides: Iterable[str] = ()) -> JobSpec:
    """Read a job spec. Raises `SpecError` with every problem found, each with its dotted path."""
    raw = read_yaml(Path(path), what="job spec")
    for override in overrides:
        apply_override(raw, override)
    return parse_spec(one_stage(raw))


def parse_spec(raw: dict[str, Any]) -> JobSpec:
    spec = decode(JobSpec, raw)
    check_task(spec)
    check_together(spec)
    return spec


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; a duplicate key is an error, as is anything but a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = "is a folder" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise SpecError(str(path), ABSENT, reason, f"give the path of a {what} in YAML") from None
    except UnicodeDecodeError as error:
        raise SpecError(str(path), ABSENT, f"is not UTF-8 (byte {error.start})", "save it as UTF-8") from None
    try:
        raw = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: no tag constructs anything
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        complaint = getattr(error, "problem", None) or (str(error) or "nesting too deep").splitlines()[0]
        way_out = "mend this line" if mark else "mend the file"
        raise SpecError(where, ABSENT, f"is not valid YAML ({complaint})", way_out) from None
    if not isinstance(raw, dict):
        raise SpecError(
            str(path), ABSENT, "holds no `key: value` pairs", f"a {what} starts with lines such as `seed: 0`"
        )
    return raw


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML itself forbids and PyYAML lets pass."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:str" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else "")
        return super().construct_mapping(node, deep)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Carry out one `--set a.b=c` on the raw mapping; `c` is read as YAML, so `[1, 2]`, `null`, `1e-4` work."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise SpecError("--set", override, "is not of the form key.sub=value", "write e.g. --set training.lr=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SpecError(
            f"--set {_shown_key(dotted)}", text, "is not a YAML value", "quote it: --set 'key=\"text\"'"
        ) from None
    node = raw
    for depth, key in enumerate(keys[:-1]):
        child = node.get(key)
        if isinstance(child, str) and depth == 0:
            child = _spread_shorthand(key, child)
        if not isinstance(child, dict | None):
            raise SpecError(
                f"--set {_shown_key(dotted)}",
                child,
                f"is the value of `{key}`, which has no keys",
                "set the whole value",
            )
        node[key] = child = {} if child is None else child
        node = child
    node[keys[-1]] = value


def _spread_shorthand(section: str, word: str) -> Any:
    field = JobSpec.model_fields.get(section)
    kind = field.annotation if field else None
    is_shorthand = isinstance(kind, type) and issubclass(kind, ShorthandSection)
    return {next(iter(kind.model_fields)): word} if is_shorthand else word  # type: ignore[union-attr]


def decode(model: type[ModelT], raw: dict[str, Any], prefix: str = "") -> ModelT:
    """Validate `raw`; raises `SpecError` listing each problem once, in the order of the fields."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = {problem.path: problem for problem in reversed(list(_problems(model, raw, error, prefix)))}
        raise SpecError.several(_without_echoes(list(reversed(problems.values())))) from None


def _without_echoes(problems: list[Problem]) -> list[Problem]:
    """A misspelt key is one mistake: that the key which was meant is missing says nothing more."""
    meant = {
        ".".join([*problem.path.split(".")[:-1], guess])
        for problem in problems
        if (guess := problem.way_out.removeprefix(_GUESS).removesuffix("`?")) != problem.way_out
    }
    return [problem for problem in problems if (problem.rule, problem.path in meant) != (_MISSING, True)]


def _problems(model: type[BaseModel], raw: Any, error: ValidationError, prefix: str) -> Iterator[Problem]:
    schema = model.model_json_schema()
    for detail in error.errors(include_url=False):
        path, node, rest = _resolve(schema, detail["loc"])
        dotted = prefix + ".".join(path)
        if detail["type"] in ("extra_forbidden", "invalid_key") and rest:
            yield _unknown_key(prefix + ".".join([*path, _shown_key(str(rest[0]))]), str(rest[0]), node)
        elif detail["type"] == "missing":
            missing = _dereference(schema, node.get("properties", {}).get(rest[0], node) if rest else node)
            yield Problem(dotted, ABSENT, _MISSING, f"add it: {_meaning(missing)}")
        elif detail["type"] == "value_error" and "properties" in node:
            rule, _, way_out = detail["msg"].removeprefix("Value error, ").partition("; ")
            yield Problem(dotted.removesuffix(": ") or model.__name__, ABSENT, rule, way_out)
        else:
            found = detail["input"] if isinstance(detail["input"], str | int | float | None) else _look_up(raw, path)
            yield Problem(dotted, _as_written(found), f"must be {describe(schema, node)}", _way_out(node, found))


def _resolve(schema: dict[str, Any], loc: tuple[int | str, ...]) -> tuple[list[str], dict[str, Any], list[int | str]]:
    """Follow a pydantic location as far as it names fields: (path, schema node there, what is left over)."""
    path: list[str] = []
    node = schema
    for position, part in enumerate(loc):
        if part not in node.get("properties", {}):
            return path, node, list(loc[position:])
        path.append(str(part))
        described = node["properties"][part]
        node = {
            **_dereference(schema, described),
            **{k: v for k, v in described.items() if k in ("default", "description")},
        }
    return path, node, []


def _dereference(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """The section that a node stands for, also one that may be null; any other node as it is."""
    references = [option["$ref"] for option in (node, *node.get("anyOf", [])) if "$ref" in option]
    return schema["$defs"][references[0].rsplit("/", 1)[1]] if references else node


def _unknown_key(dotted: str, key: str, node: dict[str, Any]) -> Problem:
    valid = sorted(node.get("properties", {}))
    if key in OTHER_NAMES:
        return Problem(dotted, ABSENT, "is not a known key", f"{_GUESS}{OTHER_NAMES[key]}`?")
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    way_out = f"{_GUESS}{close[0]}`?" if close else f"valid here: {', '.join(valid)}"
    return Problem(dotted, ABSENT, "is not a known key", way_out)


def _shown_key(key: str) -> str:
    """A key of the user's, in quotes where it would not show, or would move the terminal's cursor."""
    return key if key.strip() and key.isprintable() else repr(key)


def describe(schema: dict[str, Any], node: dict[str, Any]) -> str:
    """`{'type': 'integer', 'minimum': 1}` -> 'an integer >= 1'."""
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(describe(schema, option) for option in node["anyOf"]))
    if "$ref" in node or "properties" in node:
        return f"a section with the keys {', '.join(_dereference(schema, node)['properties'])}"
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return "one of " + ", ".join(map(str, node["enum"]))
    name = _KINDS[node["type"]]
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {node[key]:g}" if node[key] < 1e7 else f"{sign} {node[key]}"
        for key, sign in signs.items()
        if key in node
    ]
    return f"{name} {' and '.join(bounds)}".rstrip()


def _meaning(node: dict[str, Any]) -> str:
    """The first clause of a field's docstring, as a hint."""
    text = node.get("description", "see `fleetune schema`").split("\n")[0]
    return text[0].lower() + text[1:].rstrip(".")


def _way_out(node: dict[str, Any], found: Any) -> str:
    choices = [str(choice) for choice in node.get("enum", [])]
    choices += [str(c) for option in node.get("anyOf", []) for c in (*option.get("enum", []), option.get("const")) if c]
    close = difflib.get_close_matches(str(found), choices, n=1, cutoff=0.5)
    if close:
        return f"{_GUESS}{close[0]}`?"
    default = node.get("default")
    shown = _as_written(default) if isinstance(default, bool) else default
    return _meaning(node) + (f" (default {shown})" if isinstance(default, str | int | float) else "")


def _as_written(value: Any) -> Any:
    """As YAML has it: `true`, `null`, and in quotes a text that would be something else without them."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str) and value and not isinstance(_read_as(value), str):
        return f"'{value}'"
    return value


def _read_as(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _look_up(raw: Any, path: list[str]) -> Any:
    for key in path:
        raw = raw.get(key, ABSENT) if isinstance(raw, dict) else ABSENT
    return raw
