"""Every form of record is read into what its task needs; whatever is wrong in one is said whole, with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.data.formats import Columns
from launcher.data.read import read_records
from launcher.data.sources import find_sources
from launcher.errors import DataError
from launcher.task import Record

USER, REPLY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}


def read(path: Path | str, content: str, task: str, data_format: str | None = None, **options: Any) -> list[Record]:
    Path(path).write_text(content, encoding="utf-8")
    columns = Columns(task, options.pop("columns", {}), **options)
    return list(read_records(find_sources("data.train", str(path), data_format), columns, "document"))


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


TALKS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, REPLY]},
    "messages as JSON": {"messages": json.dumps([USER, REPLY])},
    "parts of text": {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}, REPLY]},
    "sharegpt": {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    "alpaca": {"instruction": "2 + 2?", "input": "", "output": "4"},
    "prompt and completion as messages": {"prompt": [USER], "completion": [REPLY]},
}


@pytest.mark.parametrize("form", TALKS)
def test_every_form_of_conversation_is_the_same(form: str) -> None:
    (record,) = read("a.jsonl", json.dumps(TALKS[form]), "chat")
    assert record == Record("2 + 2?\n4", None, "a.jsonl", 1, {"messages": [USER, REPLY]})


def test_alpaca_with_input_history_and_system() -> None:
    row = {"instruction": "Add.", "input": "1 1", "output": "2", "history": [["Hi", "Ho"]], "system": "Be brief."}
    (record,) = read("a.json", json.dumps([row]), "chat")
    assert [(m["role"], m["content"]) for m in record.parts["messages"]] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Ho"),
        ("user", "Add.\n\n1 1"),
        ("assistant", "2"),
    ]


def test_prompt_and_completion_of_texts_stay_texts() -> None:
    mapped = {"prompt": "en", "completion": "de"}
    (record,) = read("a.tsv", "en\tde\nA dog.\tEin Hund.\n", "chat", columns=mapped)
    assert record.parts == {"prompt": "A dog.", "completion": "Ein Hund."}


PREFERENCES: dict[str, dict[str, Any]] = {
    "messages": {"prompt": [USER], "chosen": [REPLY], "rejected": [{"role": "assistant", "content": "5"}]},
    "whole conversations": {"chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "5"}]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "2 + 2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
    "alpaca": {"instruction": "2 + 2?", "chosen": "4", "rejected": "5"},
}


@pytest.mark.parametrize("form", PREFERENCES)
def test_every_form_of_preference_is_the_same(form: str) -> None:
    (record,) = read("a.jsonl", json.dumps(PREFERENCES[form]), "preference")
    wrong = {"role": "assistant", "content": "5"}
    assert record.parts == {"chosen": {"messages": [USER, REPLY]}, "rejected": {"messages": [USER, wrong]}}


def test_a_preference_of_texts_has_no_template() -> None:
    (record,) = read("a.jsonl", '{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}', "preference")
    assert record.parts["rejected"] == {"prompt": "2 + 2 =", "completion": " 5"}


def test_only_the_last_reply_is_compared() -> None:
    row = {"prompt": [USER, REPLY, USER], "chosen": "4", "rejected": "5"}
    (record,) = read("a.jsonl", json.dumps(row), "preference")
    assert [m.get("weight") for m in record.parts["chosen"]["messages"]] == [None, 0, None, None]


def test_pairs_and_numbers_and_several_labels() -> None:
    mapped = {"text": "#1 String", "text_pair": "#2 String", "label": "Quality"}
    (record,) = read("a.tsv", "Quality\t#1 String\t#2 String\n1\ta\tb\n", "sequence_classification", columns=mapped)
    assert (record.text, record.label, record.parts) == ("a\nb", "1", {"pair": ("a", "b")})
    (record,) = read("a.tsv", "Quality\t#1 String\t#2 String\n1.5\ta\tb\n", "regression", columns=mapped)
    assert record.parts == {"target": 1.5, "pair": ("a", "b")}
    options = {"multi_label": True, "label_separator": "|"}
    records = read("a.csv", "text,label\na,x | y\nb,\n", "sequence_classification", **options)
    assert [record.labels for record in records] == [("x", "y"), ()]


def test_a_table_without_a_line_of_names() -> None:
    records = read("a.tsv", "good film\t1\nbad film\t0\n", "sequence_classification", header=("text", "label"))
    assert [(record.text, record.label, record.line) for record in records] == [
        ("good film", "1", 1),
        ("bad film", "0", 2),
    ]


def test_conll_lines_and_lists_of_tokens() -> None:
    lines = "-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP B-PER\n"
    records = read("a.conll", lines, "token_classification")
    assert [(r.parts["tokens"], r.labels, r.line) for r in records] == [
        (["EU", "rejects"], ("B-ORG", "O"), 3),
        (["Peter"], ("B-PER",), 7),
    ]
    (first, _) = read("a.conll", lines, "token_classification", columns={"tags": "1"})
    assert first.labels == ("NNP", "VBZ")
    (record,) = read(
        "a.jsonl", '{"tokens": ["a b", "c"], "ner_tags": [0, 3]}', "token_classification", columns={"tags": "ner_tags"}
    )
    assert (record.parts["tokens"], record.labels) == (["a b", "c"], ("0", "3"))


ARTICLE = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "Ada was born in 1815.",
                    "qas": [
                        {"id": "1", "question": "When?", "answers": [{"text": "1815", "answer_start": 16}]},
                        {"id": "2", "question": "Where?", "answers": [], "is_impossible": True},
                    ],
                }
            ]
        }
    ]
}


@pytest.mark.parametrize("indent", [None, 1])
def test_squad_files(indent: int | None) -> None:
    first, second = read("a.json", json.dumps(ARTICLE, indent=indent), "extractive_qa", no_answer=True)
    assert first.parts == {"question": "When?", "context": "Ada was born in 1815.", "answers": [("1815", 16)]}
    assert second.parts["answers"] == []


def test_squad_rows_as_datasets_has_them() -> None:
    row = {"id": "1", "question": "When?", "context": "In 1815.", "answers": {"text": ["1815"], "answer_start": [3]}}
    (record,) = read("a.jsonl", json.dumps(row), "extractive_qa")
    assert record.parts["answers"] == [("1815", 3)]


def test_a_list_of_objects_tells_the_line_of_each() -> None:
    text = '[\n {"text": "a"},\n\n {"text":\n "b"},{"text": "c"}]\n'
    assert [(r.text, r.line) for r in read("a.json", text, "causal_lm")] == [("a", 2), ("b", 4), ("c", 5)]
    assert [r.text for r in read("b.json", '{"text": "a"}\n{"text": "b"}\n', "causal_lm")] == ["a", "b"]


def qa(**changed: Any) -> str:
    row = {"question": "When?", "context": "In 1815.", "answers": {"text": ["1815"], "answer_start": [3]}}
    return json.dumps({**row, **changed})


LABELS = {"labels": frozenset({"B-PER", "O"})}
BAD: dict[str, tuple[str, str, dict[str, Any], str]] = {
    # task, content, options, message; the file is a.jsonl, or a.conll where the message says so
    "tokens and tags of different length": (
        "token_classification",
        '{"tokens": ["a", "b"], "tags": ["O"]}',
        {},
        "a.jsonl:1: has 1 tags for 2 tokens; give each token its tag",
    ),
    "a tag that is not in the set": (
        "token_classification",
        '{"tokens": ["a"], "tags": ["B-PRE"]}',
        LABELS,
        "a.jsonl:1: tags: B-PRE is not one of task.labels; did you mean `B-PER`?",
    ),
    "tokens that are a text": (
        "token_classification",
        '{"tokens": "a b", "tags": ["O", "O"]}',
        {},
        "a.jsonl:1: tokens: 'a b' is a text that is not JSON; give a list, or one written as JSON",
    ),
    "a token without a tag": (
        "token_classification",
        "a O\nb\n",
        {},
        "a.conll:2: b is a token without a tag; give a tag behind each token, O for none",
    ),
    "lines of unequal fields": (
        "token_classification",
        "a X O\nb O\n",
        {},
        "a.conll:2: has 2 fields where the lines before have 3; give every line of a sentence as many",
    ),
    "an answer that is not in the context": (
        "extractive_qa",
        qa(answers={"text": ["1851"], "answer_start": [3]}),
        {},
        "a.jsonl:1: answers: 1851 is not what stands in the context at character 3: '1815'; "
        "give the words as they are there, and count characters from 0, not bytes",
    ),
    "an answer beyond the context": (
        "extractive_qa",
        qa(answers={"text": ["1815"], "answer_start": [99]}),
        {},
        "a.jsonl:1: answers: answer_start: 99 is not a place in the context, which has 8 characters; "
        "count characters from 0",
    ),
    "no answer": (
        "extractive_qa",
        qa(answers={"text": [], "answer_start": []}),
        {},
        "a.jsonl:1: has no answer; set task.no_answer if that is what is to be learnt, or leave the record out",
    ),
    "no reply": (
        "chat",
        json.dumps({"messages": [USER]}),
        {},
        "a.jsonl:1: is a conversation without a turn of the assistant, so there is nothing to learn; "
        "leave the record out, or give the reply",
    ),
    "an unknown speaker": (
        "chat",
        json.dumps({"messages": [{"role": "narrator", "content": "x"}]}),
        {},
        "a.jsonl:1: messages[0]: narrator is not the role of a speaker; known are human, user, gpt, assistant, chatgpt, "
        "bing, bard, model, system, developer, tool, observation, function_response, function_call",
    ),
    "a message without words": (
        "chat",
        json.dumps({"messages": [USER, {"role": "assistant"}]}),
        {},
        "a.jsonl:1: messages[1]: None is not a text; give the message's text as content (or value)",
    ),
    "no conversation": (
        "chat",
        '{"text": "x"}',
        {},
        "a.jsonl:1: has none of the columns of a conversation (messages, conversations, instruction and output, or prompt "
        "and completion) but text; name them in data.columns",
    ),
    "an empty completion": (
        "chat",
        '{"prompt": "x", "completion": " "}',
        {},
        "a.jsonl:1: completion: ' ' is empty, so there is nothing to learn; leave the record out",
    ),
    "two answers alike": (
        "preference",
        '{"prompt": "x", "chosen": "y", "rejected": "y"}',
        {},
        "a.jsonl:1: rejected: is the same as the chosen answer: there is nothing to prefer; leave the record out",
    ),
    "an answer without a question": (
        "preference",
        json.dumps({"chosen": [REPLY], "rejected": [{"role": "assistant", "content": "5"}]}),
        {},
        "a.jsonl:1: is an answer without a question; give a prompt, or whole conversations",
    ),
    "no number": (
        "regression",
        '{"text": "x", "label": "high"}',
        {},
        "a.jsonl:1: label: high is not a finite number; give each record a number, or leave the record out",
    ),
    "one label where a list is wanted": (
        "sequence_classification",
        '{"text": "x", "label": "a"}',
        {"multi_label": True},
        "a.jsonl:1: label: a is not a list of labels, which task.multi_label wants; "
        "give a list of labels, or set data.label_separator",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_in_a_record_is_said_whole(name: str) -> None:
    task, content, options, message = BAD[name]
    with pytest.raises(DataError) as caught:
        read(message.partition(":")[0], content, task, **options)
    assert str(caught.value) == message


def test_a_question_of_squad_is_named_by_its_place() -> None:
    wrong = json.loads(json.dumps(ARTICLE).replace('"answer_start": 16', '"answer_start": 15'))
    with pytest.raises(DataError) as caught:
        read("a.json", json.dumps(wrong), "extractive_qa", no_answer=True)
    assert str(caught.value).startswith("a.json: data[0].paragraphs[0].qas[0]: answers: 1815 is not what stands in the")
