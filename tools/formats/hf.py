"""Writes a folder that plain transformers opens: safetensors shards, their index, config and tokenizer.

The layout of a shard is 8 bytes of header length, a JSON header padded with spaces to a multiple of 8, then the values
one after another. Source: the safetensors format description, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import ABSENT, CheckpointError
from launcher.stored.tensors import TensorEntry

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""What safetensors can hold, and its name for it."""

CHECKSUMS = "checksums.json"
HEADER = "__header__"
"""Beside the shards: file -> tensor -> CRC-32. No reader but ours knows it; safetensors themselves have none."""

SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.json", "preprocessor_config.json",
)  # fmt: skip
SIDE_SUFFIXES = (".model", ".tiktoken", ".jinja")
"""Files that belong to the tokenizer or to generation and are copied as they are; never code, never weights."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file to be."""

    file_name: str
    tensors: Mapping[str, TensorEntry]

    def header(self) -> bytes:
        """The first bytes of the file, length included; offsets in it count from the end of the header."""
        described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, entry in self.tensors.items():
            end = at + entry.num_bytes
            described[name] = {
                "dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, end],
            }  # fmt: skip
            at = end
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def plan_shards(tensors: Mapping[str, TensorEntry], shard_bytes: int, stem: str = "model") -> list[Shard]:
    """Cuts the tensors, in their order, into files of at most `shard_bytes` of values (one tensor is never cut).

    Inside a file the widest dtypes come first, as in the reference implementation: every tensor is then aligned.
    """
    groups: list[dict[str, TensorEntry]] = [{}]
    size = 0
    for name, entry in tensors.items():
        if groups[-1] and size + entry.num_bytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = entry
        size += entry.num_bytes
    count = len(groups)
    names = (f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))
    aligned = (dict(sorted(group.items(), key=lambda item: -item[1].dtype.itemsize)) for group in groups)
    return [
        Shard(f"{stem}.safetensors" if count == 1 else name, group) for name, group in zip(names, aligned, strict=True)
    ]


def write_json(file: Path, value: Any) -> None:
    with file.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def fsync_folder(folder: Path) -> None:
    """Makes new and renamed names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            str(folder), ABSENT, "holds no config.json", "name a folder with the model's config: --config DIR"
        ) from None
    except ValueError as error:
        raise CheckpointError(str(file), ABSENT, f"is not JSON ({error})", "name another with --config DIR") from None
    named = isinstance(config, dict) and config.get("architectures")
    if not isinstance(named, list) or not isinstance(named[0], str) or "model_type" not in config:
        raise CheckpointError(
            str(file), ABSENT, "names no model_type and architectures", 'add e.g. "architectures": ["GPT2LMHeadModel"]'
        )
    return config


def write_side_files(config_dir: Path, config: dict[str, Any], dtype: torch.dtype, folder: Path) -> None:
    """config.json with the dtype of the written weights, and the tokenizer's and generation's files as they are."""
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}  # its name before transformers 5
    write_json(folder / "config.json", {**kept, "dtype": str(dtype).removeprefix("torch.")})
    copy_side_files(config_dir, folder)


def copy_side_files(config_dir: Path, folder: Path) -> None:
    """The tokenizer's and generation's, as they are."""
    for file in sorted(config_dir.iterdir()):
        if file.is_file() and (file.name in SIDE_FILES or file.suffix in SIDE_SUFFIXES):
            shutil.copyfile(file, folder / file.name)
