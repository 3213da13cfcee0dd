"""What a run does when numbers stop being finite, when scores stop getting better, and when a rank hangs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from launcher.data.order import GlobalOrder
from launcher.data.prepare import prepare
from launcher.job import parse_spec
from tests.distributed.test_kill_and_resume import RUN, STALLING, wait_for
from tests.distributed.test_parity import RANKS, _batch
from tests.support import GPT, job, records, run_ranks, started, torchrun
from tools.convert import convert

STEPS, POISONED = 8, 5
STRATEGIES = ("ddp", "fsdp", "zero2")
LONE = {"parallel__strategy": "ddp", "parallel__micro_batch_size": 8, "cluster__gpus_per_node": 1}


class Poison:
    """A model with weights, one row of whose embeddings is NaN: that of a token which one sample alone has, at step 5."""

    def __init__(self, root: Path, corpus: Path) -> None:
        import datasets

        self.prepared, self.model = root / "data", root / "model"
        config = {**GPT, "tie_word_embeddings": False}
        spec = parse_spec(
            job(root / "none", corpus, "gpt", data__prepared=str(self.prepared), model__from_config=config)
        )
        prepare(spec)
        self.data = datasets.load_from_disk(str(self.prepared))["train"]
        self.order = GlobalOrder(len(self.data), spec.seed)
        seen = [self.order.samples(8 * step, 8) for step in range(STEPS)]
        others = {token for step in range(STEPS) if step != POISONED - 1 for i in seen[step] for token in self._ids(i)}
        self.sample, self.token = next(
            (int(i), token) for i in seen[POISONED - 1] for token in self._ids(i) if token not in others
        )
        self.samples = sorted(int(i) for i in seen[POISONED - 1] if self.token in self._ids(i))
        torch.manual_seed(3)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.prepared / "tokenizer")
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        )
        with torch.no_grad():
            model.transformer.wte.weight[self.token] = float("nan")
        model.save_pretrained(self.model)

    def _ids(self, sample: Any) -> set[int]:
        return set(self.data[int(sample)]["input_ids"])

    def plain_losses(self) -> list[float]:
        """One process that leaves the poisoned step out, its rate as well."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.model).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
        schedule = transformers.get_scheduler("cosine", optimizer, 3, STEPS)
        losses = []
        for step in range(STEPS):
            if step == POISONED - 1:
                continue
            rows = [self.data[int(i)] for i in self.order.samples(8 * step, 8)]
            loss = model(**_batch(rows, "gpt")).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.fixture(scope="module")
