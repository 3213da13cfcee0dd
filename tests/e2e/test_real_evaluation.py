"""Scores of a real model on real sets, equal to lm-evaluation-harness's own `hf` model, by both doors."""

from __future__ import annotations

import json
import logging
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.unit.small_models import scored

DATA = Path(os.environ.get("FLEETUNE_TEST_DATA", "-"))
MODEL = DATA / "weights" / "stories15M"
SETS = {"arc": "mc/llm_foundry/arc_easy.jsonl", "lambada": "mc/llm_foundry/lambada_openai.jsonl"}
YAML = {
    "arc": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "lambada": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' '+continuation}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity", "aggregation": "perplexity"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}
NUM = 40

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="FLEETUNE_TEST_DATA does not name a folder with stories15M")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """YAML tasks beside the first examples of each set."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, file in SETS.items():
        with (DATA / file).open(encoding="utf-8") as lines:
            (folder / f"{name}.jsonl").write_text("".join(islice(lines, NUM)), encoding="utf-8")
    for name, task in YAML.items():
        data = folder / f"{'arc' if name == 'arc' else 'lambada'}.jsonl"
        head = {"task": f"local_{name}", "dataset_path": "json", "test_split": "test"}
        # JSON is YAML
        whole = {**head, "dataset_kwargs": {"data_files": {"test": str(data)}}, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(whole), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def theirs(tasks: Path) -> dict[str, dict[str, Any]]:
    """What the harness's own model says of the three tasks."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    model = HFLM(pretrained=str(MODEL), batch_size=8, device="cpu", dtype="float32")
    names = [f"local_{name}" for name in YAML]
    found = simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=False)
    assert found is not None
    return dict(found["results"])


def test_our_tasks_say_what_the_harness_says(
    tasks: Path, theirs: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--resamples", 10)
    prompt = ("--prompt", "{query}\\nAnswer:")
    arc = scored(capsys, MODEL, "--task", "multiple_choice", "--data", tasks / "arc.jsonl", *prompt, *few)["metrics"]
    assert arc["accuracy"] == pytest.approx(theirs["local_arc"]["acc,none"], abs=1e-4)
    assert arc["accuracy_norm"] == pytest.approx(theirs["local_arc"]["acc_norm,none"], abs=1e-4)
    lambada = scored(capsys, MODEL, "--task", "cloze", "--data", tasks / "lambada.jsonl", *few)["metrics"]
    assert lambada["accuracy"] == pytest.approx(theirs["local_lambada"]["acc,none"], abs=1e-4)
    assert lambada["perplexity"] == pytest.approx(theirs["local_lambada"]["perplexity,none"], rel=1e-4)


def test_the_harness_asks_our_models(
    tasks: Path, theirs: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"local_{name}" for name in YAML]
    said = scored(capsys, MODEL, "--harness", *names, "--include-path", tasks, "--resamples", 10)["metrics"]
    wanted = {
        f"{task}/{key.removesuffix(',none')}": value
        for task, row in theirs.items()
        for key, value in row.items()
        if key.endswith(",none") and "_stderr" not in key
    }
    assert len(wanted) == 5
    assert said == pytest.approx(wanted, rel=1e-4)
