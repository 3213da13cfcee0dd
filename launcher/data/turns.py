"""Conversations and preferences: the forms that are in use, all read into messages of `{"role", "content"}`.

messages       [{"role": "user", "content": "..."}, ...]                  OpenAI, TRL
conversations  [{"from": "human", "value": "..."}, ...], system           ShareGPT
instruction, input, output, system, history                               Alpaca
prompt, completion     two texts, joined without a template; or two lists of messages
chosen, rejected       an answer each, behind any of the above; or two whole conversations
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.data.formats import Cells, checked_text
from launcher.errors import ABSENT, DataError
from launcher.task import Record

Message = dict[str, Any]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""What ShareGPT's files and chat templates call a speaker -> the role that templates know."""


def conversation(cells: Cells) -> Record:
    """A record of `messages`, or of `prompt` and `completion`."""
    if cells.has("prompt") and cells.has("completion") and not cells.has("messages"):
        prompt, completion = (_texts_or_messages(cells, field) for field in ("prompt", "completion"))
        if isinstance(prompt, str) and isinstance(completion, str):
            _not_blank(cells, "completion", completion)
            return cells.record(f"{prompt}\n{completion}", None, prompt=prompt, completion=completion)
        return _of_messages(cells, [*_as_messages(prompt, "user"), *_as_messages(completion, "assistant")])
    messages = _context(cells)
    if cells.has("output") and not (cells.has("messages") or cells.has("conversations")):
        output = cells.text("output")
        _not_blank(cells, "output", output)
        messages.append({"role": "assistant", "content": output})
    if not messages:
        forms = "messages, conversations, instruction and output, or prompt and completion"
        rule = f"has none of the columns of a conversation ({forms}) but {', '.join(map(str, cells.values))}"
        raise DataError(cells.place, ABSENT, rule, "name them in data.columns")
    return _of_messages(cells, messages)


def _of_messages(cells: Cells, messages: list[Message]) -> Record:
    if not any(message["role"] == "assistant" for message in messages):
        rule = "is a conversation without a turn of the assistant, so there is nothing to learn"
        raise DataError(cells.place, ABSENT, rule, "leave the record out, or give the reply")
    text = "\n".join(str(message["content"] or "") for message in messages)
    return cells.record(text, None, messages=messages, **_tools(cells))


def _tools(cells: Cells) -> dict[str, Any]:
    """What the assistant may call, for templates that write it out."""
    return {"tools": cells.decoded("tools")} if cells.has("tools") and cells.value("tools") else {}


def _context(cells: Cells) -> list[Message]:
    """What is said in the columns that hold a conversation, or its beginning."""
    system = [{"role": "system", "content": cells.text("system")}] if _has_text(cells, "system") else []
    for field in ("messages", "conversations"):
        if cells.has(field):
            return [*system, *_messages(cells, field)]
    if cells.has("instruction"):
        return [*system, *_alpaca(cells)]
    return system


def _has_text(cells: Cells, field: str) -> bool:
    return cells.has(field) and cells.value(field) != ""


def _alpaca(cells: Cells) -> list[Message]:
    """Earlier turns (`history`, pairs of question and answer), then the instruction with its input below it."""
    turns: list[Message] = []
    for pair in cells.decoded("history") if _has_text(cells, "history") else []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(cells.where("history"), pair, "is not a pair of question and answer", "give two texts")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": checked_text(cells.where("history"), said, "give two texts")})
    asked = [cells.text(field) for field in ("instruction", "input") if _has_text(cells, field)]
    return [*turns, {"role": "user", "content": "\n\n".join(asked)}]


def _messages(cells: Cells, field: str, value: Any = None) -> list[Message]:
    """Checked and with the roles that templates know; other keys of a message are kept for the template."""
    found = cells.decoded(field) if value is None else value
    where = cells.where(field)
    if not isinstance(found, list) or not found:
        way_out = 'give a list of {"role": ..., "content": ...}'
        raise DataError(where, found, "is not a list of messages", way_out)
    return [_message(f"{where}[{number}]", message) for number, message in enumerate(found)]


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(where, message, "is not a message", 'give {"role": ..., "content": ...}')
    message = {key: value for key, value in message.items() if value is not None}  # parquet fills up with nulls
    role, said = (
        message.pop("role", None) or message.pop("from", None),
        message.pop("content", message.pop("value", None)),
    )
    if role not in _ROLES:
        rule = "is not the role of a speaker" if role is not None else "is a message without a role"
        raise DataError(where, ABSENT if role is None else role, rule, f"known are {', '.join(_ROLES)}")
    if said is None and "tool_calls" in message:
        said = ""
    if isinstance(said, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in said):
        said = "".join(str(part.get("text", "")) for part in said)
    checked = checked_text(where, said, "give the message's text as content (or value)")
    return {"role": _ROLES[role], "content": checked, **message}


def _texts_or_messages(cells: Cells, field: str) -> str | list[Message]:
    value = cells.value(field)
    if isinstance(value, Mapping):
        return _messages(cells, field, [value])
    return _messages(cells, field) if isinstance(value, list) else cells.text(field)


def _as_messages(said: str | list[Message], role: str) -> list[Message]:
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def _not_blank(cells: Cells, field: str, text: str) -> None:
    if not text.strip():
        raise DataError(cells.where(field), text, "is empty, so there is nothing to learn", "leave the record out")


def preference(cells: Cells) -> Record:
    """`chosen` and `rejected`, each as parts that `chat` would learn from."""
    answers = {field: _texts_or_messages(cells, field) for field in ("chosen", "rejected")}
    if answers["chosen"] == answers["rejected"]:
        rule = "is the same as the chosen answer: there is nothing to prefer"
        raise DataError(cells.where("rejected"), ABSENT, rule, "leave the record out")
    prompt = _texts_or_messages(cells, "prompt") if cells.has("prompt") else _context(cells)
    parts: dict[str, Any] = {}
    for field, answer in answers.items():
        if isinstance(prompt, str) and isinstance(answer, str):
            _not_blank(cells, field, answer)
            parts[field] = {"prompt": prompt, "completion": answer}
        else:
            parts[field] = {"messages": _answered(cells, field, prompt, answer), **_tools(cells)}
    return cells.record("\n".join(_all_text(part) for part in parts.values()), None, **parts)


def _answered(cells: Cells, field: str, prompt: str | list[Message], answer: str | list[Message]) -> list[Message]:
    """The conversation that ends with this answer, of which only the answer is to be compared."""
    before = _as_messages(prompt, "user") if prompt else []
    said = _as_messages(answer, "assistant")
    if said[-1]["role"] != "assistant":
        way_out = "let the answer be the last message"
        raise DataError(cells.where(field), said[-1]["role"], "speaks last, not the assistant", way_out)
    if not before and len(said) < 2:
        rule = "is an answer without a question"
        raise DataError(cells.place, ABSENT, rule, "give a prompt, or whole conversations")
    turns = [*before, *said]
    return [
        {**turn, "weight": 0} if turn["role"] == "assistant" and number < len(turns) - 1 else turn
        for number, turn in enumerate(turns)
    ]


def _all_text(part: Mapping[str, Any]) -> str:
    if "messages" in part:
        return "\n".join(str(message["content"]) for message in part["messages"])
    return f"{part['prompt']}\n{part['completion']}"