def poison(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Poison:
    return Poison(tmp_path_factory.mktemp("poison"), corpus)


def poisoned_job(poison: Poison, corpus: Path, folder: Path, **overrides: Any) -> dict[str, Any]:
    raw = job(folder, corpus, "gpt", data__prepared=str(poison.prepared), training__max_steps=STEPS, **overrides)
    raw["model"] = {"path": str(poison.model)}
    raw["training"] |= {"weight_decay": 0.0}
    return raw


def write(path: Path, raw: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(raw))
    return path


def test_steps_that_are_not_finite_are_left_out(poison: Poison, corpus: Path, tmp_path: Path) -> None:
    """On two ranks and three engines: losses and rates of a plain process that leaves the step out; step, sample and
    layer are named."""
    paths = []
    for strategy in STRATEGIES:
        parallel = {"strategy": strategy, "micro_batch_size": 2, "recompute": "none", "precision": "fp32"}
        raw = poisoned_job(poison, corpus, tmp_path / strategy, parallel=parallel, training__on_nonfinite="skip")
        paths.append(write(tmp_path / f"{strategy}.yaml", raw))
    log = tmp_path / "log"
    assert run_ranks(torchrun(2, RANKS, *paths), log, 600) == 0, log.read_text()[-6000:]
    expected = poison.plain_losses()
    for strategy in STRATEGIES:
        found = records(tmp_path / strategy)
        assert [record["loss"] is None for record in found] == [step == POISONED for step in range(1, STEPS + 1)]
        ours = [record["loss"] for record in found if record["loss"] is not None]
        assert ours == pytest.approx(expected, rel=1e-4), strategy
        assert [record["skipped_steps"] for record in found] == [int(step >= POISONED) for step in range(1, STEPS + 1)]


def test_a_run_stops_and_names_step_layer_and_sample(poison: Poison, corpus: Path, tmp_path: Path) -> None:
    """Exit code 1: nothing of it is saved."""
    path = write(tmp_path / "job.yaml", poisoned_job(poison, corpus, tmp_path / "run", **LONE))
    assert run_ranks([sys.executable, str(RUN), "--spec", str(path)], tmp_path / "log") == 1
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    shown = ", ".join(map(str, sorted(int(i) for i in poison.order.samples(8 * (POISONED - 1), 8))))
    assert outcome["message"].startswith(
        f"step {POISONED}: the gradient norm is nan; first in layer transformer.wte, samples {shown}: lower training.lr"
    )
    assert len(records(tmp_path / "run")) == POISONED - 1
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose rate is far too high, scored every two steps until three scores were no better."""
    root = tmp_path_factory.mktemp("stopped")
    raw = job(root / "run", corpus, "gpt", **LONE)
    raw["training"] |= {"max_steps": 60, "lr": 0.3, "warmup_steps": 0, "schedule": "lr_range", "min_lr_ratio": 1e-3}
    raw["evaluation"] = {"every_steps": 2, "max_samples": 16, "metric": "loss", "patience": 3}
    raw["checkpoint"] = {"keep_last": 3, "every_steps": 2}
    raw["tracking"] |= {"to": ["tensorboard"]}
    prepare(parse_spec(raw))
    write(root / "job.yaml", raw)
    train_again(root)
    return root


def train_again(root: Path) -> None:
    log = root / "log"
    assert run_ranks([sys.executable, str(RUN), "--spec", str(root / "job.yaml")], log) == 0, log.read_text()[-3000:]


def test_a_run_stops_early_and_keeps_its_best_checkpoint(stopped: Path) -> None:
    """The best of all scores is named and kept beside the newest three; started again, it trains no more."""
    run = stopped / "run"
    scores = {record["step"]: record["loss"] for record in records(run, "evaluation")}
    best = min(scores, key=lambda step: scores[step])
    last = max(scores)
    assert last == best + 6 < 60
    assert records(run, "best") == [{"kind": "best", "metric": "loss", "value": scores[best], "step": best, "stale": 3}]
    kept = [f"step-{step:08d}" for step in (best, last - 4, last - 2, last)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == kept
    assert "stopped early after step" in (stopped / "log").read_text()
    before = len(records(run))
    train_again(stopped)
    assert len(records(run)) == before


def test_the_best_checkpoint_and_means_are_converted(stopped: Path, tmp_path: Path) -> None:
    run = stopped / "run"
    best = records(run, "best")[-1]["step"]
    convert(str(run), f"hf:{tmp_path / 'best'}", best=True)
    convert(str(run / "checkpoints" / f"step-{best:08d}"), f"hf:{tmp_path / 'named'}")
    convert(str(run), f"hf:{tmp_path / 'mean'}", average=3)
    last = [best + 2, best + 4, best + 6]
    for step in last:
        convert(str(run / "checkpoints" / f"step-{step:08d}"), f"hf:{tmp_path / str(step)}")
    of = {name: load_file(tmp_path / name / "model.safetensors") for name in ("best", "named", "mean", *map(str, last))}
    for name, value in of["mean"].items():
        assert torch.equal(of["best"][name], of["named"][name])
        mean = torch.stack([of[str(step)][name].double() for step in last]).mean(0).to(value.dtype)
        assert torch.equal(value, mean), name


def test_tensorboard_has_what_the_records_have(stopped: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stopped / "run" / "tensorboard"))
    events.Reload()
    for kind, name in (("train", "loss"), ("train", "lr"), ("evaluation", "accuracy")):
        expected = [(record["step"], record[name]) for record in records(stopped / "run", kind)]
        found = [(event.step, event.value) for event in events.Scalars(f"{kind}/{name}")]
        assert [step for step, _ in found] == [step for step, _ in expected]
        np.testing.assert_allclose([v for _, v in found], [v for _, v in expected], rtol=1e-6)


def test_records_say_what_is_needed(stopped: Path) -> None:
    record = records(stopped / "run")[0]
    assert record["mfu"] > 0
    assert record["peak_host_bytes"] > 1e8
    assert record["data_wait_seconds"] >= 0
    assert record["loss_spike"] is False


def test_every_rank_writes_its_stack_when_one_hangs(corpus: Path, tmp_path: Path) -> None:
    """Reading stops on every rank after two steps: within seconds two files say where each of them waits."""
    parallel = {"strategy": "ddp", "micro_batch_size": 2, "recompute": "none"}
    raw = job(tmp_path / "run", corpus, "gpt", parallel=parallel, tracking__hang_seconds=4)
    prepare(parse_spec(raw))
    path = write(tmp_path / "job.yaml", raw)
    files = [tmp_path / "run" / "logs" / f"stacks-0000{rank}.txt" for rank in (0, 1)]
    with started(torchrun(2, STALLING, "2", "--spec", path), tmp_path / "log") as child:
        wait_for(lambda: all(file.is_file() and file.stat().st_size for file in files), child)
        time.sleep(0.5)
        for file in files:
            said = file.read_text()
            assert "Timeout (0:00:04)!" in said
            assert "stalling_run.py" in said
            assert "loop.py" in said
