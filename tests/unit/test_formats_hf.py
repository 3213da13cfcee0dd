"""The safetensors writer and the choice of names: what is written is what the public library reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from launcher.errors import CheckpointError
from launcher.stored.tensors import TensorEntry, safe_relative
from launcher.stored.values import Literal
from tools.formats.expected import choose, expected_tensors
from tools.formats.files import Copy
from tools.formats.hf import read_config, write_json, write_side_files
from tools.formats.write_hf import index_of, plan_hf

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "scalar": torch.tensor(2.6592),
    "flags": torch.tensor([True, False, True]),
    "half": torch.randn(5).bfloat16(),
    "ids": torch.arange(4),
    "empty": torch.empty(0, 3),
    "näme with spaces": torch.randn(2, 2).half(),
}


def write(folder: Path, shard_bytes: int) -> list[Path]:
    entries = {name: TensorEntry(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
    files = plan_hf({name: Literal(tensor) for name, tensor in TENSORS.items()}, entries, shard_bytes)
    Copy(folder, files, None, lambda _what, _done, _total: None).run("")
    if (index := index_of(files)) is not None:
        write_json(folder / index[0], index[1])
    return sorted(folder.glob("*.safetensors"))


def test_every_kind_of_tensor_is_read_back(tmp_path: Path) -> None:
    """0-d, bool, integer, bf16 and empty tensors, too, which other writers get wrong."""
    [file] = write(tmp_path, 10**9)
    assert file.name == "model.safetensors"
    loaded = load_file(file)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    assert length % 8 == 0, "values begin at a multiple of 8"
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0, f"{name} is aligned"
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_shards_stay_within_their_size_and_the_index_covers_them(tmp_path: Path) -> None:
    files = write(tmp_path, 20)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(TENSORS)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in TENSORS.values())
    for number, file in enumerate(files, 1):
        loaded = load_file(file)
        assert file.name == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        assert {index["weight_map"][name] for name in loaded} == {file.name}
        size = sum(t.numel() * t.itemsize for t in loaded.values())
        assert size <= 20 or len(loaded) == 1, "only a single tensor may be larger than a shard"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\\..\\x", "a\0b"])
def test_names_in_metadata_never_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="names a file outside its own folder"):
        safe_relative(tmp_path, name)


def config_dir(folder: Path, **changes: object) -> Path:
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 7, "n_embd": 4, "n_layer": 1,
        "n_head": 1, "n_positions": 3, "bos_token_id": 1, "eos_token_id": 1, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_side_files_are_copied_and_the_dtype_is_told(tmp_path: Path) -> None:
    """Tokenizer and generation settings go along; code, weights and foreign files do not."""
    source, out = config_dir(tmp_path, torch_dtype="float16"), tmp_path / "out"
    out.mkdir()
    for name in ("tokenizer.json", "spiece.model", "generation_config.json", "modeling.py", "model.bin", "notes.json"):
        (source / name).write_text(name)
    write_side_files(source, read_config(source), torch.bfloat16, out)
    names = {"config.json", "tokenizer.json", "spiece.model", "generation_config.json"}
    assert {file.name for file in out.iterdir()} == names
    written = json.loads((out / "config.json").read_text())
    assert (written["dtype"], "torch_dtype" in written) == ("bfloat16", False)


def entries(folder: Path) -> dict[str, TensorEntry]:
    shapes = expected_tensors(folder, read_config(folder)).shapes
    return {name: TensorEntry(shape, torch.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_the_names_are_those_of_save_pretrained(tmp_path: Path, tied: bool) -> None:
    """Asked of transformers itself: write the same model with it and compare the names."""
    import transformers

    folder = config_dir(tmp_path, tie_word_embeddings=tied)
    expected = expected_tensors(folder, read_config(folder))
    model = transformers.GPT2LMHeadModel(transformers.AutoConfig.from_pretrained(folder))
    model.save_pretrained(tmp_path / "theirs")
    assert set(expected.shapes) == set(load_file(tmp_path / "theirs" / "model.safetensors"))
    assert ("lm_head.weight" in expected.shapes) is not tied


def test_a_tied_tensor_is_found_under_any_of_its_names(tmp_path: Path) -> None:
    folder = config_dir(tmp_path)
    expected, found = expected_tensors(folder, read_config(folder)), entries(folder)
    both = {**found, "lm_head.weight": found["transformer.wte.weight"]}
    assert choose(both, {}, expected, "x")["transformer.wte.weight"] == "transformer.wte.weight"
    del both["transformer.wte.weight"]
    assert choose(both, {}, expected, "x")["transformer.wte.weight"] == "lm_head.weight"


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    folder = config_dir(tmp_path)
    expected, found = expected_tensors(folder, read_config(folder)), entries(folder)
    way_out = "name the config of the model that was trained: --config DIR"
    cases = {
        "the checkpoint lacks transformer.ln_f.bias": {k: v for k, v in found.items() if k != "transformer.ln_f.bias"},
        "the checkpoint holds, unknown to the model, extra.weight": {
            **found,
            "extra.weight": found["transformer.wte.weight"],
        },
        "transformer.wpe.weight is (9, 4), the config asks for (3, 4)": {
            **found,
            "transformer.wpe.weight": TensorEntry((9, 4), torch.float32),
        },
    }
    for rule, tensors in cases.items():
        with pytest.raises(CheckpointError) as caught:
            choose(tensors, {}, expected, "ckpt")
        assert str(caught.value) == f"ckpt: GPT2LMHeadModel does not fit: {rule}; {way_out}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["os"]}, "is no model class of transformers"),
        ({"architectures": None}, "names no model_type and architectures"),
        ({"model_type": "no-such"}, "cannot be opened by transformers"),
        ({"n_embd": "wide"}, "cannot be opened by transformers"),
        ({"n_head": 3}, "cannot be opened by transformers"),
    ],
)
def test_a_config_that_names_no_model_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    folder = config_dir(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        expected_tensors(folder, read_config(folder))
