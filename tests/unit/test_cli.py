"""The command line: what each word does, and the exit codes."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from launcher import cli
from launcher.errors import CheckpointError, FleetuneError, Preempted
from launcher.job import load_spec
from launcher.job.starter import Wishes, starter
from launcher.spawn import free_port
from tests.support import job
from tests.unit.costs import measured_here

TASKS = ("causal_lm", "sequence_classification")


def fleetune(*argv: str | Path) -> int:
    """Exit code of a command in this process."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(map(str, argv)))
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job(tmp_path / "run", tmp_path / "corpus.jsonl", "gpt")))
    return path


@pytest.mark.parametrize("task", TASKS)
def test_init_then_plan(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The starter is a spec that plans as it stands, and init says what comes next."""
    path = tmp_path / "new.yaml"
    assert fleetune("init", path, "--task", task) == 0
    assert f"next: fleetune plan {path}" in capsys.readouterr().out
    with measured_here():
        assert fleetune("plan", path) == 0
    assert load_spec(path).task.name == task
    assert capsys.readouterr().out.startswith("plan ")


@pytest.mark.parametrize(("config", "seq_len"), [({"n_positions": 64}, 64), ({"max_position_embeddings": 9999}, 1024)])
def test_init_takes_what_is_known(config: dict[str, int], seq_len: int, tmp_path: Path) -> None:
    """Weights instead of a random model, no longer than their positions; the user's data and machine."""
    model, path = tmp_path / "tiny-gpt", tmp_path / "new.yaml"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "gpt2", **config}))
    words = ["--model", model, "--data", "my.jsonl", "--gpus", 4, "--cluster", "h200", "--task", "chat"]
    assert fleetune("init", path, *words) == 0
    spec = load_spec(path)
    assert (spec.model.path, spec.model.from_config) == (str(model), None)
    assert (spec.data.train, spec.data.train_tokenizer, spec.task.chat_template) == ("my.jsonl", None, None)
    assert (spec.cluster.name, spec.cluster.gpus_per_node, spec.training.seq_len) == ("h200", 4, seq_len)
    assert spec.output_dir == "runs/tiny-gpt-chat"


@pytest.mark.parametrize("task", TASKS)
def test_every_key_of_the_starter_may_be_uncommented(task: str) -> None:
    """What stands behind `#` is a key with its value, so the starter shows each key that means something to the task."""
    from launcher.job.spec import JobSpec
    from launcher.job.tasks import belongs

    text = starter(Wishes(task))
    for section in ("checkpoint", "evaluation", "tracking", "parallel", "cluster", "method"):
        assert f"{section}:" in text
    for section, field in JobSpec.model_fields.items():
        keys = [key for key in getattr(field.annotation, "model_fields", {}) if belongs(section, key, task)]
        assert [key for key in keys if f"{key}:" not in text] == []


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert fleetune("--help") == 0
    shown = capsys.readouterr().out
    for command in ("init", "plan", "prepare", "launch", "convert", "eval", "report", "demo", "schema", "explain-key"):
        assert f" {command} " in shown


def test_cost_is_for_people_and_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The documented keys; adapters train less; a model that has no such head is refused by name."""
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, "intermediate_size": 48, "vocab_size": 96, "tie_word_embeddings": False}))
    with measured_here():
        assert fleetune("cost", path, "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert fleetune("cost", path, "--method", "lora", "--json") == 0
        adapted = json.loads(capsys.readouterr().out)
        assert fleetune("cost", path) == 0
        assert f"  {facts['num_params']:,}" in capsys.readouterr().out
        path.write_text(json.dumps({"model_type": "t5"}))
        assert fleetune("cost", path) == 2
    assert "t5 cannot be built for causal_lm" in capsys.readouterr().err
    assert facts["num_params"] == facts["num_trainable_params"] == facts["num_active_params"]
    assert facts["num_params"] == 2 * facts["block_num_params"] + facts["outside_num_params"]
    assert facts["flops"]["backward"]["blocks"] == 2 * facts["flops"]["forward"]["blocks"]
    adapters = 2 * 16 * (4 * (32 + 32) + 3 * (32 + 48))  # r (in + out) for each linear layer of two blocks
    assert (adapted["num_trainable_params"], adapted["num_params"]) == (adapters, facts["num_params"] + adapters)
    assert adapted["flops"]["backward"]["outside"] == adapted["flops"]["forward"]["outside"]


def test_schema_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert fleetune("schema") == 0
    assert set(json.loads(capsys.readouterr().out)["required"]) == {"output_dir", "model", "task", "data", "training"}


def test_plan_json_is_for_programs(spec_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is JSON and nothing else."""
    with measured_here():
        assert fleetune("plan", spec_path, "--json", "--set", "parallel=zero2") == 0
    assert json.loads(capsys.readouterr().out)["plan"]["strategy"] == "zero2"


