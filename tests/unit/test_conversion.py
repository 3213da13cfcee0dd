"""Conversions beyond the matrix: killed and gone on with, damaged, hostile, averaged, pruned, quantised, looked into.

Where DeepSpeed's and torch's own tools are wrong, a test here says so and shows what ours do.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from launcher.errors import CheckpointError
from launcher.stored.state import STEP
from launcher.stored.values import whole
from tests.support import REPO
from tools.conversion.opening import open_state
from tools.convert import convert, main
from tools.inspection import main as inspect_main

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process is meant

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40, "tie_word_embeddings": False,
}  # fmt: skip


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def save_torch(file: Path, model: Any, with_optimizer: bool = True) -> Path:
    """As `dcp_to_torch_save` gathers it: by name, every parameter once updated, two groups."""
    weights = dict(model.state_dict())
    if not with_optimizer:
        torch.save(weights, file)
        return file
    state = {
        name: {"step": torch.tensor(5.0), "exp_avg": torch.randn_like(value), "exp_avg_sq": torch.rand_like(value)}
        for name, value in weights.items()
    }
    common = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}
    groups = [
        {**common, "weight_decay": 0.1, "params": [name for name, value in weights.items() if value.ndim > 1]},
        {**common, "weight_decay": 0.0, "params": [name for name, value in weights.items() if value.ndim < 2]},
    ]
    torch.save({"model": weights, "optim": {"state": state, "param_groups": groups}, "step": 5}, file)
    return file


def opened(path: Path) -> Any:
    return open_state(str(path), None, lambda _what, _done, _total: None).state


def chain(source: Path, folder: Path) -> dict[str, Path]:
    """The same checkpoint in every format."""
    sinks = {"zero1": ("zero", 1), "zero3": ("zero", 3), "universal": ("universal", 2), "dcp": ("dcp", None)}
    found = {"torch": source}
    for name, (kind, stage) in sinks.items():
        convert(str(source), f"{kind}:{folder / name}", ranks=2, stage=stage)
        found[name] = folder / name
    convert(str(source), f"hf:{folder / 'hf'}", no_config=True)
    return {**found, "hf": folder / "hf"}


# A killed conversion


SLOW = """
import os, signal, sys
from tools.formats import files
wrote = files.Copy._write
def write(self, file):
    if self.files.index(file) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return wrote(self, file)
files.Copy._write = write
from tools.convert import convert
convert(sys.argv[1], sys.argv[2], no_config=True, shard_size_bytes=12000)
"""


def test_a_killed_conversion_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGKILL between two shards; the second run writes the rest alone, and the bytes are those of one run."""
    source, out = save_torch(tmp_path / "c.pt", llama(), with_optimizer=False), tmp_path / "out"
    convert(str(source), f"hf:{tmp_path / 'whole'}", no_config=True, shard_size_bytes=12000)
    names = sorted(file.name for file in (tmp_path / "whole").glob("*.safetensors"))
    argv = [sys.executable, "-c", SLOW, str(source), f"hf:{out}", "3"]
    killed = subprocess.run(argv, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    written: list[str] = []
    from tools.formats import files

    wrote = files.Copy._write
    monkeypatch.setattr(files.Copy, "_write", lambda self, file: (written.append(file.name), wrote(self, file))[1])
    convert(str(source), f"hf:{out}", no_config=True, shard_size_bytes=12000)
    assert written == names[3:]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()
    }
    assert not list(tmp_path.glob("*.partial"))


def test_another_conversion_does_not_go_on_in_what_one_left(tmp_path: Path) -> None:
    """Other bytes at the same path, or other options, start afresh."""
    source, out = save_torch(tmp_path / "c.pt", llama(), with_optimizer=False), tmp_path / "out"
    argv = [sys.executable, "-c", SLOW, str(source), f"hf:{out}", "2"]
    subprocess.run(argv, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, check=False)
    assert (tmp_path / "out.partial").is_dir()
    save_torch(source, llama(1), with_optimizer=False)
    convert(str(source), f"hf:{out}", no_config=True, verify=True)
    truth = llama(1).state_dict()
    assert all(torch.equal(value, truth[name]) for name, value in load_file(out / "model.safetensors").items())


