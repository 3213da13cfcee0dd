"""One plan for each combination of swept values: as a table, as JSON, as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.command.plot import check_plot, write_plot
from launcher.command.sweep import Row, parse_axes, sweep_json, sweep_rows, sweep_table
from launcher.errors import SpecError, UserError
from launcher.plan import Plan, make_plan
from tests.browser import drawn, fetched_by
from tests.unit.costs import cluster_of, small_cost, spec_of

AXES = ["nodes=1,2,3,4", "seq_len=10,20"]


def plan_of(overrides: list[str]) -> Plan:
    """As the command does it, with a model and machines of this test; the batch divides over 1, 2 and 4 nodes."""
    values = dict(override.split("=") for override in overrides)
    spec = spec_of(
        cluster={"nodes": int(values["cluster.nodes"]), "gpus_per_node": 2},
        training__seq_len=int(values["training.seq_len"]),
    )
    return make_plan(spec, small_cost(), cluster_of(10**7), advise=False)


def rows() -> list[Row]:
    return sweep_rows(parse_axes(AXES), plan_of)


def test_every_combination_is_planned_or_says_why_not() -> None:
    """The last axis turns fastest; 8 samples cannot be dealt to 6 ranks."""
    made = rows()
    assert [tuple(row.values.values()) for row in made] == [(n, t) for n in "1234" for t in ("10", "20")]
    assert [row.plan.num_ranks if row.plan else None for row in made] == [2, 2, 4, 4, None, None, 8, 8]
    assert made[4].problem == "training.global_batch_size: 8 is not a multiple of 6 ranks"


def test_the_table_has_a_line_for_each() -> None:
    lines = sweep_table(rows()).splitlines()
    assert lines[0].split()[:4] == ["nodes", "seq_len", "ranks", "memory/rank"]
    assert len(lines) == 9
    assert lines[5].endswith("training.global_batch_size: 8 is not a multiple of 6 ranks")
    assert all("micro-batch" in line for line in (*lines[1:5], *lines[7:]))


def test_the_json_has_the_same_rows() -> None:
    raw = json.loads(json.dumps(sweep_json(rows())))["rows"]
    assert [row["fits"] for row in raw] == [True] * 4 + [False] * 2 + [True] * 2
    assert raw[0]["values"] == {"nodes": "1", "seq_len": "10"}
    assert raw[0]["tokens_per_second"] == pytest.approx(80 / raw[0]["step_seconds"])
    assert raw[4]["problem"] == "training.global_batch_size: 8 is not a multiple of 6 ranks"


@pytest.mark.parametrize(
    ("sweeps", "words"),
    [
        (["nodes"], "is not of the form key=value,value"),
        (["nodes=1,,2"], "is not of the form key=value,value"),
        (["node=1,2"], "keys: nodes, gpus_per_node"),
        (["nodes=1", "cluster.nodes=2"], "is swept twice"),
        ([f"seq_len={','.join(map(str, range(1, 1002)))}"], "are more than 1000"),
    ],
)
def test_a_wrong_sweep_is_refused(sweeps: list[str], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse_axes(sweeps)


def test_any_dotted_key_can_be_swept() -> None:
    assert [axis.key for axis in parse_axes(["parallel.recompute=none,full", "gpu=h200"])] == [
        "parallel.recompute",
        "cluster.name",
    ]


def test_another_kind_of_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends in neither \.png nor \.html"):
        check_plot(tmp_path / "out.pdf")


def test_a_png_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the optional extra `plot` is not installed")
    write_plot(tmp_path / "out.png", rows(), "a test")
    content = (tmp_path / "out.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    assert 0 < width < height  # tall, for a phone


def test_a_page_holds_all_that_it_needs(tmp_path: Path) -> None:
    """Nothing is fetched, no script runs, the ink follows the theme, the table is beside the picture."""
    pytest.importorskip("matplotlib", reason="the optional extra `plot` is not installed")
    page = tmp_path / "out.html"
    write_plot(page, rows(), "nodes & lengths")
    text = page.read_text(encoding="utf-8")
    assert fetched_by(text) == []
    assert "prefers-color-scheme: dark" in text
    assert "fill: var(--ink)" in text
    assert "#010203" not in text
    assert "nodes &amp; lengths" in text
    assert "tokens/s" in text
    assert "is not a multiple of 6 ranks" in text
    write_plot(tmp_path / "again.html", rows(), "nodes & lengths")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_a_browser_draws_the_page(tmp_path: Path) -> None:
    """In headless chromium at a phone's width; what it draws is not blank."""
    pytest.importorskip("matplotlib", reason="the optional extra `plot` is not installed")
    page = tmp_path / "out.html"
    write_plot(page, rows(), "a test")
    assert drawn(page, tmp_path / "page.png") > 0.02
