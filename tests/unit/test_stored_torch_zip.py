"""Files of torch.save are read without torch.load: same tensors, nothing run, damage noticed."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import CheckpointError
from launcher.stored import torch_zip
from launcher.stored.records import StoredTensor
from launcher.stored.safe_pickle import unpickle

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.uint16, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "take",
    [
        lambda t: t,
        lambda t: t[0, 0, 0],
        lambda t: t[1:, ::2],
        lambda t: t.transpose(0, 2),
        lambda t: t[:0],
        lambda t: t[:, 1:2, 3].expand(2, 5),
    ],
    ids=["whole", "0-d", "strided", "transposed", "empty", "expanded"],
)
def test_tensors_equal_those_of_torch_load(tmp_path: Path, dtype: torch.dtype, take: Any) -> None:
    tensor = take(torch.arange(24).reshape(2, 3, 4).to(dtype))
    file = tmp_path / "a.pt"
    torch.save({"x": [tensor]}, file)
    stored, loaded = torch_zip.load(file)["x"][0], torch.load(file, weights_only=True)["x"][0]
    assert isinstance(stored, StoredTensor)
    read = stored.read()
    assert (read.dtype, read.shape, read.is_contiguous()) == (loaded.dtype, loaded.shape, True)
    assert (
        torch.equal(read.view(torch.uint8), loaded.detach().contiguous().view(torch.uint8))
        if read.ndim
        else read == loaded
    )
    stored.record.check()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4), st.randoms())
def test_any_permutation_of_any_shape(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], rng: random.Random
) -> None:
    order = rng.sample(range(len(shape)), len(shape))
    tensor = torch.randn(shape).permute(order)
    file = tmp_path_factory.mktemp("any") / "a.pt"
    torch.save(tensor, file)
    assert torch.equal(torch_zip.load(file).read(), tensor)


def test_parameters_are_tensors(tmp_path: Path) -> None:
    torch.save(torch.nn.Parameter(torch.ones(2, 3)), tmp_path / "a.pt")
    assert torch.equal(torch_zip.load(tmp_path / "a.pt").read(), torch.ones(2, 3))


def test_plain_values_come_back_as_they_were(tmp_path: Path) -> None:
    value = {"a": OrderedDict(b=torch.Size([2, 3])), "c": {1, 2}, "d": torch.bfloat16, "e": (None, True, 1.5, "text")}
    torch.save(value, tmp_path / "a.pt")
    assert torch_zip.load(tmp_path / "a.pt") == {**value, "a": {"b": (2, 3)}}


def test_views_of_one_storage_share_its_record(tmp_path: Path) -> None:
    """Tied weights are told by this, and are checked and read once."""
    base = torch.randn(6)
    torch.save([base[:3], base[3:]], tmp_path / "a.pt")
    first, second = torch_zip.load(tmp_path / "a.pt")
    assert first.record == second.record
    assert torch.equal(torch.cat([first.read(), second.read()]), base)


class Exploit:
    """A pickle that calls `function(argument)` when it is loaded."""

    def __init__(self, function: Any, argument: str) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> Any:
        return self.function, (self.argument,)


@pytest.mark.parametrize("function", [os.system, eval, exec, __import__], ids=lambda f: f.__name__)
@pytest.mark.parametrize("protocol", [2, 4])
def test_an_exploit_does_not_run(tmp_path: Path, function: Any, protocol: int) -> None:
    """The proof is a file that the payload would create (and does create under pickle)."""
    proof, file = tmp_path / "proof", tmp_path / "a.pt"
    code = {os.system: f"touch {proof}", __import__: "antigravity"}.get(function, f"open({str(proof)!r}, 'w').close()")
    torch.save({"x": torch.ones(2), "bad": Exploit(function, code)}, file, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=rf"a\.pt: \w+\.{function.__name__} is not among the classes") as caught:
        torch_zip.load(file)
    assert "nothing of this file was run" in str(caught.value)
    assert not proof.exists()
    if function is eval:
        torch.load(file, weights_only=False)
        assert proof.exists(), "the payload is real"


@pytest.mark.parametrize("name", ["torch.load", "torch.nn.Linear", "collections.namedtuple", "builtins.getattr"])
def test_names_near_the_allowed_ones_are_refused(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    file = tmp_path / ".metadata"
    file.write_bytes(b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b".")
    with file.open("rb") as stream, pytest.raises(CheckpointError, match=f"{name} is not among"):
        unpickle(stream, file)


def test_a_dotted_name_does_not_reach_into_an_allowed_class(tmp_path: Path) -> None:
    file = tmp_path / "a"
    payload = pickle.PROTO + b"\x04" + b"\x8c\x05torch" + b"\x8c\x0cSize.__new__" + pickle.STACK_GLOBAL + b"."
    file.write_bytes(payload)
    with file.open("rb") as stream, pytest.raises(CheckpointError, match="is not among"):
        unpickle(stream, file)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    torch.save({"w": torch.arange(300.0), "n": {"step": 3}}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_refused(small: Path, share: float) -> None:
    data = small.read_bytes()
    small.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"a\.pt: was cut short or damaged"):
        torch_zip.load(small)


def test_a_changed_byte_of_a_weight_is_noticed(small: Path) -> None:
    """torch.load takes it without a word."""
    place = torch_zip.load(small)["w"].record
    data = bytearray(small.read_bytes())
    data[place.offset + 100] ^= 1
    small.write_bytes(data)
    torch.load(small, weights_only=True)
    with pytest.raises(CheckpointError, match="has changed bytes"):
        torch_zip.load(small)["w"].record.check()


def test_no_damage_escapes_as_another_error(small: Path) -> None:
    """Any byte changed anywhere: read as before, noticed as damage, or refused; never another exception."""
    whole, rng = small.read_bytes(), random.Random(0)
    for _ in range(400):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        small.write_bytes(data)
        try:
            loaded = torch_zip.load(small)
            loaded["w"].record.check()
            loaded["w"].read()
        except CheckpointError:
            pass


def test_a_compressed_archive_is_refused(small: Path) -> None:
    with zipfile.ZipFile(small) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="was cut short or damaged"):
        torch_zip.load(small)
