"""Conversations -> tokens, and which of them the assistant wrote: by the template's own marks, or by its growth.

A template that has `{% generation %}` says itself what is the assistant's. For any other, the conversation is written
out up to each reply with the invitation to speak, and again with the reply: what is added is the assistant's, if
nothing before it changes. Where that does not hold, the template cannot be used for learning, and the error says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.errors import ABSENT, DataError
from launcher.task import Record

PLAIN = """\
{{ bos_token if bos_token and bos_token != eos_token else '' }}{% for message in messages %}{{ message.role }}:{% if \
message.role == 'assistant' %}{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}{% else %} {{ \
message.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
"""The template called `plain`: for a tokenizer that knows no special tokens but the end of a text."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
Message = dict[str, Any]


def give_template(tokenizer: Any, wanted: str | None) -> None:
    """Set the chat template that the spec asks for; it is saved with the tokenizer, and so used for inference too.

    Special tokens that a template writes are read as such, also by a tokenizer that would spell them out in a text.
    """
    if wanted == "plain":
        tokenizer.chat_template = PLAIN
    elif wanted is not None:
        try:
            tokenizer.chat_template = Path(wanted).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            way_out = "give a Jinja file, or `plain`"
            raise DataError("task.chat_template", wanted, f"cannot be read ({reason})", way_out) from None
    tokenizer.split_special_tokens = False
    tokenizer.init_kwargs["split_special_tokens"] = False


def learnt_tokens(record: Record, parts: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """(token ids, 1 for each that counts in the loss) of a conversation (`messages`) or of `prompt` and `completion`.

    A token counts if any character of it is the assistant's.
    """
    if "messages" in parts:
        text, spans = written_out(record, parts["messages"], parts.get("tools"), tokenizer)
        return marked(text, spans, tokenizer)
    return completed(parts["prompt"], parts["completion"], tokenizer)


def completed(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Both joined without any template, and the end-of-text token, which counts too."""
    ids, mask = marked(prompt + completion, [(len(prompt), len(prompt) + len(completion))], tokenizer)
    return [*ids, tokenizer.eos_token_id], [*mask, 1]


def marked(text: str, spans: Sequence[Span], tokenizer: Any) -> tuple[list[int], list[int]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [0] * len(encoded["input_ids"])
    number = 0
    for i, (start, stop) in enumerate(encoded["offset_mapping"]):
        while number < len(spans) and spans[number][1] <= start:
            number += 1
        if number < len(spans):
            first, last = spans[number]
            mask[i] = int(start < last and (stop > first or first <= start))
    return encoded["input_ids"], mask


def written_out(record: Record, messages: Sequence[Message], tools: Any, tokenizer: Any) -> tuple[str, list[Span]]:
    """The text of a conversation, and where in it the replies are that shall be learnt (those of weight 0 shall not)."""
    template = _template(tokenizer)
    if _MARKS.search(template):
        text, spans = _by_marks(record, messages, tools, tokenizer)
    else:
        text, spans = _by_growth(record, messages, tools, tokenizer)
    replies = [message for message in messages if message["role"] == "assistant"]
    if len(spans) != len(replies):
        raise _unmarkable(record, f"marks {len(spans)} of {len(replies)} replies")
    return text, [span for span, reply in zip(spans, replies, strict=True) if reply.get("weight") != 0]


def _template(tokenizer: Any) -> str:
    """The one for plain conversations, where a tokenizer has several."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    if not found:
        way_out = "set task.chat_template to a Jinja file or to `plain`, or use a chat model's tokenizer"
        raise DataError("data.tokenizer", ABSENT, "has no chat template", way_out)
    return str(found)


def _by_marks(record: Record, messages: Sequence[Message], tools: Any, tokenizer: Any) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    def render() -> Any:
        return render_jinja_template(
            conversations=[list(messages)],
            tools=tools,
            chat_template=_template(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )

    (text,), (spans,) = _rendered(record, render)
    return text, [(start, stop) for start, stop in spans]


def _by_growth(record: Record, messages: Sequence[Message], tools: Any, tokenizer: Any) -> tuple[str, list[Span]]:
    def text_of(some: Sequence[Message], invited: bool) -> str:
        def render() -> Any:
            return tokenizer.apply_chat_template(list(some), tools=tools, tokenize=False, add_generation_prompt=invited)

        return str(_rendered(record, render))

    whole = text_of(messages, invited=False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = text_of(messages[:number], invited=True), text_of(messages[: number + 1], invited=False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise _unmarkable(record, f"writes what stands before message {number + 1} otherwise once it is there")
        spans.append((len(before), len(after)))
    return whole, spans


def _rendered(record: Record, render: Any) -> Any:
    """Templates refuse conversations with errors of their own: an odd order of roles, a field that is missing."""
    from jinja2 import TemplateError

    try:
        return render()
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        rule = f"is a conversation that the chat template refuses ({reason})"
        raise DataError(record.where, ABSENT, rule, "mend the record, or set another task.chat_template") from None


def _unmarkable(record: Record, what: str) -> DataError:
    rule = f"cannot tell the assistant's words from the others: it {what} (seen at {record.where})"
    way_out = (
        "put {% generation %} ... {% endgeneration %} around them in a copy of it, and name that as task.chat_template"
    )
    return DataError("chat template", ABSENT, rule, way_out)