@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        ("ddp", {"plan.json", "accelerate.yaml"}),
        ("fsdp", {"plan.json", "fsdp.json"}),
        ("zero3", {"plan.json", "deepspeed.json"}),
    ],
)
def test_emit_writes_what_the_strategy_needs(strategy: str, names: set[str], spec_path: Path, tmp_path: Path) -> None:
    """Twice the same is no mistake; another plan over it is, and writes nothing."""
    folder = tmp_path / "files"
    with measured_here():
        options = ("plan", spec_path, "--emit", folder, "--set")
        assert fleetune(*options, f"parallel={strategy}") == 0
        assert fleetune(*options, f"parallel={strategy}") == 0
        before = {path.name: path.read_text() for path in folder.iterdir()}
        assert set(before) == names
        assert fleetune(*options, f"parallel={strategy}", "--set", "training.global_batch_size=16") == 2
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_a_dry_run_shows_all_and_does_nothing(
    spec_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan, each generated file, the command; no process, no folder."""
    monkeypatch.setattr("launcher.spawn.run_until_done", lambda *_, **__: pytest.fail("a process was started"))
    with measured_here():
        assert fleetune("launch", spec_path, "--dry-run", "--set", "parallel=zero2") == 0
    shown = capsys.readouterr().out
    config = json.loads(shown.partition("# deepspeed.json\n")[2].partition("\n\n# command")[0])
    assert config["zero_optimization"]["stage"] == 2
    assert f"--spec {spec_path} --set parallel=zero2" in shown.splitlines()[-1]
    assert list(spec_path.parent.iterdir()) == [spec_path]


@pytest.mark.parametrize(
    ("launcher_code", "outcome", "code"),
    [
        (0, {"exit_code": 0}, 0),
        (1, {"exit_code": 75}, 75),  # torchrun reports 1 for whatever its ranks say
        (1, {"exit_code": 2}, 2),
        (1, None, 1),
        (-9, None, 1),
        (143, None, 1),
        (0, None, 0),
        (1, {"exit_code": 75, "time": 0.0}, 1),  # of an earlier run
    ],
)
def test_launch_leaves_with_the_code_of_the_run(
    launcher_code: int, outcome: Any, code: int, spec_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rank 0 wrote, behind any launcher's own code."""

    def run_until_done(*_: Any, **__: Any) -> int:
        if outcome is not None:
            folder = Path(load_spec(spec_path).output_dir)
            (folder / "outcome.json").write_text(json.dumps({"time": time.time() + 1, **outcome}))
        return launcher_code

    monkeypatch.setattr("launcher.spawn.run_until_done", run_until_done)
    with measured_here():
        assert fleetune("launch", spec_path) == code


def raising(error: BaseException) -> Any:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(CheckpointError("a", 1, "is odd", "mend it")), 2, "error: a: 1 is odd; mend it\n"),
        (raising(FleetuneError("broke")), 1, "error: broke\n"),
        (raising(Preempted("saved")), 75, "error: saved\n"),
        (raising(KeyboardInterrupt()), 130, ""),
        (raising(typer.Abort()), 130, ""),
        (raising(typer.BadParameter("wrong")), 2, None),
    ],
)
def test_exit_codes(body: Any, code: int, message: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """0 done, 1 ours, 2 the user's, 75 saved and can go on, 130 Ctrl-C."""
    assert cli.guarded(body) == code
    shown = capsys.readouterr().err
    assert "wrong" in shown if message is None else shown == message


def test_what_nobody_foresaw_keeps_its_traceback() -> None:
    """A bug is not dressed as a mistake of the user's."""
    with pytest.raises(ZeroDivisionError):
        cli.guarded(lambda: 1 // 0)


def test_a_port_that_is_given_can_be_listened_on() -> None:
    """Above those that only root may take."""
    port = free_port()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", port))
    assert port > 1023
