"""From text to a spec: files, overrides, and that nothing but a `UserError` comes of any text."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import ABSENT, Problem, SpecError, UserError
from launcher.job import JobSpec, load_spec, parse_spec
from launcher.job.load import apply_override
from tests.support import REPO

GOOD: dict[str, Any] = {
    "output_dir": "run",
    "model": {"from_config": {"model_type": "gpt2"}},
    "task": {"name": "causal_lm"},
    "data": {"train": ["a.txt", "b.txt"], "train_tokenizer": {"vocab_size": 400}},
    "training": {"seq_len": 48, "global_batch_size": 8, "max_steps": 20, "lr": 1e-3},
    "parallel": {"strategy": "zero2", "micro_batch_size": 2},
    "cluster": {"name": "cpu", "gpus_per_node": 2},
    "checkpoint": {"every_steps": 5, "asynchronous": True},
    "seed": 3,
}


def overridden(*overrides: str) -> dict[str, Any]:
    raw = copy.deepcopy(GOOD)
    for override in overrides:
        apply_override(raw, override)
    return raw


@pytest.mark.parametrize("path", sorted((REPO / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_spec(path: Path) -> None:
    assert load_spec(path).output_dir


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.lr=1e-4", ("training", "lr"), 1e-4),
        ("training.lr = 2", ("training", "lr"), 2.0),
        ("seed=7", ("seed",), 7),
        ("checkpoint.asynchronous=false", ("checkpoint", "asynchronous"), False),
        ("checkpoint.every_steps=null", ("checkpoint", "every_steps"), None),
        ("checkpoint.every_steps=", ("checkpoint", "every_steps"), None),
        ("data.train=[x.txt, y.txt]", ("data", "train"), ("x.txt", "y.txt")),
        ("data.train=a=b.txt", ("data", "train"), "a=b.txt"),
        ("output_dir='7'", ("output_dir",), "7"),
        ("parallel=ddp", ("parallel", "strategy"), "ddp"),
        ("parallel={recompute: full}", ("parallel", "recompute"), "full"),
        ("evaluation.every_steps=4", ("evaluation", "every_steps"), 4),
        ("data.train_tokenizer.kind=bpe", ("data", "train_tokenizer", "kind"), "bpe"),
    ],
)
def test_set_reads_its_value_as_yaml(override: str, path: tuple[str, ...], value: Any) -> None:
    """Also below a section that the file does not have."""
    found: Any = parse_spec(overridden(override))
    for key in path:
        found = getattr(found, key)
    assert found == value


def test_later_overrides_win_and_others_stay() -> None:
    spec = parse_spec(overridden("training.lr=1", "training.lr=2", "seed=9"))
    assert (spec.training.lr, spec.seed, spec.training.seq_len) == (2.0, 9, 48)


def test_set_below_a_word_keeps_the_word() -> None:
    """`parallel: zero2` in the file and `--set parallel.recompute=full` go together."""
    raw = {**copy.deepcopy(GOOD), "parallel": "zero2", "cluster": "cpu"}
    apply_override(raw, "parallel.recompute=full")
    apply_override(raw, "cluster.nodes=1")
    spec = parse_spec(raw)
    assert (spec.parallel.strategy, spec.parallel.recompute, spec.cluster.name) == ("zero2", "full", "cpu")


def test_set_of_a_whole_section_replaces_it() -> None:
    assert parse_spec(overridden("parallel={recompute: full}")).parallel.strategy == "auto"


def test_all_problems_are_told_in_the_order_of_the_file() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(overridden("training.lr=-1", "training.seq_len=0", "seed=x", "modl=1"))
    assert [problem.path for problem in caught.value.problems] == ["training.seq_len", "training.lr", "seed", "modl"]


def test_what_is_missing_and_what_is_misspelt_are_two_things() -> None:
    """Only the key that a misspelling means is not told as missing again."""
    raw = {**copy.deepcopy(GOOD), "training": {"seq_ln": 48, "max_steps": 20}}
    with pytest.raises(SpecError) as caught:
        parse_spec(raw)
    assert [(problem.path, problem.rule) for problem in caught.value.problems] == [
        ("training.global_batch_size", "is missing"),
        ("training.seq_ln", "is not a known key"),
    ]


def test_aliases_and_merges_are_yaml_and_work(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        yaml.safe_dump({**GOOD, "training": None}).replace(
            "training: null", "training: &t\n  <<: {lr: 0.5}\n  seq_len: 8\n  max_steps: 1\n  global_batch_size: 2"
        )
    )
    assert load_spec(path).training.lr == 0.5


def test_a_bomb_of_aliases_is_refused_or_read_at_once(tmp_path: Path) -> None:
    """Aliases of aliases share one object when read, and the spec has no place for a nested list."""
    path = tmp_path / "job.yaml"
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    path.write_text("\n".join(lines))
    with pytest.raises(SpecError):
        load_spec(path)


# --- any text at all

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["auto", "zero9", "", "1e-4", "nan", "-1", "~", "\ud800".encode(errors="replace").decode(), 2**70]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(node: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of the spec, as a path."""
    if not isinstance(node, dict):
        return []
    return [place for key, child in node.items() for place in [(*path, key), *places(child, (*path, key))]]


