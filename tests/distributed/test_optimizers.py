"""Every optimiser and every rule of its groups, on every engine it goes with: the loss curve of the library's own class
in one plain process, and the same curve after a resume."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from launcher.data.order import GlobalOrder
from launcher.data.prepare import prepare
from launcher.job import parse_spec
from tests.distributed.test_parity import RANKS, _batch, plain_model
from tests.support import job, records, run_ranks, torchrun
from tools.convert import convert

STEPS, SAVED = 12, 6
RELATIVE = 1e-4
LR = {"sgd": 0.3, "lion": 3e-4, "muon": 4e-3, "adafactor": 2e-2}
TRAINING: dict[str, dict[str, Any]] = {
    "layers": {"layer_lr_decay": 0.5},
    "l1": {"l1": 1e-3, "no_decay": ["*.wpe.*", "*.c_fc.*"]},
    "sgd": {"optimizer": "sgd", "momentum": 0.8},
    "lion": {"optimizer": "lion"},
    "muon": {"optimizer": "muon"},
    "adafactor": {"optimizer": "adafactor"},
    "ema": {"ema_decay": 0.7},
}
GOES = {
    "layers": ("ddp", "zero1", "zero2", "zero3", "fsdp"),
    "l1": ("ddp", "fsdp"),
    "sgd": ("zero2", "fsdp"),
    "lion": ("ddp", "zero1", "zero3", "fsdp"),
    "muon": ("ddp", "fsdp"),
    "adafactor": ("ddp",),
    "ema": ("ddp", "fsdp"),
}
RUNS = [(name, strategy) for name, strategies in GOES.items() for strategy in strategies]
RESUMED = [
    *(("layers", strategy) for strategy in ("zero2", "zero3", "fsdp")),
    *(("lion", strategy) for strategy in ("zero1", "zero3")),
    *((name, "fsdp") for name in ("muon", "ema")),
    ("adafactor", "ddp"),
]


def raw_job(root: Path, corpus: Path, name: str, strategy: str) -> dict[str, Any]:
    parallel = {"strategy": strategy, "micro_batch_size": 2, "recompute": "none", "precision": "fp32"}
    raw = job(root / f"{name}-{strategy}", corpus, "gpt", data__prepared=str(root / "data"), parallel=parallel)
    lr = LR.get(name, 2e-3)
    raw["training"] |= {"max_steps": STEPS, "lr": lr, "weight_decay": 0.1, **TRAINING[name]}
    return {**raw, "checkpoint": {"every_steps": SAVED}}


@pytest.fixture(scope="module")
def root(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs, trained by one pair of ranks."""
    root = tmp_path_factory.mktemp("optimizers")
    for name, strategy in RUNS:
        (root / f"{name}-{strategy}.yaml").write_text(yaml.safe_dump(raw_job(root, corpus, name, strategy)))
    prepare(parse_spec(raw_job(root, corpus, "layers", "ddp")))
    train(root, RUNS)
    return root


def train(root: Path, runs: list[tuple[str, str]]) -> None:
    paths = [root / f"{name}-{strategy}.yaml" for name, strategy in runs]
    assert run_ranks(torchrun(2, RANKS, *paths), root / "log", 600) == 0, (root / "log").read_text()[-6000:]


def curve(root: Path, name: str, strategy: str) -> list[float]:
    return [record["loss"] for record in records(root / f"{name}-{strategy}")]


def depth(name: str) -> int:
    """Layers above a parameter of the two-block GPT-2."""
    if ".wte." in name or ".wpe." in name:
        return 3
    return 2 - int(name.split(".h.")[1][0]) if ".h." in name else 0


def groups_of(model: Any, name: str, lr: float) -> Iterator[dict[str, Any]]:
    """One group per parameter, so that nothing of our own grouping is taken over."""
    for key, parameter in model.named_parameters():
        excluded = name == "l1" and (".wpe." in key or ".c_fc." in key)
        share = 0.5 ** depth(key) if name == "layers" else 1.0
        decay = 0.1 if parameter.ndim > 1 and not excluded else 0.0
        yield {"params": [parameter], "weight_decay": decay, "lr": lr * share}


