"""Adapters and frozen parameters on every engine: the loss curve, and the tensors, of peft in one plain process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from launcher.data.prepare import prepare
from launcher.errors import CheckpointError
from launcher.job import load_spec, parse_spec
from launcher.stored.dcp import DcpSource
from launcher.stored.zero import ZeroSource
from launcher.task import task_of
from tests.distributed.test_parity import RANKS, RELATIVE, STEPS, plain_model, plain_run
from tests.support import job, records, run_ranks, torchrun
from tools.convert import convert
from tools.evaluate import evaluate
from tools.formats.locate import locate

LORA = {"name": "lora", "r": 3, "lora_alpha": 12.0}  # an odd rank: no engine can cut the adapters evenly
FROZEN = {"freeze_embeddings": True, "freeze_blocks": 1}
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"gpt-{strategy}": ("gpt", strategy, LORA) for strategy in ("ddp", "fsdp", "zero2", "zero3")},
    "bert-zero3": ("bert", "zero3", {**LORA, "use_dora": True}),
    "frozen-fsdp": ("gpt", "fsdp", FROZEN),
    "frozen-zero3": ("gpt", "zero3", FROZEN),
}
"""Name -> family, strategy, `method`. Two ranks, recompute, accumulation 2, saved every ten steps.

`gpt-*` start from a folder with weights, which their checkpoints name; the others from random weights, which they hold.
"""
RESUMED = ["gpt-fsdp", "gpt-zero2", "gpt-zero3"]
ADAPTED = [name for name in RUNS if name.startswith("gpt-")]


def reference_of(name: str) -> str:
    return name.partition("-")[0]


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lora")
    for family in ("gpt", "bert"):
        prepare(parse_spec(job(root / family, corpus, family, data__prepared=str(root / family))))
    return {family: root / family for family in ("gpt", "bert")}


@pytest.fixture(scope="module")
def base(prepared: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with weights of its own."""
    import datasets

    folder = tmp_path_factory.mktemp("base") / "gpt"
    data = datasets.load_from_disk(str(prepared["gpt"]))["train"]
    spec = parse_spec(job(folder, corpus, "gpt"))
    plain_model(spec.model_copy(update={"seed": 5}), prepared["gpt"], "gpt", data).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(prepared: dict[str, Path], base: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs, trained by one pair of ranks."""
    root = tmp_path_factory.mktemp("runs")
    for name, (family, strategy, method) in RUNS.items():
        parallel = {"strategy": strategy, "micro_batch_size": 2, "recompute": "full", "precision": "fp32"}
        raw = job(root / name, corpus, family, data__prepared=str(prepared[family]), parallel=parallel, method=method)
        raw |= {"checkpoint": {"every_steps": 10}}
        if name in ADAPTED:
            raw["model"] = {"path": str(base)}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    train(root, list(RUNS))
    return root


def train(root: Path, names: list[str]) -> None:
    log = root / "log"
    assert run_ranks(torchrun(2, RANKS, *(root / f"{name}.yaml" for name in names)), log, 900) == 0, log.read_text()[
        -6000:
    ]


@pytest.fixture(scope="module")
def references(prepared: dict[str, Path], base: Path, corpus: Path) -> dict[str, tuple[list[float], Any]]:
    """Losses and the trained model of one plain process, for each of the three methods."""

    def with_adapters(model: Any) -> Any:
        torch.manual_seed(11)  # the run's: it draws the adapters
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        config = peft.LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)

    return {
        "gpt": plain_run(prepared["gpt"], corpus, "gpt", with_adapters),
        "bert": plain_run(prepared["bert"], corpus, "bert", with_dora),
        "frozen": plain_run(prepared["gpt"], corpus, "gpt", frozen),
    }


def with_dora(model: Any) -> Any:
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", task_type="SEQ_CLS", use_dora=True)
    return peft.get_peft_model(model, config)


def frozen(model: Any) -> Any:
    model.transformer.wte.requires_grad_(False)
    model.transformer.wpe.requires_grad_(False)
    model.transformer.h[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("name", RUNS)
def test_losses_follow_one_plain_process(runs: Path, references: dict[str, Any], name: str) -> None:
    """20 steps: each loss within 1e-4 relative of peft (or a model with frozen parts) in one process."""
    ours, theirs = [record["loss"] for record in records(runs / name)], references[reference_of(name)][0]
    assert len(ours) == STEPS
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    print(f"parity {name}: worst relative difference {worst:.1e}")
    assert worst < RELATIVE
    assert max(theirs) - min(theirs) > 100 * RELATIVE * theirs[0], "a curve that stood still would prove little"


def adapter_of(run: Path, out: Path) -> dict[str, torch.Tensor]:
    if not out.exists():
        convert(str(run), f"hf:{out}")
    return load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_are_whole_on_every_engine(runs: Path, references: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Names, shapes and values of peft's own file after one plain process; no row that was trained is zero."""
    ours = adapter_of(runs / name, tmp_path / "out")
    references["gpt"][1].save_pretrained(tmp_path / "plain")
    theirs = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    for key, value in theirs.items():
        assert torch.equal(ours[key].any(dim=1), value.any(dim=1)), f"{key} has other zero rows"
        torch.testing.assert_close(ours[key], value, rtol=0, atol=2e-5, msg=key)
    assert any(value.any() for key, value in ours.items() if "lora_B" in key), "they start at zero"


@pytest.mark.parametrize("name", ADAPTED)
def test_adapter_and_merged_model_open_and_say_what_the_run_says(
    runs: Path, prepared: dict[str, Path], name: str, tmp_path: Path
) -> None:
    """In plain peft and plain transformers; the held-out loss is the one that the run wrote down, to 1e-5."""
    import datasets

    adapter_of(runs / name, tmp_path / "adapter")
    convert(str(runs / name), f"hf:{tmp_path / 'merged'}", merge=True)
    with_adapter = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(40).reshape(2, 20)
    torch.testing.assert_close(with_adapter(ids).logits, merged.eval()(ids).logits, rtol=0, atol=1e-5)

    rows = datasets.load_from_disk(str(prepared["gpt"]))["validation"]
    task = task_of(load_spec(runs / f"{name}.yaml"))
    for model in (with_adapter, merged):
        scores = evaluate(model, task, list(rows)).metrics
        assert scores["loss"] == pytest.approx(records(runs / name, "evaluation")[-1]["loss"], rel=1e-5)


def test_frozen_parameters_stay_as_they_were(
    runs: Path, prepared: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """Bit for bit, and the others move: frozen embeddings and block, and the weights beside adapters."""
    import datasets

    for family in ("gpt", "bert"):
        data = datasets.load_from_disk(str(prepared[family]))["train"]
        spec = parse_spec(job(tmp_path, corpus, family))
        start = dict(plain_model(spec, prepared[family], family, data).named_parameters())
        for name in [name for name in RUNS if RUNS[name][0] == family and name not in ADAPTED]:
            now = stored(runs / name)
            for key, value in start.items():
                is_frozen = family == "bert" and not key.startswith("classifier")
                is_frozen |= family == "gpt" and key.startswith(
                    ("transformer.wte", "transformer.wpe", "transformer.h.0.")
                )
                assert torch.equal(now[key], value) == is_frozen, f"{name}: {key}"


def stored(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of the last checkpoint by the plain model's names."""
    tensors = stored_tensors(run)
    return {plain_name(name): value for name, value in tensors.items() if "original_module" not in name}


def stored_tensors(run: Path) -> dict[str, torch.Tensor]:
    found = locate(run, None)
    source = ZeroSource(found.folder) if found.kind == "zero" else DcpSource(found.folder)
    return {name: source.read(name) for name in source.tensors}


def plain_name(name: str) -> str:
    for part in ("base_model.model.", "base_layer.", "modules_to_save.default."):
        name = name.replace(part, "")
    return name


def test_resumed_adapters_equal_straight_ones(runs: Path, tmp_path: Path) -> None:
    """From step 10 to 20 again: the adapters, bit for bit, with the base read anew from its own folder."""
    names = RESUMED
    straight = {name: adapter_of(runs / name, tmp_path / name) for name in names}
    for name in names:
        shutil.rmtree(runs / name / "checkpoints" / "step-00000020")
        assert not any("base_layer" in key for key in stored_tensors(runs / name)), "the base is named, not copied"
    train(runs, names)
    assert "resuming from" in (runs / "log").read_text()
    for name in names:
        again = adapter_of(runs / name, tmp_path / f"{name}-again")
        assert all(torch.equal(again[key], value) for key, value in straight[name].items()), name


def test_merging_needs_the_base_that_was_trained_beside(runs: Path, base: Path, tmp_path: Path) -> None:
    """Moved: --base finds it. Altered: refused by name. Held by the checkpoint alone: no adapter folder, only --merge."""
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    convert(str(runs / "gpt-fsdp"), f"hf:{tmp_path / 'merged'}", merge=True, base_dir=moved)
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="is not the file that the adapters were trained beside"):
        convert(str(runs / "gpt-fsdp"), f"hf:{tmp_path / 'no'}", merge=True, base_dir=moved)
    with pytest.raises(CheckpointError, match="exists only in this checkpoint"):
        convert(str(runs / "bert-zero3"), f"hf:{tmp_path / 'no'}")
    convert(str(runs / "bert-zero3"), f"hf:{tmp_path / 'bert'}", merge=True)
    assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").num_labels == 2
    with pytest.raises(CheckpointError, match="holds no adapters"):
        convert(str(runs / "frozen-fsdp"), f"hf:{tmp_path / 'no'}", merge=True)