# Damage


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    return chain(save_torch(folder / "c.pt", llama()), folder)


@pytest.mark.parametrize("kind", ["torch", "zero1", "zero3", "universal", "dcp", "hf"])
def test_one_flipped_byte_is_found_on_every_read_path(everywhere: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """In any value, of weights or optimiser, and in headers: refused, or without effect on what is written.

    (torch.load, safetensors and dcp.load all load it.)
    """
    whole_copy, rng = tmp_path / "copy", random.Random(kind)
    shutil.copytree(everywhere[kind], whole_copy) if everywhere[kind].is_dir() else shutil.copy(
        everywhere[kind], whole_copy
    )
    files = [file for file in (whole_copy, *whole_copy.rglob("*")) if file.is_file() and file.stat().st_size > 4000]
    truth = {name: whole(values) for name, values in opened(whole_copy).tensors.items()}
    refused = 0
    for attempt in range(12):
        file = rng.choice(files)
        content = file.read_bytes()
        at = rng.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
        out = tmp_path / f"out{attempt}"
        try:
            convert(str(whole_copy), f"torch:{out}")
        except CheckpointError:
            refused += 1
            assert not out.exists()
            assert not list(tmp_path.glob("*.partial"))
        else:
            written = torch.load(out, weights_only=True)
            model = written.get("model", written)
            assert all(torch.equal(model[name], value) for name, value in truth.items()), (file, at)
        file.write_bytes(content)
    assert refused >= 6, "values are most of a file"


def test_mixed_steps_are_named(tmp_path: Path) -> None:
    """A rank's file of another step has the right size and sound checksums; only its step gives it away."""
    source = save_torch(tmp_path / "c.pt", llama())
    convert(str(source), f"zero:{tmp_path / 'a'}", ranks=2, stage=2)
    content = torch.load(source, weights_only=True)
    for state in content["optim"]["state"].values():
        state["step"] += 1
    torch.save(content, source)
    convert(str(source), f"zero:{tmp_path / 'b'}", ranks=2, stage=2)
    name = "global_step5/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    with pytest.raises(CheckpointError, match="mixes steps: rank 0 saved step 5, rank 1 step 6"):
        convert(f"zero:{tmp_path / 'a'}", f"dcp:{tmp_path / 'out'}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ds_version": "0.31.0"}, "0.31.0 is a DeepSpeed whose layout is not known here"),
        ({"ds_config": {"zero_optimization": {"mics_shard_size": 4}}}, "is sharded by MiCS"),
        ({"ds_config": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}}, "swapped to NVMe"),
        ({"ds_config": {"tensor_parallel": {"autotp_size": 2}}}, "is cut by tensor parallelism"),
    ],
)
def test_layouts_that_are_not_supported_are_refused_by_name(
    everywhere: dict[str, Path], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shutil.copytree(everywhere["zero3"], tmp_path / "copy")
    for file in (tmp_path / "copy").rglob("*_optim_states.pt"):
        torch.save({**torch.load(file, weights_only=False), **change}, file)
    with pytest.raises(CheckpointError, match=message):
        convert(str(tmp_path / "copy"), f"torch:{tmp_path / 'out'}")


# Hostile files


class Exploit:
    """What an attacker would put into a checkpoint: unpickled, it runs."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


def poison_archive(file: Path, proof: Path) -> None:
    """The same archive with another pickle inside."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            bad = pickle.dumps({"model": Exploit(proof)}, protocol=2) if name.endswith("/data.pkl") else content
            archive.writestr(name, bad)


@pytest.mark.parametrize("kind", ["torch", "zero1", "zero3", "universal", "dcp"])
def test_a_pickle_that_would_run_something_runs_nothing(
    everywhere: dict[str, Path], kind: str, tmp_path: Path, capsys: Any
) -> None:
    """A real exploit in each file that is unpickled, one after another; it does work where pickles are trusted."""
    copy, proof = tmp_path / "copy", tmp_path / "proof"
    shutil.copytree(everywhere[kind], copy) if everywhere[kind].is_dir() else shutil.copy(everywhere[kind], copy)
    files = [copy] if copy.is_file() else [*sorted(copy.rglob("*.pt"))[:12], *copy.rglob(".metadata")]
    for file in files:
        content = file.read_bytes()
        if file.name == ".metadata":
            file.write_bytes(pickle.dumps(Exploit(proof)))
        else:
            poison_archive(file, proof)
        for command in (lambda: main([str(copy), f"torch:{tmp_path / 'out'}"]), lambda: inspect_main([str(copy)])):
            assert command() == 2, file
            assert "posix.system is not among the classes" in capsys.readouterr().err
        assert not proof.exists()
        assert not (tmp_path / "out").exists()
        file.write_bytes(content)
    pickle.loads(pickle.dumps(Exploit(proof)))
    assert proof.exists(), "the exploit works"


def test_only_trust_runs_what_a_file_names_and_says_what(tmp_path: Path, capsys: Any) -> None:
    """Training scripts keep their arguments in checkpoints: harmless, and still code of another's choice."""
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=1)}, tmp_path / "c.pt")
    argv = [str(tmp_path / "c.pt"), f"dcp:{tmp_path / 'out'}"]
    assert main(argv) == 2
    assert "argparse.Namespace is not among the classes" in capsys.readouterr().err
    assert main([*argv, "--trust"]) == 0
    assert "--trust: runs argparse.Namespace\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_cannot_point_outside(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="names a file outside its own folder"):
        convert(str(tmp_path / "m"), f"torch:{tmp_path / 'out'}")


