"""Next-token rows, losses and scores, against plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from launcher.task import IGNORED, Record
from launcher.task.causal_lm import CausalLM

EOS = 9


class Letters:
    """Tokenizer of digits: `"123"` -> [1, 2, 3]."""

    eos_token_id = EOS

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [[int(digit) for digit in text] for text in texts]}


def rows_of(texts: list[str], seq_len: int, packing: Any) -> list[list[int]]:
    records = [[Record(text) for text in texts[i : i + 2]] for i in range(0, len(texts), 2)]
    return [row["input_ids"].tolist() for row in CausalLM(seq_len, packing).rows(records, Letters())]


def test_concat_joins_documents_and_keeps_the_rest() -> None:
    assert rows_of(["123", "", "45", "6"], 4, "concat") == [[1, 2, 3, 9], [4, 5, 9, 6]]
    assert rows_of(["123", "456"], 3, "concat") == [[1, 2, 3], [9, 4, 5], [6, 9]]


def test_none_cuts_each_document_into_windows() -> None:
    assert rows_of(["12345", "6", ""], 4, "none") == [[1, 2, 3, 4], [5, 9], [6, 9]]


def test_a_row_without_a_target_is_not_made() -> None:
    assert rows_of(["123"], 3, "none") == [[1, 2, 3]]


@given(st.lists(st.text("12345678", max_size=12)), st.integers(2, 7))
@settings(max_examples=100, deadline=None)
def test_concat_loses_no_token(texts: list[str], seq_len: int) -> None:
    whole = [token for text in texts if text for token in [*map(int, text), EOS]]
    rows = rows_of(texts, seq_len, "concat")
    packed = [token for row in rows for token in row]
    assert whole[: len(packed)] == packed
    assert len(whole) - len(packed) == (len(whole) % seq_len == 1)
    assert all(len(row) == seq_len for row in rows[:-1])


def make_batch() -> tuple[CausalLM, dict[str, torch.Tensor]]:
    task = CausalLM(4, "concat")
    return task, task.collate([{"input_ids": [5, 6, 7]}, {"input_ids": [3, 0]}, {"input_ids": [1, 2, 3, 4]}], pad_id=0)


def test_collate_pads_right_and_masks() -> None:
    _, batch = make_batch()
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [3, 0, 0, 0], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED], [IGNORED, 0, IGNORED, IGNORED], [IGNORED, 2, 3, 4]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_scores_are_those_of_plain_torch(dtype: torch.dtype) -> None:
    task, batch = make_batch()
    logits = torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    pairs = [(0, 0, 6), (0, 1, 7), (1, 0, 0), (2, 0, 2), (2, 1, 3), (2, 2, 4)]  # row, position, next token
    losses = [functional.cross_entropy(logits[b, t].float(), torch.tensor(token)) for b, t, token in pairs]
    assert task.num_valid(batch) == len(pairs)
    assert task.loss_sum(logits, batch).dtype == torch.float32
    assert task.loss_sum(logits, batch).item() == pytest.approx(sum(losses).item(), rel=1e-6)
    metrics = task.metrics()
    metrics.update(logits, batch)
    mean = sum(losses).item() / len(pairs)
    right = sum(logits[b, t].argmax().item() == token for b, t, token in pairs)
    expected = {"loss": mean, "perplexity": math.exp(mean), "accuracy": right / len(pairs)}
    assert metrics.result() == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_that_of_transformers() -> None:
    """Same logits, same labels: the sum over targets is their mean times our count."""
    from transformers import GPT2Config, GPT2LMHeadModel

    task, batch = make_batch()
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)).eval()
    output = model(**batch)
    assert task.loss_sum(output.logits, batch).item() / task.num_valid(batch) == pytest.approx(
        output.loss.item(), rel=1e-6
    )


def test_dummy_rows_cost_nothing_and_keep_the_gradient() -> None:
    task = CausalLM(4, "concat")
    batch = task.collate(task.dummy_rows(2), pad_id=0)
    logits = torch.randn(2, 1, 11, requires_grad=True)
    loss = task.loss_sum(logits, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert (task.num_valid(batch), loss.item(), logits.grad.abs().sum().item()) == (0, 0.0, 0.0)  # type: ignore[union-attr]


def test_sums_of_ranks_add_up() -> None:
    task, batch = make_batch()
    logits = torch.randn(3, 4, 11)
    whole, *ranks = (task.metrics() for _ in range(3))
    whole.update(logits, batch)
    for rank, metrics in enumerate(ranks):
        metrics.update(logits[rank::2], {name: tensor[rank::2] for name, tensor in batch.items()})
    ranks[0].sums = ranks[0].sums + ranks[1].sums
    assert ranks[0].result() == pytest.approx(whole.result(), rel=1e-6)


def test_scores_of_nothing_are_not_numbers() -> None:
    assert all(math.isnan(score) for score in CausalLM(4, "none").metrics().result().values())


@given(st.lists(st.text("12345678", max_size=30)), st.integers(3, 9), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_windows_that_share_tokens_learn_each_once(texts: list[str], seq_len: int, stride: int) -> None:
    """All but a document's first token are targets once, each with at least `stride` tokens before it where there are."""
    stride = min(stride, seq_len - 1)
    for text in filter(None, texts):
        rows = list(CausalLM(seq_len, "best_fit", stride).rows([[Record(text)]], Letters()))
        ids, at = [*map(int, text), EOS], 0
        targets = []
        for number, row in enumerate(rows):
            begin = at if number == 0 else at - stride
            assert row["input_ids"].tolist() == ids[begin : begin + seq_len]
            assert row["loss_mask"].tolist() == [
                int(place >= at) for place in range(begin, begin + len(row["loss_mask"]))
            ]
            targets += range(max(at, begin + 1), begin + len(row["input_ids"]))
            at = begin + len(row["input_ids"])
        assert targets == list(range(1, len(ids)))


def test_shared_tokens_are_no_targets() -> None:
    task = CausalLM(4, "none", 2)
    rows = list(task.rows([[Record("123456")]], Letters()))
    assert [row["input_ids"].tolist() for row in rows] == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 9]]
    batch = task.collate(rows, 0)
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, 4], [IGNORED, IGNORED, 5, 6], [IGNORED, IGNORED, 9, IGNORED]]
    assert task.num_valid(task.collate(task.dummy_rows(2), 0)) == 0
