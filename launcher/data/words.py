"""A tokenizer that remembers words: the same ids as the library's, in a fraction of its time.

Most of a text is words that came before. Where a tokenizer never looks across a single space between two printable
ASCII characters, what lies on either side is encoded by itself, once. Whether it is of that kind is read from its
definition; with one of any other kind, the library encodes the whole text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

_CUT = re.compile(r"(?<=[!-~])(?= [!-~])")
"""Before a single space between printable ASCII characters: no rule on blanks, accents or scripts applies there."""

_KEPT_CHARACTERS = 8 << 20
"""Of the words kept; then all are forgotten. With their ids, about 150 MiB."""

_SPACE = "\u2581"
_NORMALIZERS = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "StripAccents"}
_PRE_TOKENIZERS = {"BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Whitespace"}
_PRE_TOKENIZERS |= {"WhitespaceSplit", "Split"}
_SPLITS = {
    # The published expressions of GPT-2, Llama 3, Qwen 2 and GPT-4o, and those of launcher.data.pieces: in each, a
    # space stands only at the front of a match or in a run of blanks.
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    rf"{_SPACE}*[^{_SPACE}\n]+|{_SPACE}+|\n",
    rf"{_SPACE}*[^{_SPACE}]+|{_SPACE}+",
}


class WordEncoder:
    """Ids of whole texts without special tokens, as `backend.encode(text, add_special_tokens=False).ids`."""

    def __init__(self, backend: Any) -> None:
        """`backend`: a `tokenizers.Tokenizer`; it is copied, and its truncation and padding do not count."""
        definition = json.loads(backend.to_str())
        definition |= {"truncation": None, "padding": None}
        self._first = _built(definition, backend.encode_special_tokens)
        self.remembers = _is_local(definition)
        without_prefix = {**definition, "normalizer": _without_prefix(definition["normalizer"])}
        self._has_prefix = without_prefix != definition
        self._rest = _built(without_prefix, backend.encode_special_tokens) if self._has_prefix else self._first
        self._first_ids: dict[str, tuple[int, ...]] = {}
        self._rest_ids: dict[str, tuple[int, ...]] = {} if self._has_prefix else self._first_ids
        names = [re.escape(token["content"]) for token in definition["added_tokens"]]
        self._added = re.compile("|".join(names) or r"(?!)")
        self._num_kept = 0

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        if not self.remembers:
            return [encoding.ids for encoding in self._first.encode_batch_fast(list(texts), add_special_tokens=False)]
        if self._num_kept > _KEPT_CHARACTERS:
            self._forget()
        cut = [_CUT.split(text) for text in texts]
        if not self._has_prefix:
            self._learn(self._first, self._first_ids, chain.from_iterable(cut))
            return [list(chain.from_iterable(map(self._first_ids.__getitem__, words))) for words in cut]
        # an added token ends what stands before it, and a new prefix follows: such a text is one piece
        cut = [[text] if self._added.search(text) else words for text, words in zip(texts, cut, strict=True)]
        self._learn(self._first, self._first_ids, (words[0] for words in cut))
        self._learn(self._rest, self._rest_ids, chain.from_iterable(words[1:] for words in cut))
        rest = self._rest_ids.__getitem__
        return [[*self._first_ids[words[0]], *chain.from_iterable(map(rest, words[1:]))] for words in cut]

    def _learn(self, backend: Any, kept: dict[str, tuple[int, ...]], words: Iterable[str]) -> None:
        new = list(set(words) - kept.keys())
        encodings = backend.encode_batch_fast(new, add_special_tokens=False)
        kept.update((word, tuple(encoding.ids)) for word, encoding in zip(new, encodings, strict=True))
        self._num_kept += sum(map(len, new))

    def _forget(self) -> None:
        self._first_ids.clear()
        self._rest_ids.clear()
        self._num_kept = 0


def _built(definition: dict[str, Any], encode_special_tokens: bool) -> Any:
    from tokenizers import Tokenizer

    built = Tokenizer.from_str(json.dumps(definition))
    built.encode_special_tokens = encode_special_tokens
    return built


def _is_local(definition: dict[str, Any]) -> bool:
    """Whether every step of this tokenizer leaves the two sides of a cut alone."""
    return (
        all(map(_is_local_token, definition["added_tokens"]))
        and all(map(_is_local_normalizer, _steps(definition["normalizer"], "normalizers")))
        and definition["model"].get("dropout") is None
        and (_without_prefix(definition["normalizer"]) == definition["normalizer"] or _finds_added_in_raw(definition))
        and _cuts_at_spaces(definition)
    )


def _finds_added_in_raw(definition: dict[str, Any]) -> bool:
    return not any(token["normalized"] for token in definition["added_tokens"])


def _is_local_token(token: dict[str, Any]) -> bool:
    """An added token is looked for in the text as it stands; none may hold a space, or take those beside it."""
    reaches = token["lstrip"] or token["rstrip"] or token["single_word"]
    return not (reaches or _SPACE in token["content"] or any(map(str.isspace, token["content"])))


def _is_local_normalizer(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return step["pattern"] == {"String": " "} and step["content"] == _SPACE
    return (step["type"] == "Prepend" and step["prepend"] == _SPACE) or step["type"] in _NORMALIZERS


def _cuts_at_spaces(definition: dict[str, Any]) -> bool:
    steps = _steps(definition["pre_tokenizer"], "pretokenizers")
    if not steps:
        return _merges_within_words(definition)
    is_known = all(step["type"] in _PRE_TOKENIZERS and _is_known_split(step) for step in steps)
    return is_known and any(map(_is_cutting, steps))


def _is_known_split(step: dict[str, Any]) -> bool:
    if step["type"] != "Split":
        return True
    return step["pattern"].get("Regex") in _SPLITS and step["behavior"] == "Isolated" and not step["invert"]


def _is_cutting(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return bool(step.get("use_regex", True))
    if step["type"] == "Metaspace":
        return bool(step.get("split", True)) and step["replacement"] == _SPACE
    return step["type"] not in ("Digits", "Punctuation")


def _merges_within_words(definition: dict[str, Any]) -> bool:
    """BPE over the whole text is local too where no piece has a space behind something else."""
    model, steps = definition["model"], _steps(definition["normalizer"], "normalizers")
    is_marked = any(step["type"] == "Replace" for step in steps) and _SPACE in model["vocab"]
    if model["type"] != "BPE" or not is_marked:
        return False
    return not any(_SPACE in piece.lstrip(_SPACE) for piece in model["vocab"])


def _steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The single steps, in order, of a step that may be a sequence."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [single for part in step[inner] for single in _steps(part, inner)]
    return [step]


def _without_prefix(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """For the words inside a text: what is put before a text is not put before each of them."""
    steps = _steps(normalizer, "normalizers")
    kept = [step for step in steps if step["type"] != "Prepend"]
    return normalizer if len(kept) == len(steps) else {"type": "Sequence", "normalizers": kept}
