"""The cost of a model is that of the model that is built: parameters exactly, saved bytes as autograd really holds them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.cost import ModelCost, cache
from launcher.cost.architecture import blocks_of, head_class, model_config
from launcher.cost.cache import cache_path, cached_cost
from launcher.cost.measure import SETTINGS, measure
from launcher.errors import FleetuneError, ModelError, UserError
from launcher.job import JobSpec
from launcher.job.tasks import FIELDS
from launcher.task import Facts, task_of
from tests.unit.costs import llama_405b, small_cost, spec_of

VOCAB = 96
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128},
    "llama": {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 128},
    "qwen3": {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128},
    "gemma3_text": {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128},
    "bert": {**SMALL, "max_position_embeddings": 128},
    "roberta": {**SMALL, "max_position_embeddings": 130},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 128},
    "modernbert": {**SMALL, "max_position_embeddings": 128, "pad_token_id": 0},
}
BERTS = ("bert", "roberta", "distilbert", "modernbert")


def spec_for(model_type: str, **changes: Any) -> JobSpec:
    """A small model of this type, with the head of its kind."""
    task: Any = {"name": "sequence_classification", "labels": ["a", "b", "c"]} if model_type in BERTS else "causal_lm"
    config = {"model_type": model_type, "vocab_size": VOCAB, **CONFIGS[model_type]}
    return spec_of(**{"model": {"from_config": config}, "task": task, **changes})


def built(spec: JobSpec, **config_changes: Any) -> Any:
    """The real model, in training mode."""
    task = task_of(spec, Facts(labels=("one", "other")))
    config = model_config(spec, None, {**task.config_overrides, **config_changes})
    torch.manual_seed(0)
    return head_class(task.auto_class).from_config(config, dtype=torch.float32).train()


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_counts_are_those_of_the_model_that_is_built(model_type: str) -> None:
    """Tied weights once; blocks, and what lies outside them."""
    spec = spec_for(model_type)
    cost, model = measure(spec, None), built(spec)
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    assert cost.architecture == type(model).__name__
    assert cost.num_params == sum(p.numel() for p in model.parameters())
    assert cost.num_trainable_params == cost.num_params
    assert cost.num_blocks == len(blocks) == 2
    assert cost.block_num_params == max(blocks)
    assert cost.outside_num_params + sum(blocks) == cost.num_params
    assert (cost.logits_width, cost.logits_per_token) == ((3, False) if model_type in BERTS else (VOCAB, True))
    assert cost.max_positions is None or cost.max_positions == 128


@pytest.mark.parametrize("name", list(FIELDS))
def test_every_task_is_measured(name: str) -> None:
    """A loss that looks at values has none to look at on the meta device."""
    model_type = "bert" if name == "masked_lm" else "gpt2"
    task = {"name": name, **({"chat_template": "plain"} if name in ("chat", "preference") else {})}
    spec = spec_for(model_type, task=task)
    cost = measure(spec, None, {"fp32": SETTINGS["fp32"]})
    assert cost.num_params == sum(p.numel() for p in built(spec).parameters())
    assert cost.saved["fp32"].blocks.at(2, 64) > 0


def test_tied_weights_count_once() -> None:
    """GPT-2's head is its embedding."""
    tied, untied = (measure(spec_for("gpt2", model__from_config=config(tie)), None) for tie in (True, False))
    assert untied.num_params - tied.num_params == VOCAB * 32


def config(tie: bool) -> dict[str, Any]:
    return {"model_type": "gpt2", "vocab_size": VOCAB, **CONFIGS["gpt2"], "tie_word_embeddings": tie}


@functools.cache
def measured(model_type: str) -> ModelCost:
    return measure(spec_for(model_type), None, {"fp32": SETTINGS["fp32"], "fp32/cpu": SETTINGS["fp32/cpu"]})


