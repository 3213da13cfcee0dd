"""What becomes of a record, against what transformers' own functions and example scripts make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from launcher.data.train_pieces import train_sentencepiece
from launcher.errors import DataError
from launcher.task import IGNORED, Record
from launcher.task.chat import Chat
from launcher.task.extractive_qa import ExtractiveQA
from launcher.task.masked_lm import BEGINS, SPECIAL, MaskedLM
from launcher.task.masking import mask_tokens
from launcher.task.preference import Preference
from launcher.task.sequence_classification import SequenceClassification
from launcher.task.templates import give_template
from launcher.task.token_classification import TokenClassification

TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs (now!)"] * 20
CHATML = """{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}\
{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the fox?"},
    {"role": "assistant", "content": "it jumps over"},
    {"role": "user", "content": "the dog?"},
    {"role": "assistant", "content": "lazy"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    train_sentencepiece(TEXTS, "bpe", 400, folder / "gpt")
    train_sentencepiece(TEXTS, "bpe", 400, folder / "bert", add_cls_sep=True)
    return folder


def opened(folder: Path, name: str, template: str | None = None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    give_template(tokenizer, None)
    tokenizer.chat_template = template
    return tokenizer


def record(**parts: Any) -> Record:
    return Record("", None, "a.jsonl", 7, parts)


@pytest.mark.parametrize("template", [CHATML, UNMARKED])
def test_the_assistants_tokens_are_those_that_transformers_marks(folder: Path, template: str) -> None:
    """By the template's own marks, and without any by the growth of the text: the same tokens."""
    (row,) = Chat(200).rows([[record(messages=TALK)]], opened(folder, "gpt", template))
    expected = opened(folder, "gpt", CHATML).apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    assert row["input_ids"] == expected["input_ids"]
    assert list(row["loss_mask"]) == list(expected["assistant_masks"])
    text = opened(folder, "gpt").decode([i for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m])
    assert text == "it jumps over</s>lazy</s>"


def test_a_reply_of_weight_0_is_not_learnt(folder: Path) -> None:
    talk = [*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:]]
    (row,) = Chat(200).rows([[record(messages=talk)]], opened(folder, "gpt", CHATML))
    assert opened(folder, "gpt").decode(np.array(row["input_ids"])[np.array(row["loss_mask"]) == 1]) == "lazy</s>"


def test_the_template_called_plain_ends_replies_with_the_end_of_text(folder: Path) -> None:
    tokenizer = opened(folder, "gpt")
    give_template(tokenizer, "plain")
    (row,) = Chat(200).rows([[record(messages=TALK[1:3])]], tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "<s>user: the fox?\nassistant: it jumps over</s>"
    assert row["input_ids"][-1] == tokenizer.eos_token_id


def test_a_completion_is_learnt_and_its_prompt_is_not(folder: Path) -> None:
    task, tokenizer = Chat(200), opened(folder, "gpt")
    (row,) = task.rows([[record(prompt="the lazy dog: ", completion="jumps")]], tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "the lazy dog: jumps</s>"
    batch = task.collate([row, *task.dummy_rows(1)], pad_id=3)
    learnt = batch["labels"][0][batch["labels"][0] != IGNORED]
    assert tokenizer.decode(learnt).strip() == "jumps</s>"
    assert task.num_valid(batch) == len(learnt)


def test_of_a_conversation_that_is_cut_before_the_reply_nothing_is_left(folder: Path) -> None:
    assert list(Chat(8).rows([[record(messages=TALK)]], opened(folder, "gpt", CHATML))) == []


def test_templates_that_will_not_do_are_refused(folder: Path) -> None:
    def refusal(template: str | None, talk: list[dict[str, str]] = TALK) -> str:
        with pytest.raises(DataError) as caught:
            list(Chat(200).rows([[record(messages=talk)]], opened(folder, "gpt", template)))
        return str(caught.value)

    assert refusal(None) == (
        "data.tokenizer: has no chat template; "
        "set task.chat_template to a Jinja file or to `plain`, or use a chat model's tokenizer"
    )
    assert refusal("{{ messages | length }}{{ messages[-1].content }}") == (
        "chat template: cannot tell the assistant's words from the others: it writes what stands before message 3 "
        "otherwise once it is there (seen at a.jsonl:7); put {% generation %} ... {% endgeneration %} around them in a "
        "copy of it, and name that as task.chat_template"
    )
    assert refusal("{{ raise_exception('two users in a row') }}") == (
        "a.jsonl:7: is a conversation that the chat template refuses (two users in a row); "
        "mend the record, or set another task.chat_template"
    )
    with pytest.raises(DataError) as caught:
        give_template(opened(folder, "gpt"), "nowhere.jinja")
    assert str(caught.value) == (
        "task.chat_template: nowhere.jinja cannot be read (No such file or directory); give a Jinja file, or `plain`"
    )


def test_a_pair_of_answers_is_two_sequences(folder: Path) -> None:
    task, tokenizer = Preference(200), opened(folder, "gpt")
    parts = {
        name: {"prompt": "the fox ", "completion": text} for name, text in (("chosen", "jumps"), ("rejected", "box"))
    }
    rows = list(task.rows([[record(**parts)]], tokenizer))
    batch = task.collate([*rows, *task.dummy_rows(1)], pad_id=3)
    assert [tokenizer.decode(ids[ids != 3]) for ids in batch["input_ids"][[0, 2]]] == [
        "the fox jumps</s>",
        "the fox box</s>",
    ]
    learnt = [tokenizer.decode(labels[labels != IGNORED]).strip() for labels in batch["labels"][[0, 2]]]
    assert learnt == ["jumps</s>", "box</s>"]
    assert (batch["labels"][[1, 3]] == IGNORED).all()
    assert task.num_valid(batch) == 1


def test_pairs_have_segments_as_the_tokenizer_says(folder: Path) -> None:
    task, tokenizer = SequenceClassification(12, ("a", "b")), opened(folder, "bert")
    records = [Record("", "b", parts={"pair": (TEXTS[0], "the fox")}), Record("the dog", "a")]
    pair, single = (next(iter(task.rows([[some]], tokenizer))) for some in records)
    batch = task.collate([pair, single], pad_id=3)
    expected = tokenizer(TEXTS[0], "the fox", truncation=True, max_length=12, return_token_type_ids=True)
    assert batch["input_ids"][0].tolist() == expected["input_ids"]
    assert batch["token_type_ids"][0].tolist() == expected["token_type_ids"]
    assert batch["token_type_ids"][1].sum() == 0


SENTENCES = [["the", "(", "quick", "brown", ")", "fox", "jumps"], ["pack", "my", "box", "!"]]
TAGS = [["O", "O", "B-X", "I-X", "O", "B-X", "O"], ["O", "O", "B-X", "O"]]


def run_ner(tokenizer: Any, label_all: bool) -> list[tuple[list[int], list[int]]]:
    """tokenize_and_align_labels of transformers' examples/pytorch/token-classification/run_ner.py."""
    ids = {"B-X": 0, "I-X": 1, "O": 2}
    encoded = tokenizer(SENTENCES, truncation=True, is_split_into_words=True, max_length=64)
    rows = []
    for i, tags in enumerate(TAGS):
        previous, labels = None, []
        for word in encoded.word_ids(batch_index=i):
            if word is None:
                labels.append(-100)
            elif word != previous:
                labels.append(ids[tags[word]])
            else:
                labels.append(ids[tags[word].replace("B-", "I-")] if label_all else -100)
            previous = word
        rows.append((encoded["input_ids"][i], labels))
    return rows


@pytest.mark.parametrize("label_all", [False, True])
def test_tags_are_aligned_as_run_ner_does(label_all: bool) -> None:
    """With a WordPiece tokenizer, built here from a few pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "qu", "##ick", "br", "##own", "fox", "ju", "##mp", "##s"]
    pieces += ["pack", "my", "b", "##ox", "(", ")", "!"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    task = TokenClassification(64, ("B-X", "I-X", "O"), label_all_tokens=label_all)
    records = [record(tokens=t, labels=tuple(tags)) for t, tags in zip(SENTENCES, TAGS, strict=True)]
    rows = list(task.rows([records], tokenizer))
    batch = task.collate(rows, pad_id=0)
    for i, (ids, labels) in enumerate(run_ner(tokenizer, label_all)):
        assert rows[i]["input_ids"] == ids
        assert batch["labels"][i][: len(ids)].tolist() == labels
    assert batch["first_labels"][0].tolist() == run_ner(tokenizer, label_all=False)[0][1]


def test_a_long_sentence_goes_on_in_the_next_row(folder: Path) -> None:
    task, words = TokenClassification(8, ("O", "B-X")), TEXTS[0].split() * 3
    tags = tuple("B-X" if word == "fox" else "O" for word in words)
    rows = list(task.rows([[record(tokens=words, labels=tags)]], opened(folder, "bert")))
    assert len(rows) > 1
    assert max(len(row["input_ids"]) for row in rows) <= 8
    assert [tag for row in rows for tag in row["label"]] == [int(tag == "B-X") for tag in tags]


CONTEXT = " ".join(TEXTS[:4])


@pytest.mark.parametrize("seq_len", [24, 40, 400])
def test_windows_hold_the_answer_where_they_say(folder: Path, seq_len: int) -> None:
    """The tokens between first and last are the answer, in every window that holds all of it; the windows cover the text."""
    tokenizer, begin = opened(folder, "bert"), CONTEXT.index("liquor jugs")
    asked = record(question="  what?", context=CONTEXT, answers=[("liquor jugs", begin)])
    rows = list(ExtractiveQA(seq_len, doc_stride=6).rows([[asked]], tokenizer))
    assert [row["window"] for row in rows] == list(range(len(rows)))
    assert (len(rows) > 1) == (seq_len < 400)
    found = [row for row in rows if row["start"] != row["null"]]
    assert found
    for row in found:
        assert tokenizer.decode(row["input_ids"][row["start"] : row["end"] + 1]).strip() == "liquor jugs"
        places = np.array(row["offsets"]).reshape(-1, 2)
        text = bytes(row["context"]).decode()
        first, last = row["start"] - row["second"], row["end"] - row["second"]
        assert text[places[first, 0] : places[last, 1]].strip() == "liquor jugs"
    assert all(row["input_ids"][row["null"]] == tokenizer.cls_token_id for row in rows)
    assert bytes(rows[0]["context"]).decode().startswith("the quick")
    assert bytes(rows[-1]["context"]).decode().endswith("(now!)")


def test_a_question_longer_than_its_window_is_refused(folder: Path) -> None:
    asked = record(question="the quick brown fox jumps over", context=CONTEXT, answers=[("the", 0)])
    with pytest.raises(DataError, match="leaves less of seq_len 12 than the stride of 4; give more"):
        list(ExtractiveQA(12, doc_stride=4).rows([[asked]], opened(folder, "bert")))


@pytest.mark.parametrize("packing", ["concat", "none"])
def test_hidden_tokens_keep_their_frame(folder: Path, packing: Any) -> None:
    tokenizer = opened(folder, "bert")
    task = MaskedLM(16, packing, seed=5, mask_id=tokenizer.mask_token_id, vocab_size=400)
    rows = list(task.rows([[Record(text) for text in TEXTS[:6]]], tokenizer))
    assert all(
        row["input_ids"][0] == tokenizer.cls_token_id and row["input_ids"][-1] == tokenizer.sep_token_id for row in rows
    )
    numbered = [{**row, "sample": i, "epoch": 2} for i, row in enumerate(rows)]
    batch = task.collate(numbered, pad_id=3)
    asked = batch["labels"] != IGNORED
    original = torch.nn.utils.rnn.pad_sequence([torch.tensor(r["input_ids"]) for r in rows], True, 3)
    assert (batch["labels"][asked] == original[asked]).all()
    assert not asked[:, 0].any()
    assert (batch["input_ids"][~asked] == original[~asked]).all()
    again, other = task.collate(numbered, 3), task.collate([{**row, "epoch": 3} for row in numbered], 3)
    assert torch.equal(batch["input_ids"], again["input_ids"])
    assert not torch.equal(batch["labels"], other["labels"])
    held = [task.collate([row], 3)["labels"][0] for row in numbered]
    assert all(torch.equal(h, row[: len(h)]) for h, row in zip(held, batch["labels"], strict=True)), "not the batch's"


def test_windows_that_share_tokens_hide_each_once(folder: Path) -> None:
    """What a window has from the one before is shown and never asked for."""
    tokenizer = opened(folder, "bert")
    text = Record(" ".join(TEXTS[:6]))
    whole = next(iter(MaskedLM(4096, "none", mask_id=tokenizer.mask_token_id).rows([[text]], tokenizer)))["input_ids"]
    rows = list(MaskedLM(16, "none", stride=5, mask_id=tokenizer.mask_token_id).rows([[text]], tokenizer))
    assert len(rows) > 2
    assert all(row["words"][1:6] == [SPECIAL] * 5 for row in rows[1:])
    asked = [token for row in rows for token, kind in zip(row["input_ids"], row["words"], strict=True) if kind]
    assert asked == whole[1:-1]


def test_whole_words_are_hidden_whole(folder: Path) -> None:
    tokenizer = opened(folder, "bert")
    task = MaskedLM(64, "none", share=0.3, whole_words=True, mask_id=tokenizer.mask_token_id, vocab_size=400)
    rows = list(task.rows([[Record(text + " unheardof wordlings") for text in TEXTS[:8]]], tokenizer))
    split = 0
    for sample, row in enumerate(rows):
        asked = task.collate([{**row, "sample": sample, "epoch": 0}], 3)["labels"][0] != IGNORED
        words = np.cumsum(np.array(row["words"]) == BEGINS)[1:-1]
        for word in np.unique(words):
            tokens = asked[1:-1][torch.from_numpy(words == word)]
            assert tokens.all() or not tokens.any()
            split += len(tokens) > 1
    assert split > 0, "words of several tokens are what this is about"


def test_whole_words_are_the_wanted_share_of_tokens() -> None:
    words = np.repeat(np.arange(100), np.arange(100) % 3 + 1)
    ids, special = np.arange(len(words)), np.zeros(len(words), dtype=bool)
    num = [
        (mask_tokens(ids, special, 0, sample, 0, mask_id=1, vocab_size=999, words=words)[1] != IGNORED).mean()
        for sample in range(200)
    ]
    assert np.mean(num) == pytest.approx(0.15, abs=0.005)
