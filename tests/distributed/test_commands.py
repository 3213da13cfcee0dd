"""`fleetune launch` of stages, `sweep` and `lr-find`: the real commands, which start real runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import torch
import transformers
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tests.support import job, kill_tree, rank_environment, records

LONE = {"parallel__strategy": "ddp", "parallel__micro_batch_size": 8, "cluster__gpus_per_node": 1}


def fleetune(*words: str | Path, log: Path) -> int:
    with log.open("ab") as output:
        argv = [sys.executable, "-m", "launcher", *map(str, words)]
        return subprocess.run(argv, env=rank_environment(), stdout=output, stderr=output, check=False).returncode


def written(path: Path, raw: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(raw))
    return path


def test_stages_run_one_after_the_other(corpus: Path, tmp_path: Path) -> None:
    """Random weights, then adapters beside what the first stage trained, merged into it; a second launch finds both done."""
    raw = job(tmp_path / "run", corpus, "gpt", training__max_steps=3, **LONE)
    raw["stages"] = [
        {"name": "base"},
        {"name": "adapted", "method": {"name": "lora", "r": 4}, "training": {"lr": 1e-2}},
    ]
    path, log = written(tmp_path / "job.yaml", raw), tmp_path / "log"
    assert fleetune("launch", path, log=log) == 0, log.read_text()[-3000:]
    base, adapted = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / stage / "model").transformer
        for stage in ("base", "adapted")
    )
    assert torch.equal(base.wte.weight, adapted.wte.weight), "the second stage starts from the model of the first"
    assert not torch.equal(base.h[0].attn.c_attn.weight, adapted.h[0].attn.c_attn.weight)
    manifest = json.loads(next((tmp_path / "run" / "adapted" / "checkpoints").glob("*/manifest.json")).read_text())
    assert manifest["base"]["folder"] == str(tmp_path / "run" / "base" / "model")
    assert fleetune("launch", path, log=log) == 0
    assert log.read_text().count(": done, ") == 2
    assert fleetune("plan", path, log=log) == 2


def sweep_job(root: Path, corpus: Path) -> dict[str, Any]:
    raw = job(root / "run", corpus, "bert", training__max_steps=4, training__warmup_steps=0, **LONE)
    raw["evaluation"] = {"every_steps": 2, "max_samples": 16}
    parameters = {
        "training.lr": {"low": 1e-5, "high": 1e-1, "log": True},
        "training.schedule": ["linear", "constant"],
        "training.global_batch_size": {"low": 8, "high": 16, "step": 8},
    }
    return {**raw, "sweep": {"parameters": parameters, "trials": 3, "metric": "accuracy"}}


def study_of(root: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(root / "run" / "study.jsonl")))
    return optuna.load_study(study_name="fleetune", storage=storage)


def test_a_sweep_goes_on_after_a_kill(corpus: Path, tmp_path: Path) -> None:
    """`kill -9` in the second trial, then the same command: three finished trials, the one that was cut off in its own
    folder and with its own values; every score is that of its run's records."""
    path, log = written(tmp_path / "job.yaml", sweep_job(tmp_path, corpus)), tmp_path / "log"
    with log.open("wb") as output:
        argv = [sys.executable, "-m", "launcher", "sweep", str(path)]
        child = subprocess.Popen(argv, env=rank_environment(), stdout=output, stderr=output)
        cut = tmp_path / "run" / "trials" / "0001"
        end = time.monotonic() + 240
        while not (cut / "metrics.jsonl").is_file():
            assert child.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.05)
        ranks = psutil.Process(child.pid).children(recursive=True)
        kill_tree(child)
        assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    values = {trial.number: trial.params for trial in study_of(tmp_path).trials}
    assert fleetune("sweep", path, log=log) == 0, log.read_text()[-3000:]
    study = study_of(tmp_path)
    finished = study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])
    assert len(finished) == 3
    again = next(trial for trial in finished if trial.user_attrs["folder"] == str(cut))
    assert again.params == values[1]
    for trial in finished:
        folder = Path(trial.user_attrs["folder"])
        scores = [record["accuracy"] for record in records(folder, "evaluation")]
        assert trial.value == max(scores)
        told = json.loads(next((folder / "checkpoints").glob("*/manifest.json")).read_text())["spec"]["training"]
        assert told["global_batch_size"] == trial.params["training.global_batch_size"]
        lr = records(folder)[0]["lr"]
        assert lr == pytest.approx(trial.params["training.lr"])
    assert f"the best, in {study.best_trial.user_attrs['folder']}" in log.read_text()
    assert fleetune("sweep", path, log=log) == 0, "all done: nothing is run again"
    assert len(study_of(tmp_path).trials) == len(study.trials)


def test_lr_find_suggests_a_rate(corpus: Path, tmp_path: Path) -> None:
    """Between its bounds, from as many steps as were asked for, beside the run and not in it."""
    path, log = written(tmp_path / "job.yaml", job(tmp_path / "run", corpus, "gpt", **LONE)), tmp_path / "log"
    assert fleetune("prepare", path, log=log) == 0
    log.unlink()
    assert fleetune("lr-find", path, "--steps", "30", "--to", "3", "--json", log=log) == 0, log.read_text()[-3000:]
    found = json.loads(log.read_text().splitlines()[-1])
    rates = [record["lr"] for record in records(tmp_path / "run" / "lr-find")]
    assert rates[0] == pytest.approx(1e-7)
    assert rates[-1] == pytest.approx(3.0, rel=1e-3) or len(rates) < 30
    assert 1e-6 < found["suggested"] <= found["lowest"] / 10
    assert not (tmp_path / "run" / "checkpoints").exists()