def holder_of(raw: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    for key in place[:-1]:
        raw = raw[key]
    return raw


def misspelt(key: str, chance: random.Random) -> str:
    at = chance.randrange(len(key) or 1)
    return chance.choice([key[:at] + key[at + 1 :], key[:at] + "x" + key[at:], key.upper(), key + " "])


def mutate(raw: dict[str, Any], junk: Any, chance: random.Random) -> dict[str, Any]:
    """One key gets another value, another name, or goes."""
    raw = copy.deepcopy(raw)
    place = chance.choice(places(raw))
    holder = holder_of(raw, place)
    value = holder.pop(place[-1])
    match chance.randrange(4):
        case 0 | 1:
            holder[place[-1]] = junk
        case 2:
            holder[misspelt(place[-1], chance)] = value
    return raw


def check(load: Callable[[], JobSpec]) -> None:
    """A spec, or a `UserError` whose every problem says where it is and how to get out."""
    problems: tuple[Problem, ...] = ()
    try:
        load()
    except UserError as error:
        problems = error.problems or (Problem("", ABSENT, "", ""),)
    for problem in problems:
        assert problem.path.strip()
        assert problem.rule.strip()
        assert problem.way_out.strip()
        assert str(problem).isprintable()


@given(junk=st.lists(JUNK, min_size=1, max_size=3), chance=st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_a_mutated_spec_is_a_spec_or_a_message(junk: list[Any], chance: random.Random) -> None:
    raw = copy.deepcopy(GOOD)
    for value in junk:
        raw = mutate(raw, value, chance) if places(raw) else raw
    check(lambda: parse_spec(raw))


@given(
    text=st.integers(0, 400).map(lambda end: yaml.safe_dump(GOOD)[:end].encode())
    | st.binary(max_size=60)
    | st.text(st.sampled_from("{}[]:-,&*!|>'\"%@`#? \n\tab0."), max_size=40).map(str.encode)
    | st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=4)).map(
        lambda cut: yaml.safe_dump(GOOD).encode()[: cut[0]] + cut[1] + yaml.safe_dump(GOOD).encode()[cut[0] :]
    )
)
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_spec_or_a_message(text: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text)
    check(lambda: load_spec(path))


@given(
    st.text(max_size=30) | st.sampled_from([".".join(place) for place in places(GOOD)]).map(lambda key: key + ".x=1")
)
@settings(max_examples=200, deadline=None)
def test_any_override_is_a_spec_or_a_message(override: str) -> None:
    check(lambda: parse_spec(overridden(override)))


def test_deep_nesting_is_a_message(tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text("[" * 1500)
    check(lambda: load_spec(path))


@pytest.mark.parametrize(("key", "path"), [("", "''"), (" ", "' '"), ("a\x1b[2J", r"'a\x1b[2J'"), ("größe", "größe")])
def test_a_key_that_does_not_show_is_shown_in_quotes(key: str, path: str) -> None:
    """A terminal's control sequences are not carried out."""
    with pytest.raises(SpecError) as caught:
        parse_spec({**copy.deepcopy(GOOD), key: 1})
    assert [problem.path for problem in caught.value.problems] == [path]


def test_a_problem_reads_as_a_sentence() -> None:
    """Path, value, rule, way out; no value where there is none to show."""
    assert str(SpecError("a.b", 3, "is odd", "give 2 or 4")) == "a.b: 3 is odd; give 2 or 4"
    assert str(SpecError("a.b", ABSENT, "is missing", "add it")) == "a.b: is missing; add it"
    assert str(SpecError("a", "two words", "is long", "cut it")) == "a: 'two words' is long; cut it"
