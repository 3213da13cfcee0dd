"""The tokenizer that prepares data: whole plain texts by remembered words, anything else by `transformers`.

Opened from the folder that prepared data carry, without importing `transformers` until something needs it: a worker
process is then ready in a fraction of a second.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.data.words import WordEncoder

_FACTS = (
    *("eos_token_id", "pad_token_id", "unk_token_id", "bos_token_id", "cls_token_id", "sep_token_id"),
    *("mask_token_id", "truncation_side", "all_special_ids"),
)
_OPTIONS = {"add_special_tokens", "truncation", "max_length", "return_attention_mask", "verbose"}


def facts_of(tokenizer: Any) -> dict[str, Any]:
    """What a `QuickTokenizer` must be told of a tokenizer, as its folder's `tokenizer.json` does not say it."""
    splits = tokenizer.backend_tokenizer.encode_special_tokens or getattr(tokenizer, "split_special_tokens", False)
    return {**{name: getattr(tokenizer, name) for name in _FACTS}, "split_special_tokens": bool(splits)}


class QuickTokenizer:
    """Gives what the `transformers` tokenizer gives; `tokenizer(texts, return_attention_mask=False)` gives it sooner."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """`folder`: what `save_pretrained` wrote; `facts`: from `facts_of`."""
        from tokenizers import Tokenizer

        self._folder, self._facts = folder, facts
        self._plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._plain.encode_special_tokens = facts["split_special_tokens"]
        self._plain.no_padding()
        self._plain.no_truncation()
        self._words = WordEncoder(self._plain)

    def __call__(self, texts: Any, *args: Any, **options: Any) -> Any:
        if not args and self._is_plain(texts, options):
            ids = self._words(texts)
            if options.get("add_special_tokens", True):
                ids = self._with_special(ids, options["max_length"] if options.get("truncation") else None)
            elif options.get("truncation"):
                ids = [some[: options["max_length"]] for some in ids]
            return {"input_ids": ids}
        return self._whole(texts, *args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._facts[name] if name in self._facts else getattr(self._whole, name)

    def _is_plain(self, texts: Any, options: dict[str, Any]) -> bool:
        """A list of texts, of which nothing but the ids is wanted, cut at their right end if at all."""
        return (
            isinstance(texts, list)
            and all(isinstance(text, str) for text in texts)
            and options.keys() <= _OPTIONS
            and options.get("return_attention_mask") is False
            and (not options.get("add_special_tokens", True) or self._template is not None)
            and (not options.get("truncation") or self._can_cut(options))
        )

    def _can_cut(self, options: dict[str, Any]) -> bool:
        num_special = sum(map(len, self._template or ())) if options.get("add_special_tokens", True) else 0
        is_right = self._facts["truncation_side"] == "right"
        return is_right and options["truncation"] is True and (options.get("max_length") or 0) > num_special

    @cached_property
    def _template(self) -> tuple[list[int], list[int]] | None:
        """What is put before and behind the ids of a text; None if that cannot be told from an example."""
        bare = self._plain.encode("a", add_special_tokens=False).ids
        full = self._plain.encode("a").ids
        places = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        return (full[: places[0]], full[places[0] + len(bare) :]) if bare and len(places) == 1 else None

    def _with_special(self, ids: list[list[int]], max_length: int | None) -> list[list[int]]:
        before, behind = self._template or ([], [])
        end = None if max_length is None else max_length - len(before) - len(behind)
        return [[*before, *some[:end], *behind] for some in ids]

    @cached_property
    def _whole(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
