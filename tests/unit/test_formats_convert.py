"""The command: what it finds, what it says, and that OUT is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file

from launcher.train.manifest import VERSION, WAY_OUT, Manifest
from tools.convert import convert, main, parse_size

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process is meant

CONFIG = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 7, "n_embd": 4, "n_layer": 1,
    "n_head": 1, "n_positions": 3, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


def tiny_model() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG))


def save_dcp(folder: Path, wrapped: bool = True) -> Path:
    state = tiny_model().state_dict()
    whole = {"model": state, "optim": {"state": {"m": torch.ones(3)}}, "step": 3} if wrapped else state
    dcp.save(whole, checkpoint_id=folder, no_dist=True)
    return folder


def write_config(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_manifest(step: Path) -> None:
    files = {
        file.relative_to(step).as_posix(): {
            "size": file.stat().st_size,
            "blake2b": hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest(),
        }
        for file in sorted(step.rglob("*"))
        if file.is_file()
    }
    manifest = Manifest(
        version=VERSION,
        step=int(step.name[5:]),
        strategy="fsdp",
        engine="torch",
        num_ranks=1,
        cursor={},
        plan_digest="",
        spec={},
        versions={},
        files=files,
    )
    (step / "manifest.json").write_text(json.dumps(asdict(manifest)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two complete checkpoints and a third that was being written when the machine died."""
    for number in (10, 20, 30):
        step = tmp_path / "run" / "checkpoints" / f"step-{number:08d}"
        step.mkdir(parents=True)
        save_dcp(step / "dcp")
        write_config(step / "hf")
        if number != 30:
            write_manifest(step)
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000020"


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/step-00000020", "checkpoints/step-00000020/dcp"])
@pytest.mark.parametrize("prefix", ["", "dcp:"])
def test_any_folder_of_a_run_will_do(run: Path, tmp_path: Path, part: str, prefix: str) -> None:
    result = convert(f"{prefix}{run / part}", f"hf:{tmp_path / 'out'}")
    truth, written = tiny_model().state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    assert truth.keys() - written.keys() == {"lm_head.weight"}
    assert all(torch.equal(written[name], truth[name]) for name in written)
    assert {file.name for file in result.folder.iterdir()} == {
        "checksums.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip


@pytest.mark.parametrize("wrapped", [True, False])
def test_plain_dcp_needs_only_a_config(tmp_path: Path, wrapped: bool) -> None:
    source, config = save_dcp(tmp_path / "ckpt", wrapped), write_config(tmp_path / "config")
    convert(str(source), str(tmp_path / "out"), config_dir=config, dtype="fp16")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.float16


def test_a_relative_path_will_do(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(newest(run))
    assert main([".", "hf:../out"]) == 0


def test_the_last_line_tells_what_was_written_and_how_to_open_it(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert main([str(run), f"hf:{tmp_path / 'out'}", "--dtype", "bf16", "--shard-size", "200"]) == 0
    out = tmp_path / "out"
    assert capsys.readouterr().out == (
        f"wrote {out}: 16 tensors, 584 bytes, 4 file(s); open it: "
        f"python -c 'import transformers; m = transformers.GPT2LMHeadModel.from_pretrained(\"{out}\")'\n"
    )
    assert len(list(out.glob("model-*-of-00004.safetensors"))) == 4


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def bad_cases(run: Path, tmp: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> (arguments, message after `error: `); each message is path, value, rule and way out."""
    step, plain, config = newest(run), tmp / "plain", write_config(tmp / "config")
    ckpt = "name the folder of a checkpoint or of a run"
    again = "copy it again from where it was written, or take another checkpoint"
    (tmp / "empty").mkdir()
    (tmp / "text").mkdir()
    (tmp / "text" / "notes.txt").write_text("nothing")
    (tmp / "taken").mkdir()
    (tmp / "taken" / "thesis.tex").write_text("precious")
    exploit = tmp / "exploit"
    exploit.mkdir()
    (exploit / ".metadata").write_bytes(b"\x80\x02cos\nsystem\nX\x05\x00\x00\x00touch\x85R.")
    save_dcp(plain)
    chunk = next(plain.glob("*.distcp"))
    out = f"hf:{tmp / 'out'}"
    return {
        "missing": ([f"{tmp / 'no'}", out], f"{tmp / 'no'}: does not exist; {ckpt}"),
        "a file": ([f"{config / 'config.json'}", out], f"{config / 'config.json'}: is a file, not a folder; {ckpt}"),
        "empty": ([f"{tmp / 'empty'}", out], f"{tmp / 'empty'}: is empty; {ckpt}"),
        "unknown content": (
            [f"{tmp / 'text'}", out],
            f"{tmp / 'text'}: is no checkpoint of a known format (DeepSpeed, DCP, a model's folder); {ckpt}",
        ),
        "unknown format": (
            [f"megatron:{plain}", out],
            f"megatron:{plain}: megatron is not a format that can stand here; use zero or universal or dcp or hf or torch or peft",
        ),
        "unknown target": (
            [str(plain), "tensorflow:x"],
            "tensorflow:x: tensorflow is not a format that can stand here; "
            "use zero or universal or dcp or hf or torch or peft or gguf or onnx",
        ),
        "wrong format": (
            [f"zero:{plain}", out],
            f"{plain}: is not a DeepSpeed folder (no `latest`, no *_optim_states.pt); {ckpt}",
        ),
        "wrong format of a step": (
            [f"zero:{step}", out],
            f"{step}: holds no zero/ folder; leave the prefix out, or name another step",
        ),
        "incomplete": (
            [str(step.with_name("step-00000030")), out],
            f"{step.with_name('step-00000030')}: is incomplete: it has no manifest.json; {WAY_OUT}",
        ),
        "incomplete, named by its inner folder": (
            [str(step.with_name("step-00000030") / "dcp"), out],
            f"{step.with_name('step-00000030')}: is incomplete: it has no manifest.json; {WAY_OUT}",
        ),
        "out exists": (
            [str(run), f"hf:{tmp / 'taken'}"],
            f"{tmp / 'taken'}: exists and is not an empty folder; name another, or remove it first",
        ),
        "no config": (
            [str(plain), out],
            f"{plain}: comes without a config.json; name the folder with the model's config and tokenizer: --config DIR",
        ),
        "empty config folder": (
            [str(plain), out, "--config", str(tmp / "empty")],
            f"{tmp / 'empty'}: holds no config.json; name a folder with the model's config: --config DIR",
        ),
        "exploit": (
            [str(exploit), out, "--config", str(config)],
            f"{exploit / '.metadata'}: os.system is not among the classes that a checkpoint may name, so nothing of this"
            " file was run; if you trust the file, save it again with tensors, numbers, strings, lists and dicts only",
        ),
        "shard size": ([str(run), out, "--shard-size", "5 apples"], "--shard-size: '5 apples' is not a size; e.g. 5GB, 500MB or 2GiB"),
        "missing file": (
            [str(_without(plain, tmp / "lacking", chunk.name)), out, "--config", str(config)],
            f"{tmp / 'lacking'}: {chunk.name} is missing; {again}",
        ),
    }  # fmt: skip


def _without(folder: Path, copy: Path, name: str) -> Path:
    copy.mkdir()
    for file in folder.iterdir():
        if file.name != name:
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_every_refusal_is_one_line_and_leaves_nothing_behind(run: Path, tmp_path: Path, capsys: Any) -> None:
    for name, (arguments, message) in bad_cases(run, tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        assert main(arguments) == 2, name
        printed = capsys.readouterr()
        assert (printed.out, printed.err.replace("\r", "").strip()) == ("", f"error: {message}"), name
        assert sorted(tmp_path.rglob("*")) == before, name


def damaged_message(run: Path, out: Path, capsys: Any) -> str:
    assert main([str(run), f"hf:{out}"]) == 2
    assert not list(out.parent.glob("out*"))
    return str(capsys.readouterr().err).strip()


def test_a_changed_byte_names_the_file(run: Path, tmp_path: Path, capsys: Any) -> None:
    """In any file that the manifest lists, tokenizer included; torch and safetensors would load it."""
    again = "copy it again from where it was written, or take another checkpoint"
    for file in (next((newest(run) / "dcp").glob("*.distcp")), newest(run) / "hf" / "tokenizer.json"):
        flip(file, -1)
        told = damaged_message(run, tmp_path / "out", capsys)
        assert told == f"error: {file}: has changed since it was saved (checksum); {again}"
        flip(file, -1)
    assert convert(str(run), str(tmp_path / "out")).num_tensors == 16


def test_without_a_manifest_the_checksums_of_the_archives_are_compared(tmp_path: Path, capsys: Any) -> None:
    source, config = save_dcp(tmp_path / "ckpt"), write_config(tmp_path / "config")
    file = next(source.glob("*.distcp"))
    weight = tiny_model().state_dict()["transformer.h.0.mlp.c_fc.weight"].numpy().tobytes()
    flip(file, file.read_bytes().index(weight) + 5)
    assert main([str(source), f"hf:{tmp_path / 'out'}", "--config", str(config)]) == 2
    assert "has changed bytes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_damage_to_the_metadata_escapes_as_another_error(tmp_path: Path, capsys: Any) -> None:
    """Any byte changed: converted to the same weights, or refused in one line; never a traceback, never other weights."""
    source, rng = save_dcp(tmp_path / "ckpt"), random.Random(0)
    config, truth = write_config(tmp_path / "config"), tiny_model().state_dict()
    file = source / ".metadata"
    whole = file.read_bytes()
    for attempt in range(60):
        file.write_bytes(whole)
        flip(file, rng.randrange(len(whole)))
        out = tmp_path / f"out{attempt}"
        if main([str(source), f"hf:{out}", "--config", str(config)]) == 2:
            assert "error: " in capsys.readouterr().err
        else:
            written = load_file(out / "model.safetensors")
            assert all(torch.equal(written[name], truth[name]) for name in written)


def test_a_shortened_or_missing_file_of_a_run_is_named(run: Path, tmp_path: Path, capsys: Any) -> None:
    file = next((newest(run) / "dcp").glob("*.distcp"))
    size = file.stat().st_size
    os.truncate(file, size - 9)
    assert f"{file}: has {size - 9} bytes where the manifest says {size}" in damaged_message(
        run, tmp_path / "out", capsys
    )
    file.unlink()
    assert f"{file}: is missing; {WAY_OUT}" in damaged_message(run, tmp_path / "out", capsys)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_a_manifest_cannot_point_outside(run: Path, tmp_path: Path, capsys: Any, name: str) -> None:
    file = newest(run) / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"][name] = {"size": 1, "blake2b": ""}
    file.write_text(json.dumps(manifest))
    assert "names a file outside its own folder" in damaged_message(run, tmp_path / "out", capsys)


def test_values_that_fp16_cannot_hold_are_an_error(tmp_path: Path, capsys: Any) -> None:
    state = tiny_model().state_dict()
    state["transformer.ln_f.bias"][0] = 1e6
    dcp.save(state, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    config = write_config(tmp_path / "config")
    assert main([str(tmp_path / "ckpt"), f"{tmp_path / 'out'}", "--config", str(config), "--dtype", "fp16"]) == 2
    told = capsys.readouterr().err.strip()
    assert told.endswith("holds values beyond the range of torch.float16 (largest 1e+06); use --dtype bf16 or fp32")
    assert not list(tmp_path.glob("out*"))


def test_tied_names_with_different_values_are_an_error(tmp_path: Path, capsys: Any) -> None:
    """Only one of them is written, so the other would be lost without a word."""
    state = {name: tensor.clone() for name, tensor in tiny_model().state_dict().items()}
    state["lm_head.weight"] += 1
    dcp.save(state, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    assert main([str(tmp_path / "ckpt"), str(tmp_path / "out"), "--config", str(write_config(tmp_path / "c"))]) == 2
    assert "the config ties lm_head.weight to transformer.wte.weight, their values differ" in capsys.readouterr().err


def test_an_interrupted_conversion_leaves_nothing(run: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, _total: int) -> None:
        if what == "writing" and done > 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(str(run), str(tmp_path / "out"), progress=interrupt)
    assert not list(tmp_path.glob("out*"))


def test_sizes_are_read_as_people_write_them() -> None:
    sizes = {"5GB": 5 * 10**9, "2GiB": 2 * 2**30, " 1.5 mb ": 1_500_000, "1000": 1000}
    assert {text: parse_size(text) for text in sizes} == sizes
