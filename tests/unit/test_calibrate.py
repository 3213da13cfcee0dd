"""`python -m tools.calibrate`: what it says of a table, and how it refuses one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from launcher.cost.measure import measure
from launcher.cost.values import Flops
from launcher.errors import EXIT_DONE, EXIT_USER
from tests.unit.costs import spec_of
from tools.bench import calibration
from tools.calibrate import Case, main, summary
from tools.published_models import llama_cost, mpt_cost
from tools.published_table import Row, read_table

THROUGHPUT = """\
model,hidden_size,num_heads,num_layers,vocab_size,ffn_ratio,num_params,seq_len,gpu,num_gpus,precision,fsdp_mixed_precision,sharding,activation_checkpointing,micro_batch_size,grad_accum,tokens_per_s_per_gpu
made-1b,2048,16,24,50368,4,1315950592,2048,a100_80gb,8,amp_bf16,DEFAULT,FULL_SHARD,false,14,4,20000
made-3b,2560,20,32,50368,4,2651837440,2048,h100_80gb,128,amp_bf16,DEFAULT,SHARD_GRAD_OP,false,8,1,25000
made-1b,2048,16,24,50368,4,1315950592,8192,h100_80gb,8,amp_fp8,DEFAULT,FULL_SHARD,true,2,4,25000
"""
MEMORY = """\
model,hidden_size,num_layers,num_heads,num_kv_heads,ffn_size,vocab_size,tied_embeddings,gpu,num_gpus,strategy,compile,seq_len,micro_batch_size,recompute,peak_reserved_gib
made-8b,4096,32,32,8,14336,128256,false,h100_96gb_500w,8,fsdp2 reshard,false,8192,2,selective per op (saves every second matmul and SDPA outputs),80
made-8b,4096,32,32,8,14336,128256,false,h100_96gb_500w,16,fsdp2 reshard,true,4096,2,full,40
"""
TEST_DATA = os.environ.get("FLEETUNE_TEST_DATA")
REFERENCE = Path(TEST_DATA).parent / "reference" if TEST_DATA else None


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(THROUGHPUT)
    return path


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(word) for word in argv]) == EXIT_DONE
    return capsys.readouterr().out


def test_a_line_per_run_and_a_summary(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "published", table).splitlines()
    assert len(lines) == 5
    assert lines[1].split()[:5] == ["2", "made-1b", "on", "8", "a100_80gb,"]
    assert "amp_bf16 FULL_SHARD" in lines[1]
    assert "recompute" in lines[3]
    assert lines[4].startswith("3 cases: median ")
    assert lines[4].endswith("called impossible: 0")


def test_the_json_says_the_same(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = json.loads(said(capsys, "published", table, "--json"))
    assert set(raw) == {"cases", "median_abs_error", "p90_abs_error", "worst_abs_error", "impossible", "rows"}
    assert (raw["cases"], raw["impossible"]) == (3, 0)
    errors = sorted(abs(row["predicted"] / row["published"] - 1) for row in raw["rows"])
    assert raw["median_abs_error"] == pytest.approx(errors[1])
    assert raw["worst_abs_error"] == pytest.approx(errors[2])
    assert [row["line"] for row in raw["rows"]] == [2, 3, 4]
    assert raw["worst_abs_error"] < 0.3


def test_a_run_that_cannot_have_been_is_counted(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.write_text(THROUGHPUT.replace("false,14,4,20000", "false,140,4,20000"))
    assert json.loads(said(capsys, "published", table, "--json"))["impossible"] == 1
    assert re.search(r"called impossible: \d{3}\.\d GiB", said(capsys, "published", table))


def test_memory_of_llama_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Selective recompute keeps more than full; the GPU of 96 GB is more than the cluster file's 80."""
    path = tmp_path / "memory.csv"
    path.write_text(MEMORY)
    raw = json.loads(said(capsys, "memory", path, "--json"))
    assert (raw["cases"], raw["impossible"]) == (2, 0)
    assert raw["rows"][0]["predicted"] == pytest.approx(84, abs=2)
    assert raw["rows"][1]["predicted"] < 40
    assert "(GiB)" in said(capsys, "memory", path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seq_len,gpu", "length,gpu", ": seq_len: is a column that the table does not have; add it; found: model, "),
        ("h100_80gb,128", "tpu,128", ":3: gpu: tpu is not known here; give one of a100_40gb, a100_80gb, "),
        ("14,4,20000", "14,4,fast", ":2: tokens_per_s_per_gpu: fast is not a number above 0; mend the row"),
        ("14,4,20000", "14,4,nan", ":2: tokens_per_s_per_gpu: nan is not a number above 0; mend the row"),
        ("14,4,20000", "14.5,4,20000", ":2: micro_batch_size: 14.5 is not a whole number; mend the row"),
        ("14,4,20000", "14,4", ":2: has 16 cells where the header has 17; mend the row; quote a cell with a comma"),
        ("h100_80gb,128", "h100_80gb,12", ":3: num_gpus: 12 is not a multiple of 8, the GPUs of a node"),
        (
            "a100_80gb,8,amp_bf16",
            "a100_80gb,8,amp_fp8",
            ":2: precision: amp_fp8 is in fp8, for which A100 SXM 80GB has",
        ),
        ("2048,16,24,50368,4,1315950592,2048", "2048,16,24,50368,4,5,2048", ":2: num_params: 5 is less than 24 blocks"),
        (THROUGHPUT.partition("\n")[2], "", ": holds no run; give a header and one row per run"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(
    old: str, new: str, message: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Path, line and column, the value, the rule and a way out; exit code 2."""
    assert old in THROUGHPUT
    table.write_text(THROUGHPUT.replace(old, new))
    assert main(["published", str(table)]) == EXIT_USER
    error = capsys.readouterr().err
    assert error.startswith(f"error: {table}{message}")
    assert error.count("\n") == 1


def test_a_file_that_is_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published", str(tmp_path)]) == EXIT_USER
    assert main(["memory", str(tmp_path / "none.csv")]) == EXIT_USER
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    assert main(["memory", str(tmp_path / "bytes.csv")]) == EXIT_USER
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ", 2)[2].split("; ")[0] for line in lines][:2] == [
        "cannot be read (Is a directory)",
        "cannot be read (No such file or directory)",
    ]
    assert "is not CSV in UTF-8" in lines[2]


def test_the_summary_of_errors() -> None:
    """The median of an even number is the middle two's mean; nine in ten are no worse than the 90th percentile."""
    cases = [Case(line, "", 100, 100 + line, line != 7, 0, None) for line in range(1, 11)]
    assert summary(cases) == pytest.approx(
        {"cases": 10, "median_abs_error": 0.055, "p90_abs_error": 0.09, "worst_abs_error": 0.10, "impossible": 1}
    )


def written_out(flops: Flops) -> tuple[float, ...]:
    """Forward and backward, with the backward pass that None stands for."""
    forward = (flops.blocks, flops.outside, flops.attention)
    backward = (flops.blocks_backward, flops.outside_backward, flops.attention_backward)
    meant = [factor * ahead for factor, ahead in zip((2, 2, 2.5), forward, strict=True)]
    return (*forward, *(m if back is None else back for back, m in zip(backward, meant, strict=True)))


def test_mpt_by_its_sizes_is_mpt_as_traced() -> None:
    """FLOPs and products of the real modules; what transformers' eager block keeps is more than a fused one's."""
    sizes = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 3, "vocab_size": 512, "max_seq_len": 64}
    traced = measure(spec_of(model={"from_config": sizes}), None)
    cells = {"hidden_size": 64, "num_heads": 4, "num_layers": 3, "vocab_size": 512, "ffn_ratio": 4}
    made = mpt_cost(_row({**cells, "num_params": traced.num_params}))
    *made_flops, fused = written_out(made.flops)
    *traced_flops, eager = written_out(traced.flops)
    assert made_flops == traced_flops
    assert (eager, fused) == (2 * traced.flops.attention, 2.5 * traced.flops.attention)  # eager keeps its scores
    assert made.width == traced.width
    assert made.num_blocks == traced.num_blocks
    assert traced.block_num_params == made.block_num_params + 2 * 64  # the weights of two norms
    assert 1 < traced.saved["bf16"].blocks.at(2, 64) / made.saved["bf16"].blocks.at(2, 64) < 2.5


def test_llama_by_its_sizes_is_llama_as_traced() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 160, "vocab_size": 512, "tie_word_embeddings": False}
    traced = measure(spec_of(model={"from_config": {"model_type": "llama", **sizes}}), None)
    cells = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 160, "vocab_size": 512}
    made, recompute = llama_cost(_row({**cells, "tied_embeddings": "false", "compile": "true", "recompute": "none"}))
    assert recompute == "none"
    assert made.num_params == traced.num_params
    assert written_out(made.flops) == written_out(traced.flops)
    assert (made.width, made.block_num_params) == (traced.width, traced.block_num_params)
    assert 1 < traced.saved["bf16"].blocks.at(2, 64) / made.saved["bf16"].blocks.at(2, 64) < 2.5


