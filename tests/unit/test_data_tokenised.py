"""Token ids that others made come out as they are: files written here by the published layouts."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.prepare import prepare
from launcher.data.prepared import open_prepared
from launcher.data.train_pieces import train_sentencepiece
from launcher.errors import DataError
from tests.unit.test_data_prepare import all_rows, sentence, spec_of

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(7, 320, size=int(n)).astype("<u2") for n in RNG.integers(1, 90, size=60)]
EOS = 2


def write_megatron(folder: Path) -> str:
    lengths = np.array([len(d) for d in DOCUMENTS], dtype="<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1])]).astype("<i8") * 2
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(DOCUMENTS), len(DOCUMENTS) + 1)
    bounds = np.arange(len(DOCUMENTS) + 1, dtype="<i8")
    (folder / "a.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + bounds.tobytes())
    np.concatenate(DOCUMENTS).tofile(folder / "a.bin")
    return "a.bin"


def write_datatrove(folder: Path) -> str:
    np.concatenate(DOCUMENTS).tofile(folder / "a.ds")
    np.cumsum([len(d) for d in DOCUMENTS]).astype("<u8").tofile(folder / "a.ds.index")
    return "a.ds"


def write_mds(folder: Path) -> str:
    (folder / "mds").mkdir()
    samples = [struct.pack("<I", 2 * len(d)) + struct.pack("<q", n) + d.tobytes() for n, d in enumerate(DOCUMENTS)]
    begin = 4 + 4 * (len(samples) + 1)
    offsets = begin + np.cumsum([0, *map(len, samples)])
    data = struct.pack("<I", len(samples)) + offsets.astype("<u4").tobytes() + b"".join(samples)
    (folder / "mds" / "shard.00000.mds").write_bytes(data)
    shard: dict[str, Any] = {"format": "mds", "version": 2, "samples": len(samples), "compression": None}
    shard |= {"column_names": ["id", "tokens"], "column_encodings": ["int64", "bytes"], "column_sizes": [8, None]}
    shard |= {"raw_data": {"basename": "shard.00000.mds", "bytes": len(data), "hashes": {}}, "zip_data": None}
    (folder / "mds" / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
    return "mds"


def write_bin(folder: Path) -> str:
    np.concatenate(DOCUMENTS).tofile(folder / "flat.bin")
    return "flat.bin"


def write_npy(folder: Path) -> str:
    np.save(folder / "flat.npy", np.concatenate(DOCUMENTS))
    return "flat.npy"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    train_sentencepiece([sentence(n) for n in range(50)], "bpe", 320, tmp_path / "tok")
    return tmp_path


def spec_for(name: str, **data: Any) -> Any:
    given = {"train": name, "train_tokenizer": None, "tokenizer": "tok", "validation_fraction": 0, **data}
    return spec_of(data=given)


@pytest.mark.parametrize("write", [write_megatron, write_datatrove, write_mds])
def test_documents_come_as_they_are_each_with_its_end(folder: Path, write: Any) -> None:
    spec = spec_for(write(folder))
    prepare(spec)
    tokens = np.concatenate([row["input_ids"] for row in all_rows(open_prepared(spec), "train")])
    expected = np.concatenate([np.append(d, EOS) for d in DOCUMENTS])
    assert np.array_equal(tokens, expected)


@pytest.mark.parametrize("write", [write_bin, write_npy])
def test_a_run_without_documents_stays_one(folder: Path, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.data.tokenised._PIECE_TOKENS", 100)
    spec = spec_for(write(folder))
    prepare(spec)
    rows = all_rows(open_prepared(spec), "train")
    assert {len(row["input_ids"]) for row in rows[:-1]} == {32}
    flat = np.concatenate(DOCUMENTS)
    assert np.array_equal(np.concatenate([row["input_ids"] for row in rows]), flat[: flat.size - (flat.size % 32 == 1)])


def test_an_id_that_the_tokenizer_has_not(folder: Path) -> None:
    np.array([7, 8, 400], dtype="<u2").tofile(folder / "flat.bin")
    with pytest.raises(DataError, match=r"flat\.bin:1: token: 400 is not an id of the tokenizer, which has 320"):
        prepare(spec_for("flat.bin"))


def test_ids_of_a_wider_type(folder: Path) -> None:
    np.concatenate(DOCUMENTS).astype("<u4").tofile(folder / "flat.bin")
    prepare(spec_for("flat.bin", token_dtype="uint32"))
    assert open_prepared(spec_for("flat.bin", token_dtype="uint32")).split("train").num_tokens >= 2000


def test_files_that_are_cut(folder: Path) -> None:
    write_megatron(folder)
    (folder / "a.bin").write_bytes((folder / "a.bin").read_bytes()[:-10])
    with pytest.raises(DataError, match=r"a\.bin: holds fewer tokens than its index says; copy it again"):
        prepare(spec_for("a.bin"))
    write_mds(folder)
    shard = folder / "mds" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"mds/shard\.00000\.mds: has \d+ bytes, not \d+; copy it again"):
        prepare(spec_for("mds"))