def optimizers_of(model: Any, name: str, lr: float) -> list[torch.optim.Optimizer]:
    groups = list(groups_of(model, name, lr))
    if name == "muon":
        inside = {id(p) for p in model.transformer.h.parameters() if p.ndim == 2}
        matrices = [group for group in groups if id(group["params"][0]) in inside]
        others = [group for group in groups if id(group["params"][0]) not in inside]
        muon = torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(others, lr=lr)]
    return [_MAKERS.get(name, torch.optim.AdamW)(groups, lr)]


def _lion(groups: Any, lr: float) -> Any:
    from lion_pytorch import Lion

    return Lion(groups, lr=lr)


_MAKERS: dict[str, Callable[[Any, float], Any]] = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.8),
    "adafactor": lambda groups, lr: torch.optim.Adafactor(groups, lr=lr),
    "lion": _lion,
}


class Plain:
    """One process, one batch per step, transformers' own loss and schedule."""

    def __init__(self, root: Path, corpus: Path, name: str) -> None:
        import datasets

        spec = parse_spec(raw_job(root, corpus, name, "ddp"))
        training, data = spec.training, datasets.load_from_disk(str(root / "data"))["train"]
        self.model = plain_model(spec, root / "data", "gpt", data)
        optimizers = optimizers_of(self.model, name, training.lr)
        schedules = [transformers.get_scheduler("cosine", one, training.warmup_steps, STEPS) for one in optimizers]
        order = GlobalOrder(len(data), spec.seed)
        penalised = [
            p for key, p in self.model.named_parameters() if p.ndim > 1 and ".wpe." not in key and ".c_fc." not in key
        ]
        self.average = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.7)
        )
        self.average.n_averaged.fill_(1)  # it begins as the model is, instead of with the first update
        self.losses = []
        for step in range(STEPS):
            rows = [data[int(i)] for i in order.samples(step * 8, 8)]
            loss = self.model(**_batch(rows, "gpt")).loss
            penalty = 1e-3 * sum(p.abs().sum() for p in penalised) if name == "l1" else 0.0
            (loss + penalty).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for one in (*optimizers, *schedules):
                one.step()
            self.model.zero_grad()
            self.average.update_parameters(self.model)
            self.losses.append(loss.item())


@pytest.fixture(scope="module")
def plain(root: Path, corpus: Path) -> Callable[[str], Plain]:
    return functools.cache(lambda name: Plain(root, corpus, name))


@pytest.mark.parametrize(("name", "strategy"), RUNS)
def test_losses_follow_the_library(root: Path, plain: Callable[[str], Plain], name: str, strategy: str) -> None:
    """12 steps on two ranks with accumulation 2, uneven rows: each loss within 1e-4 relative."""
    ours, theirs = curve(root, name, strategy), plain(name).losses
    assert len(ours) == STEPS
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    print(f"parity {name} {strategy}: worst relative difference {worst:.1e}")
    assert worst < RELATIVE
    assert max(theirs) - min(theirs) > 100 * RELATIVE * theirs[0], "a curve that stood still would prove little"


def test_resumed_runs_go_on_as_straight_ones(root: Path) -> None:
    """From step 6 to 12 again: bit for bit, so moments, averages and each group's rates and decay came back."""
    straight = {run: curve(root, *run) for run in RESUMED}
    for name, strategy in RESUMED:
        shutil.rmtree(root / f"{name}-{strategy}" / "checkpoints" / f"step-{STEPS:08d}")
    train(root, RESUMED)
    assert (root / "log").read_text().count("resuming from") >= len(RESUMED)
    for run in RESUMED:
        assert curve(root, *run) == straight[run], run


@pytest.mark.parametrize("strategy", GOES["ema"])
def test_the_average_is_that_of_torch(root: Path, plain: Callable[[str], Plain], strategy: str, tmp_path: Path) -> None:
    """`convert --ema` after 12 steps: `torch.optim.swa_utils.AveragedModel` in one process; the weights are others."""
    from safetensors.torch import load_file

    convert(str(root / f"ema-{strategy}"), f"hf:{tmp_path / 'ema'}", ema=True)
    convert(str(root / f"ema-{strategy}"), f"hf:{tmp_path / 'last'}")
    ours, last = (load_file(tmp_path / name / "model.safetensors") for name in ("ema", "last"))
    theirs = dict(plain("ema").average.module.named_parameters())
    assert ours.keys() == last.keys() >= theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.detach(), rtol=0, atol=2e-5, msg=name)
    assert max(float((ours[name] - last[name]).abs().max()) for name in ours) > 1e-3