def test_constants_are_found_again(table: Path) -> None:
    """Runs that took as long as another constant predicts: the search comes nearer to it."""
    rows = [row for row in read_table(table) if calibration.kind_of(row) == "a100"]
    other = {"matmul_share": 0.7}
    (case,) = calibration.cases_with(rows, {"a100": other})
    told = [Row(row.table, row.line, {**row.text, "tokens_per_s_per_gpu": str(case.predicted)}) for row in rows]
    found = calibration.fit(told, "a100")
    assert abs(calibration.cases_with(told, {"a100": found})[0].error) < 0.02
    assert calibration.loss(told, "a100", found) < calibration.loss(told, "a100", {})


def _row(cells: dict[str, object]) -> Row:
    return Row(Path("table.csv"), 2, {key: str(value) for key, value in cells.items()})


@pytest.mark.skipif(REFERENCE is None, reason="FLEETUNE_TEST_DATA names no folder with published tables beside it")
def test_published_throughput_and_memory_are_met(capsys: pytest.CaptureFixture[str]) -> None:
    """llm-foundry's table of MPT models, and torchtitan's peak memory: what the README claims."""
    assert REFERENCE is not None
    tables = {name: REFERENCE / f"published_{name}.csv" for name in ("throughput_mpt", "memory")}
    if not all(path.is_file() for path in tables.values()):
        pytest.skip(f"no published tables in {REFERENCE}")
    speed = json.loads(said(capsys, "published", tables["throughput_mpt"], "--json"))
    assert speed["impossible"] == 0
    assert speed["median_abs_error"] <= 0.05
    assert speed["p90_abs_error"] <= 0.12
    assert speed["worst_abs_error"] <= 0.30
    memory = json.loads(said(capsys, "memory", tables["memory"], "--json"))
    assert (memory["impossible"], memory["worst_abs_error"] <= 0.10) == (0, True)
    assert len(read_table(tables["throughput_mpt"])) == speed["cases"]