def held_bytes(model: Any, micro_batch_size: int, seq_len: int) -> int:
    """Bytes of the distinct storages that autograd keeps after a real forward, parameters and buffers not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # held here, so no address is given out again
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(micro_batch_size, seq_len, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.model_type in BERTS:
        inputs["attention_mask"][:, -1] = 0  # padded rows: without any, some models drop the mask
    if hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False  # type: ignore[assignment]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs)
    assert output.logits.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("micro_batch_size", "seq_len"), [(1, 128), (2, 128), (5, 100), (24, 17)])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert", "qwen3"])
def test_saved_bytes_are_what_autograd_holds(model_type: str, micro_batch_size: int, seq_len: int) -> None:
    """In a real forward on this CPU, at sizes that were not traced: within 2 %."""
    spec = spec_for(model_type)
    cost = measured(model_type)
    saved = cost.saved[cost.trace_of("fp32", kernel="cpu")]
    planned = saved.blocks.at(micro_batch_size, seq_len) + saved.outside.at(micro_batch_size, seq_len)
    held = held_bytes(built(spec), micro_batch_size, seq_len)
    assert planned == pytest.approx(held, rel=0.02)


def test_block_inputs_are_the_hidden_states() -> None:
    """Width x element size per token and block; half as much in bf16."""
    saved = measure(spec_for("llama"), None).saved
    assert saved["fp32"].block_inputs.at(3, 10) == 2 * 3 * 10 * 32 * 4
    assert saved["bf16"].block_inputs.at(3, 10) == 2 * 3 * 10 * 32 * 2


def test_nothing_is_allocated_for_a_large_model() -> None:
    """Blocks of Llama 3.1 405B are measured on a laptop: shapes without memory."""
    config = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 16384,
        "num_hidden_layers": 4,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "intermediate_size": 53248,
        "max_position_embeddings": 8192,
    }
    cost = measure(spec_of(model__from_config=config), None)
    whole = cost.outside_num_params + 126 * cost.block_num_params
    assert whole == llama_405b().num_params == 405_853_388_800  # the model card says 405 B
    assert cost.num_params == cost.outside_num_params + 4 * cost.block_num_params


def test_the_cost_survives_json() -> None:
    cost = measure(spec_for("gpt2"), None)
    assert ModelCost.from_json(json.loads(json.dumps(cost.to_json()))) == cost


# --- the cache


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty cache, and the list of measuring processes that were started."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    started: list[str] = []

    def run_python(module: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        started.append(module)
        return subprocess.CompletedProcess([], 0, json.dumps(small_cost().to_json()), "")

    monkeypatch.setattr(cache, "run_python", run_python)
    return started


def test_a_model_is_measured_once(starts: list[str]) -> None:
    assert cached_cost(spec_of()) == cached_cost(spec_of()) == small_cost()
    assert starts == ["launcher.cost.measure"]


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"seq_len": 99, "global_batch_size": 2, "num_epochs": 1}},
        {"parallel": "zero3"},
        {"cluster": {"name": "h100-80"}},
        {"output_dir": "elsewhere", "seed": 4},
        {"data__train": "other.txt"},
    ],
)
def test_what_does_not_alter_the_model_finds_it(changes: dict[str, Any], starts: list[str]) -> None:
    """A search over batch sizes and layouts measures nothing anew."""
    cached_cost(spec_of())
    cached_cost(spec_of(**changes))
    assert len(starts) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"model__from_config": {"model_type": "gpt2", "n_layer": 3}},
        {"task": "sequence_classification"},
        {"data__train_tokenizer": {"vocab_size": 500}},
        {"data__tokenizer": "some/tokenizer"},
    ],
)
def test_what_alters_the_model_is_measured(changes: dict[str, Any], starts: list[str]) -> None:
    cached_cost(spec_of())
    cached_cost(spec_of(**changes))
    assert len(starts) == 2


def test_a_config_file_counts_by_its_content(starts: list[str], tmp_path: Path) -> None:
    """The same path with another content is another model."""
    path = tmp_path / "config.json"
    for num_layers in (2, 2, 3):
        path.write_text(json.dumps({"model_type": "gpt2", "n_layer": num_layers}))
        cached_cost(spec_of(model__from_config=str(path)))
    assert len(starts) == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    starts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A home that is read-only on compute nodes costs some seconds, not the run."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached_cost(spec_of()) == small_cost()


def test_a_cache_file_cut_short_is_measured_again(starts: list[str]) -> None:
    cached_cost(spec_of())
    path = cache_path(spec_of())
    path.write_text(path.read_text()[:40])
    assert cached_cost(spec_of()) == small_cost()
    assert len(starts) == 2
    assert ModelCost.from_json(json.loads(path.read_text())) == small_cost()


def answer(monkeypatch: pytest.MonkeyPatch, code: int, stdout: str, stderr: str = "") -> None:
    monkeypatch.setattr(cache, "run_python", lambda *_, **__: subprocess.CompletedProcess([], code, stdout, stderr))


def test_a_problem_of_the_measuring_process_is_the_users(starts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With its value, or without one where it has none."""
    answer(monkeypatch, 0, json.dumps({"problem": {"path": "model", "rule": "is odd", "way_out": "mend it"}}))
    with pytest.raises(ModelError, match=r"^model: is odd; mend it$"):
        cached_cost(spec_of())
    answer(monkeypatch, 0, json.dumps({"problem": {"path": "m", "value": 3, "rule": "is odd", "way_out": "mend it"}}))
    with pytest.raises(ModelError, match=r"^m: 3 is odd; mend it$"):
        cached_cost(spec_of())
    assert not cache_path(spec_of()).exists()


def test_a_crash_of_the_measuring_process_is_ours(starts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words are shown, and nothing is cached."""
    answer(monkeypatch, 1, "", "Traceback ...\nZeroDivisionError")
    with pytest.raises(FleetuneError, match="ZeroDivisionError") as caught:
        cached_cost(spec_of())
    assert not isinstance(caught.value, UserError)
    assert not cache_path(spec_of()).exists()


def test_the_measuring_process_itself() -> None:
    """Started as it is in earnest; whatever libraries print, its last line is the answer."""
    spec = spec_for("gpt2")
    request = json.dumps({"spec": spec.model_dump(mode="json"), "vocab_size": None})
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cost.measure"], input=request, capture_output=True, text=True, check=True
    )
    assert ModelCost.from_json(json.loads(done.stdout.splitlines()[-1])) == measure(spec, None)
