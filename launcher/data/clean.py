"""Records as the spec wants them: normalised, bounded, each once; and how many each step dropped or changed.

Steps run in the order of `data.clean`'s keys on records in the order of the files, so what is kept depends on nothing
else. Duplicates are judged after the other steps, and the first of them stays. Knowing those seen takes about 100 bytes
per record, near duplicates 2 KB.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import Any

import numpy as np

from launcher.errors import DataError, SpecError
from launcher.job.spec import CleanSection
from launcher.task import Record

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""Unicode's category Cc but tab, newline and carriage return."""

_PERMUTATIONS = 128
_SHINGLE_WORDS = 3
"""Texts are compared as sets of three words in a row: Lee et al. (ACL 2022) use five on web pages; records are shorter."""


class Cleaner:
    """`cleaner(records)` passes on what is kept; may be run over the same records again, and then finds the same."""

    def __init__(self, options: CleanSection) -> None:
        self._options = options
        self._near: np.ndarray[Any, Any] | None = None
        self.dropped: dict[str, int] = {}
        self.changed: dict[str, int] = {}

    def __call__(self, records: Iterable[Record]) -> Iterator[Record]:
        options = self._options
        self.dropped = {name: 0 for name in _DROPPING if _is_on(options, name)}
        self.changed = {name: 0 for name in _CHANGING if getattr(options, name)}
        kept = self._judged(map(self._changed, records))
        if options.exact_duplicates:
            kept = self._once(kept)
        return self._unlike(kept, options.near_duplicates) if options.near_duplicates is not None else kept

    def to_json(self) -> dict[str, Any]:
        return {"dropped": self.dropped, "changed": self.changed}

    def _changed(self, record: Record) -> Record:
        for name in self.changed:
            change = _CHANGING[name]
            text = change(record.text)
            if text != record.text:
                self.changed[name] += 1
                record = record._replace(text=text, parts=_mapped(record.parts, change))
        return record

    def _judged(self, records: Iterable[Record]) -> Iterator[Record]:
        options = self._options
        only, never = (re.compile(p) if p else None for p in (options.keep_matching, options.drop_matching))
        for record in records:
            length = len(record.text)
            if options.min_characters is not None and length < options.min_characters:
                self.dropped["min_characters"] += 1
            elif options.max_characters is not None and length > options.max_characters:
                self.dropped["max_characters"] += 1
            elif only is not None and not only.search(record.text):
                self.dropped["keep_matching"] += 1
            elif never is not None and never.search(record.text):
                self.dropped["drop_matching"] += 1
            else:
                yield record

    def _once(self, records: Iterable[Record]) -> Iterator[Record]:
        seen: set[bytes] = set()
        for record in records:
            digest = blake2b(repr((record.text, record.label, record.parts)).encode(), digest_size=16).digest()
            if digest in seen:
                self.dropped["exact_duplicates"] += 1
            else:
                seen.add(digest)
                yield record

    def _unlike(self, records: Iterable[Record], threshold: float) -> Iterator[Record]:
        """Without records whose estimated Jaccard similarity to one kept before is `threshold` or more (Broder, 1997)."""
        is_near = self._near_from(threshold) if self._near is None else None
        judged: list[bool] = []
        for number, record in enumerate(records):
            is_dropped = is_near(number, record.text) if is_near else bool(self._near[number])  # type: ignore[index]
            judged.append(is_dropped)
            if is_dropped:
                self.dropped["near_duplicates"] += 1
            else:
                yield record
        self._near = np.array(judged, dtype=np.bool_)

    def _near_from(self, threshold: float) -> Callable[[int, str], bool]:
        try:
            from datasketch import MinHash, MinHashLSH
        except ModuleNotFoundError:
            rule, way_out = "needs the package datasketch", "pip install 'fleetune[dedupe]', or leave it out"
            raise SpecError("data.clean.near_duplicates", threshold, rule, way_out) from None

        index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
        kept: dict[int, Any] = {}

        def is_near(number: int, text: str) -> bool:
            sketch = MinHash(num_perm=_PERMUTATIONS, seed=1)
            sketch.update_batch([shingle.encode() for shingle in _shingles(text)])
            if any(kept[other].jaccard(sketch) >= threshold for other in index.query(sketch)):
                return True
            kept[number] = sketch
            index.insert(number, sketch)
            return False

        return is_near


def check_cleaning(task: str, options: CleanSection | None) -> None:
    """DataError for a step that would move the places at which answers are said to stand."""
    for name in _CHANGING:
        if options is not None and task == "extractive_qa" and getattr(options, name):
            rule = "would move the places of the answers in their contexts"
            raise DataError(f"data.clean.{name}", True, rule, "leave it out, or clean the files before")


def _nfc(text: str) -> str:
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _without_control(text: str) -> str:
    return _CONTROL.sub("", text)


_CHANGING: dict[str, Callable[[str], str]] = {"nfc": _nfc, "strip_control": _without_control}
_DROPPING = (
    "min_characters",
    "max_characters",
    "keep_matching",
    "drop_matching",
    "exact_duplicates",
    "near_duplicates",
)


def _is_on(options: CleanSection, name: str) -> bool:
    return getattr(options, name) not in (None, False)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with every text in it changed; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(part, change) for part in value)
    return value


def _shingles(text: str) -> set[str]:
    words = text.lower().split()
    count = max(1, len(words) - _SHINGLE_WORDS + 1)
    return {" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(count)}
