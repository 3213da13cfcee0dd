"""A tag for every word. The first token of a word answers for it; with `label_all_tokens` its other tokens learn too.

A sentence longer than a row goes on in the next one, cut between words, so no tag is lost.
torch is imported where tensors are made: preparing data needs `rows` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.task import IGNORED, Batch, Kind, Metrics, Record, Row
from launcher.task.encoding import frame_of

if TYPE_CHECKING:
    from torch import Tensor

NO_WORD = -1

Word = tuple[list[int], int]
"""Token ids of a word, and its tag."""


class TokenClassification:
    name = "token_classification"
    auto_class = "AutoModelForTokenClassification"
    columns: dict[str, Kind] = {"input_ids": "tokens", "words": "ints", "label": "classes"}  # noqa: RUF012 - never altered
    logits_per_token = True
    sequences_per_sample = 1

    def __init__(self, seq_len: int, labels: Sequence[str], *, label_all_tokens: bool = False) -> None:
        assert labels, "the labels come from the spec or from the prepared data"
        self.seq_len = seq_len
        self.labels = tuple(labels)
        self.label_all_tokens = label_all_tokens
        ids = {label: i for i, label in enumerate(self.labels)}
        self.inside = [ids.get(f"I-{label[2:]}", i) if label[:2] == "B-" else i for label, i in ids.items()]
        """Tag of a word's later tokens, by that of its first."""
        self.config_overrides: dict[str, Any] = {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": ids,
        }

    def logits_width(self, config: Any) -> int:
        return int(config.num_labels)

    def rows(self, records: Iterable[Sequence[Record]], tokenizer: Any) -> Iterator[Row]:
        """`words`: for each token its word's place in `label`, the tags of the words; `NO_WORD` for `[CLS]` and `[SEP]`."""
        before, behind = frame_of(tokenizer)
        room = max(1, self.seq_len - len(before) - len(behind))
        ids_of = self.config_overrides["label2id"]
        for some in records:
            for record in some:
                tags = [ids_of[tag] for tag in record.labels]
                for words in _in_rows(_words(record.parts["tokens"], tags, tokenizer), room):
                    numbers = [number for number, (ids, _) in enumerate(words) for _ in ids]
                    yield {
                        "input_ids": [*before, *(i for ids, _ in words for i in ids), *behind],
                        "words": [*[NO_WORD] * len(before), *numbers, *[NO_WORD] * len(behind)],
                        "label": [tag for _, tag in words],
                    }

    def collate(self, rows: Sequence[Row], pad_id: int) -> Batch:
        """`labels` (B, T): what the loss counts; `first_labels` (B, T): the tags at the first tokens of words alone."""
        from launcher.task.padding import pad_right, padded

        tags = [self._tags(row) for row in rows]
        first = padded([firsts for firsts, _ in tags], IGNORED)
        labels = padded([every for _, every in tags], IGNORED) if self.label_all_tokens else first
        return {**pad_right(rows, pad_id), "labels": labels, "first_labels": first}

    def _tags(self, row: Row) -> tuple[Any, Any]:
        words = np.asarray(row["words"], dtype=np.int64)
        tags = np.asarray([*row["label"], IGNORED], dtype=np.int64)[words]  # NO_WORD finds the last
        is_first = np.diff(words, prepend=NO_WORD) != 0
        inside = np.array([*self.inside, IGNORED])[np.where(tags == IGNORED, -1, tags)]
        return np.where(is_first, tags, IGNORED), np.where(is_first, tags, inside)

    def dummy_rows(self, count: int) -> list[Row]:
        return [{"input_ids": [0], "words": [NO_WORD], "label": []} for _ in range(count)]

    def num_valid(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        """`logits` (B, T, C)."""
        from torch.nn import functional

        flat = logits.reshape(-1, logits.shape[-1]).float()
        return functional.cross_entropy(flat, batch["labels"].reshape(-1), ignore_index=IGNORED, reduction="sum")

    def metrics(self, num_samples: int = 0) -> Metrics:
        from launcher.task.metrics import TagMetrics

        return TagMetrics(self)


def _words(tokens: Sequence[str], tags: Sequence[int], tokenizer: Any) -> list[Word]:
    """The words with their token ids, in the order of the text; one that the tokenizer drops whole is dropped.

    The words are joined by spaces and found again by their place: no tokenizer needs to be told that they are words.
    """
    ends = np.cumsum([len(token) + 1 for token in tokens])
    encoded = tokenizer(" ".join(tokens), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    held: list[list[int]] = [[] for _ in tokens]
    for token_id, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # the last character of a token is in its word, also where the token begins with the space before it
        held[int(np.searchsorted(ends, max(start, stop - 1), side="right"))].append(token_id)
    return [(ids, tag) for ids, tag in zip(held, tags, strict=True) if ids]


def _in_rows(words: Sequence[Word], room: int) -> Iterator[list[Word]]:
    """As many words as fit into `room` tokens, again and again; a word longer than a row is cut."""
    row: list[Word] = []
    num_tokens = 0
    for ids, tag in words:
        if row and num_tokens + len(ids) > room:
            yield row
            row, num_tokens = [], 0
        row.append((ids[:room], tag))
        num_tokens += len(ids[:room])
    if row:
        yield row