# Right where others are wrong


def test_shards_are_no_larger_than_asked_and_small_kinds_survive(tmp_path: Path) -> None:
    """zero_to_fp32's .bin shards each hold the whole group; torch's consolidation writes 0-d tensors as 0.0."""
    odd = {"zero_d": torch.tensor(2.6592), "flags": torch.tensor([True, False]), "ids": torch.arange(5)}
    odd |= {"transposed": torch.randn(3, 5).t(), "view": torch.arange(40.0)[10:20:3]}
    torch.save(odd, tmp_path / "c.pt")
    convert(str(tmp_path / "c.pt"), f"dcp:{tmp_path / 'd'}", ranks=3)
    back = {name: torch.empty_like(value) for name, value in odd.items()}
    dcp.load(back, checkpoint_id=tmp_path / "d", no_dist=True)
    convert(str(tmp_path / "d"), f"hf:{tmp_path / 'h'}", no_config=True, shard_size_bytes=100)
    written = {name: t for file in (tmp_path / "h").glob("*.safetensors") for name, t in load_file(file).items()}
    for name, value in odd.items():
        assert torch.equal(back[name], value), name
        assert torch.equal(written[name], value), name
        assert written[name].dtype == value.dtype
    assert max(file.stat().st_size for file in (tmp_path / "h").glob("*.safetensors")) < 100 + 500


def test_groups_that_zero_cannot_keep_are_refused(tmp_path: Path) -> None:
    """ZeRO keeps one step for a group; parameters with several would lose theirs without a word."""
    source = save_torch(tmp_path / "c.pt", llama())
    content = torch.load(source, weights_only=True)
    content["optim"]["state"]["lm_head.weight"]["step"] += 3
    torch.save(content, source)
    with pytest.raises(CheckpointError, match=r"lm_head.weight was updated 8 times"):
        convert(str(source), f"zero:{tmp_path / 'out'}")
    convert(str(source), f"dcp:{tmp_path / 'd'}")
    state = opened(tmp_path / "d").optimizer.state
    assert [float(whole(state[name][STEP])) for name in ("lm_head.weight", "model.norm.weight")] == [8, 5]


