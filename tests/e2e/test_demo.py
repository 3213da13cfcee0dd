"""The demo's own steps on a smaller job: real corpus, both engines, two ranks; the folder holds what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from sklearn.metrics import f1_score

from launcher.errors import FleetuneError, UserError
from launcher.task import task_of
from launcher.train.model import whole_model
from tools.corpus import write_corpus
from tools.demo import BERT, GPT, clear, learn
from tools.demo_report import Learnt, Lesson, check_promises, majority_f1
from tools.evaluate import Scores, main

FEW = ("training.max_steps=4", "training.global_batch_size=8", "data.train_tokenizer.vocab_size=600")
SMALL = {
    "gpt": (*FEW, "model.from_config.n_layer=2", "model.from_config.n_embd=32"),
    "bert": (*FEW, "model.from_config.hidden_size=32", "model.from_config.intermediate_size=64"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a demo")  # with a blank, as in many a home folder
    write_corpus(folder / "corpus")
    return folder


def trained_state(learnt: Learnt, scratch: Path) -> dict[str, torch.Tensor]:
    """The weights in the checkpoint, read by the engine's own tool and not by ours."""
    saved = Path(learnt.spec.output_dir) / "checkpoints" / "step-00000004"
    if learnt.lesson.checkpoint_kind == "zero":
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return dict(get_fp32_state_dict_from_zero_checkpoint(str(saved / "zero")))
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(saved / "dcp", scratch / "whole.pt")
    state: dict[str, Any] = torch.load(scratch / "whole.pt", weights_only=True)
    return dict(state["model"])


@pytest.mark.parametrize("lesson", [GPT, BERT], ids=lambda lesson: lesson.name)
def test_the_model_folder_holds_what_was_trained(
    folder: Path, tmp_path: Path, lesson: Lesson, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers finds every weight and no other; the logits are the trained model's; `fleetune eval` agrees."""
    learnt = learn(lesson, folder, Console(), SMALL[lesson.name])
    assert learnt.after.metrics["loss"] != learnt.before.metrics["loss"]

    task = task_of(learnt.spec, learnt.data.facts(learnt.spec.task))
    kind = getattr(transformers, task.auto_class)
    opened, info = kind.from_pretrained(learnt.model_dir, output_loading_info=True)
    assert not any(info.values()), info
    trained = whole_model(learnt.spec, task, learnt.data)[0].eval()
    trained.load_state_dict(trained_state(learnt, tmp_path))
    batch = task.collate(learnt.data.split("validation").rows(np.arange(4)), learnt.data.pad_id)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        difference = (opened.eval()(**inputs).logits - trained(**inputs).logits).abs().max()
    assert float(difference) <= 1e-5

    capsys.readouterr()
    assert main([str(learnt.model_dir), "--prepared", learnt.spec.prepared_dir]) == 0
    assert f" loss {learnt.after.metrics['loss']:.6g} " in " ".join(capsys.readouterr().out.split())
    if lesson is BERT:
        assert majority_f1(learnt.data) == pytest.approx(f1_of_the_commonest_label(learnt), rel=1e-12)


def f1_of_the_commonest_label(learnt: Learnt) -> float:
    """By scikit-learn."""
    train, truth = (
        [row["label"] for row in split.rows(np.arange(len(split)))]
        for split in (learnt.data.split("train"), learnt.data.split("validation"))
    )
    guess = max(train, key=train.count)
    return float(f1_score(truth, [guess] * len(truth), average="macro", zero_division=0))


def promised(gpt: float, bert: float) -> None:
    def scores(value: float) -> Scores:
        return Scores(1, {"perplexity": value, "f1": value})

    def learnt(lesson: Lesson, before: float, after: float) -> Learnt:
        return Learnt(lesson, *[cast(Any, None)] * 3, scores(before), scores(after), 0.0)

    check_promises(learnt(GPT, 100.0, gpt), learnt(BERT, 0.0, bert), majority=0.1)


def test_a_promise_that_is_not_kept_is_an_error() -> None:
    """Also where a score is not a number."""
    promised(gpt=50.0, bert=0.41)
    for gpt in (51.0, float("nan")):
        with pytest.raises(FleetuneError, match=rf"^perplexity went from 100.0 to {gpt} only, not below half$"):
            promised(gpt=gpt, bert=0.9)
    with pytest.raises(FleetuneError, match=r"^macro F1 is 0.390, not 0.3 above always the same answer \(0.100\)$"):
        promised(gpt=20.0, bert=0.39)


def test_a_second_demo_deletes_what_the_first_made_and_nothing_else(tmp_path: Path) -> None:
    clear(tmp_path)
    made, theirs = tmp_path / "gpt" / "data", tmp_path / "gpt" / "notes.txt"
    made.mkdir(parents=True)
    theirs.touch()
    clear(tmp_path)
    assert not made.exists()
    assert theirs.exists()


def test_a_folder_in_use_is_not_touched(tmp_path: Path) -> None:
    theirs = tmp_path / "bert" / "model"
    theirs.mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        clear(tmp_path)
    assert str(caught.value) == f"{theirs}: was not made by a demo and is in its way; give another --folder"
    assert [*tmp_path.iterdir()] == [tmp_path / "bert"]
