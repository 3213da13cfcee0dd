"""Where a tokenizer comes from: a folder, a hub id, or a SentencePiece `.model`. Never with code from there."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from launcher.errors import ABSENT, DataError
from launcher.job.spec import JobSpec

_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.model", "spiece*")
"""What `transformers` may read a tokenizer from; the weights beside them do not matter."""


class TokenizerSource(NamedTuple):
    option: str
    """The option of the spec that names it, for errors."""
    name: str
    """Folder, hub id, or `.model` file."""


def tokenizer_source(spec: JobSpec) -> TokenizerSource:
    """`data.tokenizer`, or else the model's own."""
    if spec.data.tokenizer is not None:
        return TokenizerSource("data.tokenizer", spec.data.tokenizer)
    if spec.model.path is not None:
        return TokenizerSource("model.path", spec.model.path)
    if isinstance(spec.model.from_config, str):
        path = Path(spec.model.from_config)
        return TokenizerSource("model.from_config", str(path.parent if path.suffix == ".json" else path))
    rule = "is missing, and a model that is given by its config brings none"
    raise DataError("data.tokenizer", ABSENT, rule, "set data.tokenizer, or data.train_tokenizer to make one")


def load_tokenizer(source: TokenizerSource) -> Any:
    """A fast tokenizer of `transformers`. A SentencePiece model is built anew, so that it encodes as SentencePiece does."""
    model_file = _sentencepiece_file(source)
    if model_file is not None:
        from launcher.data.pieces import tokenizer_of_model

        return tokenizer_of_model(model_file)
    return _load_folder(source)


def _sentencepiece_file(source: TokenizerSource) -> Path | None:
    """The `.model` file to read, also where a folder holds nothing else to make a tokenizer from."""
    path = Path(source.name).expanduser()
    if path.suffix == ".model":
        if not path.is_file():
            raise DataError(source.option, source.name, "does not exist", "give the path of a SentencePiece model")
        return path
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return path / "tokenizer.model"
    return None


def _load_folder(source: TokenizerSource) -> Any:
    from transformers import AutoTokenizer

    path = Path(source.name).expanduser()
    way_out = "give a folder with tokenizer.json, a hub id that can be reached, or a SentencePiece .model file"
    if path.is_dir() and not local_files(source):
        raise DataError(source.option, source.name, "is a folder without a tokenizer", "set data.tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DataError(source.option, source.name, f"cannot be opened as a tokenizer ({reason})", way_out) from None
    if not tokenizer.is_fast:
        raise DataError(source.option, source.name, "is a tokenizer written in Python, without a fast form", way_out)
    return tokenizer


def local_files(source: TokenizerSource) -> list[Path]:
    """The files on disk that the tokenizer is made from; none for a hub id."""
    path = Path(source.name).expanduser()
    if path.is_file():
        return [path]
    return sorted({file for pattern in _FILES for file in path.glob(pattern) if file.is_file()})


def tokenizer_digest(source: TokenizerSource) -> str:
    """Of the contents, not of where they lie: a folder may move. A hub id is loaded to see what it holds."""
    digest = blake2b(digest_size=16)
    files = local_files(source)
    for file in files:
        digest.update(file.name.encode() + b"\0" + blake2b(file.read_bytes()).digest())
    if not files:
        digest.update(load_tokenizer(source).backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def num_ids(tokenizer: Any) -> int:
    """Token ids are below this; more than `len(tokenizer)` where the vocabulary has holes."""
    return 1 + max(tokenizer.get_vocab().values())