def test_numbered_optimisers_are_refused_and_named_ones_are_read(tmp_path: Path) -> None:
    model = llama()
    for named in (False, True):
        optimizer = torch.optim.AdamW(model.named_parameters() if named else model.parameters())
        model(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
        optimizer.step()
        file = tmp_path / f"{named}.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        if named:
            state = opened(file).optimizer.state
            for name, parameter in model.named_parameters():
                assert torch.equal(whole(state[name]["exp_avg"]), optimizer.state[parameter]["exp_avg"])
        else:
            with pytest.raises(CheckpointError, match="numbers the optimiser's parameters"):
                opened(file)


# Options


def test_rename_and_only_weights(tmp_path: Path, capsys: Any) -> None:
    source = save_torch(tmp_path / "c.pt", llama())
    (tmp_path / "names.json").write_text(json.dumps({"lm_head.weight": "head.weight"}))
    argv = [str(source), f"dcp:{tmp_path / 'd'}", "--rename", str(tmp_path / "names.json"), "--only-weights"]
    assert main([*argv, "--verify"]) == 0
    state = opened(tmp_path / "d")
    assert state.optimizer is None
    assert "head.weight" in state.tensors
    (tmp_path / "names.json").write_text(json.dumps({"no.such": "x"}))
    assert main([str(source), f"dcp:{tmp_path / 'e'}", *argv[2:]]) == 2
    assert "--rename: no.such is not in the checkpoint" in capsys.readouterr().err


def test_options_that_mean_nothing_for_a_target_are_refused(tmp_path: Path, capsys: Any) -> None:
    source = save_torch(tmp_path / "c.pt", llama())
    for target, option in (("hf", "--ranks=2"), ("dcp", "--stage=2"), ("torch", "--no-config"), ("dcp", "--prune=0.5")):
        assert main([str(source), f"{target}:{tmp_path / 'out'}", option]) == 2
        assert f"{option.partition('=')[0]}: has no meaning for {target};" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_torch(tmp_path / "c.pt", llama())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("tools.conversion.placing.shutil.disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes, the disk has 1000 free"):
        convert(str(source), f"dcp:{tmp_path / 'out'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pt"]


# Ready for inference


def test_the_mean_of_checkpoints(tmp_path: Path, config: Path) -> None:
    models = [llama(seed) for seed in range(3)]
    files = [save_torch(tmp_path / f"{seed}.pt", model) for seed, model in enumerate(models)]
    more = tuple(map(str, files[1:]))
    convert(str(files[0]), f"hf:{tmp_path / 'out'}", config_dir=config, soup=more, soup_weights=(2.0, 1.0, 1.0))
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        all_three = [model.state_dict()[name].double() for model in models]
        assert torch.equal(value, (0.5 * all_three[0] + 0.25 * all_three[1] + 0.25 * all_three[2]).float())


@pytest.mark.parametrize("dora", [False, True])
def test_a_peft_folder_is_merged_layer_by_layer_as_peft_merges_it(tmp_path: Path, config: Path, dora: bool) -> None:
    """LoRA and DoRA over a saved base; in one layer's memory at a time, and the bits of peft's own whole merge."""
    llama().save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    settings = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_dora=dora, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(base, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    result = convert(f"peft:{tmp_path / 'adapter'}", f"hf:{tmp_path / 'out'}", verify=True)
    assert result.architecture == "LlamaForCausalLM"
    truth = adapted.merge_and_unload().state_dict()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == truth.keys()
    for name, value in written.items():
        assert torch.equal(value, truth[name]), name


@pytest.mark.parametrize("how", ["0.3", "2:4"])
def test_pruning_zeroes_the_smallest_of_linear_layers_alone(tmp_path: Path, config: Path, how: str) -> None:
    truth = llama().state_dict()
    source = save_torch(tmp_path / "c.pt", llama())
    convert(str(source), f"hf:{tmp_path / 'out'}", config_dir=config, prune=how)
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        if "_proj" not in name:
            assert torch.equal(value, truth[name])
            continue
        kept = value != 0
        assert torch.equal(value[kept], truth[name][kept])
        if how == "2:4":
            assert (kept.reshape(-1, 4).sum(1) == 2).all()
            dropped = truth[name].abs().reshape(-1, 4).masked_fill(kept.reshape(-1, 4), 0).amax(1)
            assert (truth[name].abs().reshape(-1, 4).masked_fill(~kept.reshape(-1, 4), 9).amin(1) >= dropped).all()
        else:
            assert int((~kept).sum()) == round(0.3 * value.numel())
            assert truth[name][~kept].abs().max() <= truth[name][kept].abs().min()


@pytest.mark.parametrize(("how", "bits"), [("int8", 8), ("int4", 4)])
def test_quantised_weights_are_opened_by_transformers(tmp_path: Path, config: Path, how: str, bits: int) -> None:
    """Each weight is off by at most half a step of its own scale; int4 files are an eighth of fp32's."""
    pytest.importorskip("compressed_tensors")
    model = llama()
    source = save_torch(tmp_path / "c.pt", model, with_optimizer=False)
    convert(str(source), f"hf:{tmp_path / 'out'}", config_dir=config, quantize=how)
    found, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    found(input_ids=torch.arange(3)[None])  # the first call unpacks
    for name, value in found.state_dict().items():
        if not name.endswith("proj.weight"):
            continue
        weight = model.state_dict()[name]
        groups = (weight if how == "int8" else weight.reshape(weight.shape[0], -1, 32)).abs().amax(-1, keepdim=True)
        half_step = (groups / (2 ** (bits - 1) - 1) / 2).expand_as(
            weight if how == "int8" else weight.reshape(weight.shape[0], -1, 32)
        )
        assert ((value - weight).abs() <= half_step.reshape(weight.shape) * 1.001).all(), name


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(["a b c ab abc"], trainers.BpeTrainer(vocab_size=30, special_tokens=["<s>"]))
    tokenizer.save(str(folder / "tokenizer.json"))


def test_check_runs_a_prompt_through_source_and_result(tmp_path: Path, config: Path, capsys: Any) -> None:
    write_tokenizer(config)
    source = save_torch(tmp_path / "c.pt", llama())
    for dtype, words in (("fp32", "apart by 0 at most, 0 on average; 100.0% of"), ("bf16", "apart by 0.00")):
        argv = [str(source), f"hf:{tmp_path / dtype}", "--config", str(config), "--dtype", dtype, "--check", "a b abc"]
        assert main(argv) == 0
        assert f"checked: logits {words}" in capsys.readouterr().err
    assert main([str(source), f"hf:{tmp_path / 'x'}", "--config", str(config), "--check", ""]) == 2
    assert "--check: has a prompt without a token" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gguf_file_computes_what_the_model_did(tmp_path: Path, config: Path, dtype: str) -> None:
    """transformers reads it back by its own code: the same weights, so q and k have llama.cpp's order."""
    pytest.importorskip("gguf")
    write_tokenizer(config)
    source = save_torch(tmp_path / "c.pt", llama())
    convert(str(source), f"gguf:{tmp_path / 'm.gguf'}", config_dir=config, dtype=dtype)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    for name, value in llama().state_dict().items():
        kept = value.bfloat16().float() if dtype == "bf16" and value.ndim > 1 else value
        assert torch.equal(found.state_dict()[name], kept), name


def test_onnx_and_gguf_say_what_they_cannot_write(tmp_path: Path, capsys: Any) -> None:
    source = save_torch(tmp_path / "c.pt", llama())
    assert main([str(source), f"onnx:{tmp_path / 'o'}"]) == 2
    assert "onnx: is not written yet; write hf:" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    assert main([str(source), f"gguf:{tmp_path / 'o'}", "--config", str(tmp_path)]) == 2
    assert "gguf: bert is not of the Llama family" in capsys.readouterr().err


# Looking inside


def test_inspect_tells_what_is_there_and_what_differs(everywhere: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    for kind, path in everywhere.items():
        assert inspect_main([str(path), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["format"] == kind.rstrip("13")
        assert told["num_elements"] == sum(p.numel() for p in llama().parameters())
        assert (told["optimizer"] is None) == (kind == "hf")
        assert inspect_main([str(everywhere["torch"]), "--diff", str(path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert not found["changed"]
        assert found["same"] == (kind != "hf")
    model = llama()
    model.lm_head.weight.data[0, 0] += 0.5
    other = save_torch(tmp_path / "other.pt", model, with_optimizer=False)
    assert inspect_main([str(everywhere["hf"]), "--diff", str(other)]) == 0
    assert capsys.readouterr().out == "lm_head.weight: num_different 1, largest_difference 0.5\ndifferent\n"
