"""Chat messages to examples, through the tokenizer's own chat template.

The template is rendered up to each assistant turn, and again after it: the text between is what that turn adds, and
is learned, its end-of-turn token included. A template that rewrites earlier turns (some drop old reasoning) makes the
first rendering no prefix of the whole; the turn's own text is then looked for in the whole.
"""

from __future__ import annotations

import json
from typing import Any

from commonweight.errors import DataError
from commonweight.recipe.schema import DataSpec

from .formats import Row
from .names import is_null, suggestion
from .templates import Example, Segments, choice, leading_space, open_example

ROLES = ("system", "developer", "user", "assistant", "tool")
Messages = list[dict[str, str]]


class ChatTemplate:
    """Rows with a list of {role, content} messages; every assistant turn is learned.

    Messages after the last assistant turn are left out: nothing is learned from them.

    Raises:
        DataError: the tokenizer has no chat template.
    """

    kind = "messages"

    def __init__(self, spec: DataSpec, field: str, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"the rows of {spec.path} hold chat messages ({field!r}), but the tokenizer has no chat template",
                hint="name a chat model's tokenizer in model.tokenizer, or set data.prompt and data.completion",
            )
        self.spec = spec
        self.field = field
        self.tokenizer = tokenizer

    def key(self, row: Row) -> str | None:
        messages = self._messages(row)
        return json.dumps(messages, ensure_ascii=False) if messages else None

    def example(self, row: Row) -> Example:
        """The row's example.

        Raises:
            DataError: messages that are malformed, or that the template refuses or cannot be followed through.
        """
        messages = self._messages(row)
        options, answer = choice(row, self.spec)
        segments = self._segments(messages, row)
        return Example(segments, None, options, answer, templated=True, reply=messages[-1]["content"].strip())

    def _messages(self, row: Row) -> Messages:
        """The checked messages up to the last assistant turn that says something; empty if there is none."""
        items = row.fields.get(self.field)
        if is_null(items):
            return []
        if not isinstance(items, list):
            raise DataError(
                f"{row.where}: {self.field!r} is not a list of messages",
                hint='give [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]',
            )
        messages = [_message(item, f"{row.where}, message {i:,}") for i, item in enumerate(items, 1)]
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip()), default=-1)
        return messages[: last + 1]

    def _segments(self, messages: Messages, row: Row) -> Segments:
        whole = self._render(messages, False, row)
        segments: list[tuple[str, bool]] = []
        cursor = 0
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and message["content"].strip():
                start, end = self._turn(whole, messages, i, cursor, row)
                segments += [(whole[cursor:start], False), (whole[start:end], True)]
                cursor = end
        return tuple(segment for segment in segments if segment[0])

    def _turn(self, whole: str, messages: Messages, i: int, cursor: int, row: Row) -> tuple[int, int]:
        """Where assistant turn `i` lies in the whole text, in characters; white space after its end is left out."""
        before = self._render(messages[:i], True, row) if i else ""
        through = self._render(messages[: i + 1], False, row)
        content = messages[i]["content"].strip()
        if before and through.startswith(before) and whole.startswith(through) and content in through[len(before) :]:
            return len(before), len(through.rstrip())
        start = whole.find(content, cursor)
        if start < 0:
            raise DataError(
                f"{row.where}, message {i + 1:,}: the tokenizer's chat template does not show this answer as it is, so "
                "that it cannot be learned",
                hint="set data.prompt and data.completion instead of messages, or use another model.tokenizer",
            )
        end = start + len(content)
        eos = self.tokenizer.eos_token
        return start, end + len(eos) if eos and whole.startswith(eos, end) else end

    def _render(self, messages: Messages, open_turn: bool, row: Row) -> str:
        try:
            return render(self.tokenizer, messages, open_turn=open_turn)
        except DataError as error:
            raise DataError(f"{row.where}: {error.message}", hint=error.hint) from error


def _message(item: Any, where: str) -> dict[str, str]:
    if not isinstance(item, dict) or "role" not in item or "content" not in item:
        raise DataError(f"{where}: not an object with role and content", hint='a message is {"role": …, "content": …}')
    role, content = item["role"], item["content"]
    if role not in ROLES:
        near = suggestion(role, ROLES) if isinstance(role, str) else ""
        raise DataError(f"{where}: the role {role!r} is unknown", hint=f"{near}Roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where}: the content is not text", hint="only text is learned; take other parts out")
    return {"role": role, "content": content}


def open_turn(tokenizer: Any, messages: Messages) -> Example:
    """Messages whose answer is still to come, as the chat template puts them.

    Raises:
        DataError: the tokenizer has no chat template, or it refuses the messages.
    """
    prompt = render(tokenizer, messages, open_turn=True)
    answered = render(tokenizer, [*messages, {"role": "assistant", "content": "a"}], open_turn=False)
    space = leading_space(answered[len(prompt) :]) if answered.startswith(prompt) else ""
    return open_example(prompt, space=space, templated=True)


def render(tokenizer: Any, messages: Messages, *, open_turn: bool) -> str:
    """The chat template's text, with `open_turn` up to where the assistant's answer begins.

    Raises:
        DataError: there is no template, or it refuses the messages.
    """
    # A chat template is a program of the tokenizer's author: it may raise anything.
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)
    except Exception as error:
        raise DataError(
            f"the tokenizer's chat template refuses these messages: {error}",
            hint="most templates want user and assistant in turn, after at most one system message",
        ) from error
    return str(text)
