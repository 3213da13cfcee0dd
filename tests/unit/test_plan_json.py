"""The keys of `fleetune plan --json` are those of launcher/plan/README.md."""

from __future__ import annotations

import re
from typing import Any

from launcher.command.sweep import Row, sweep_json
from launcher.plan import make_plan
from tests.support import REPO
from tests.unit.costs import cluster_of, small_cost, spec_of

PAGE = (REPO / "launcher" / "plan" / "README.md").read_text(encoding="utf-8")


def words_of(text: str) -> set[str]:
    return {word for code in re.findall(r"`([^`]+)`", text) for word in code.split()}


def table() -> dict[str, str]:
    """Dotted key -> what is said of it."""
    rows = re.findall(r"^\| (`.+?) \| (.+) \|$", PAGE, re.MULTILINE)
    return {key: meaning for keys, meaning in rows for key in re.findall(r"`([a-z_.]+)`", keys)}


def printed() -> dict[str, Any]:
    spec = spec_of(training__global_batch_size=32)
    return make_plan(spec, small_cost(), cluster_of(60_000)).to_json()


def test_every_key_is_documented_and_every_documented_key_is_there() -> None:
    raw, told = printed(), set(table())
    sections = {"plan", "memory", "step_time"}
    found = {f"{section}.{key}" for section in sections for key in raw[section]} | set(raw) - {"step_time"}
    assert found == told
    assert {"plan", "memory", "step_time", "alternatives", "rejected"} <= set(raw)
    for place in ("host_memory", "nvme", "disk"):
        assert set(raw[place]) == set(raw["memory"])


def test_items_and_candidates_have_the_documented_keys() -> None:
    raw, told = printed(), table()
    for section in ("memory", "step_time"):
        assert set(raw[section]["items"][0]) == words_of(told[f"{section}.items"])
    paragraph = PAGE.split("An alternative has the keys")[1].split("With `--sweep`")[0]
    assert raw["alternatives"]
    assert raw["rejected"]
    assert set(raw["alternatives"][0]) == words_of(paragraph)
    assert set(raw["rejected"][0]) == words_of(paragraph) | {"reason"}


def test_a_row_of_a_sweep_has_the_documented_keys() -> None:
    made = make_plan(spec_of(), small_cost(), cluster_of(10**7))
    row = sweep_json([Row({"nodes": "1"}, made, None)])["rows"][0]
    paragraph = PAGE.split("a row has")[1]
    assert set(row) == words_of(paragraph)
