"""Rows to examples: which text a row gives, and which part of it is learned.

The recipe's own templates come first; without them the fields decide (`LAYOUTS`). A row is passed over, and counted,
when a field that its layout needs is null or missing in it, or when nothing is left to learn (a blank completion).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from commonweight.errors import DataError, RecipeError
from commonweight.recipe.schema import DataSpec

from .formats import Row
from .names import as_text, is_null, known_fields, listed, require_field

Segments = tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Example:
    """One text for the model.

    Args:
        segments: (text, whether it is learned), in order; joined they are the whole text.
        group: the value of `holdout.by`, or None.
        options: answer options of a multiple-choice row, else empty.
        answer: index of the right option, or None.
        templated: the text is a chat template's, which has written its own special tokens.
        reply: with `templated`, the last answer's own text, without what the template puts around it.
    """

    segments: Segments
    group: str | None = None
    options: tuple[str, ...] = ()
    answer: int | None = None
    templated: bool = False
    reply: str | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(text for text, _ in self.segments)

    @property
    def prompt(self) -> str:
        """The text before the last learned segment: what the model is given."""
        return "".join(text for text, _ in self.segments[: self._last_learned()])

    @property
    def completion(self) -> str:
        """What the model should then say: the last learned segment; for a chat, the last answer's own text."""
        return self.reply if self.reply is not None else self.segments[self._last_learned()][0]

    @property
    def option_completions(self) -> tuple[str, ...]:
        """Each option as a completion: with the white space that the learned text begins with."""
        space = leading_space(self.segments[self._last_learned()][0])
        return tuple(space + option for option in self.options)

    def _last_learned(self) -> int:
        return max(i for i, (_, learned) in enumerate(self.segments) if learned)


def leading_space(text: str) -> str:
    """The white space that a text begins with."""
    return text[: len(text) - len(text.lstrip())]


def open_example(prompt: str, *, space: str = "", templated: bool = False) -> Example:
    """A prompt whose answer is still to come, to be tokenised as training would.

    White space at the seam may share a token with the answer's first letter, and that token then belongs to the answer.
    A stand-in letter after the seam shows it.

    Args:
        space: white space that answers begin with.
        templated: as in `Example`.
    """
    if space or prompt[-1:].isspace():
        return Example(((prompt, False), (space + "a", True)), templated=templated)
    return Example(((prompt, False),), templated=templated)


class Template(Protocol):
    """How one row becomes text."""

    kind: str

    def key(self, row: Row) -> str | None:
        """All that the row's text depends on, cheaply: equal keys give equal examples. None: nothing to learn."""

    def example(self, row: Row) -> Example:
        """The row's example. The row's key must not be None."""


class Places:
    """A template with `{field}` places; `{{` and `}}` are literal braces.

    Raises:
        RecipeError: unbalanced braces, or a place that is more than a field's name.
    """

    def __init__(self, template: str, option: str) -> None:
        self.parts: list[tuple[str, str | None]] = []
        try:
            for literal, field, form, conversion in string.Formatter().parse(template):
                if field == "" or form or conversion:
                    raise ValueError("a place is a field's name in braces, nothing else")
                self.parts.append((literal, field))
        except ValueError as error:
            raise RecipeError(
                f"{option}: the template {template!r} cannot be read: {error}",
                hint="write {field} for a field of the data, and {{ or }} for a brace itself",
            ) from error
        self.fields = [field for _, field in self.parts if field is not None]

    def fill(self, fields: dict[str, Any]) -> str | None:
        """The text, or None when a field is null or missing."""
        pieces = []
        for literal, field in self.parts:
            pieces.append(literal)
            if field is not None:
                value = fields.get(field)
                if is_null(value):
                    return None
                pieces.append(as_text(value))
        return "".join(pieces)

    def is_blank(self, fields: dict[str, Any]) -> bool:
        """Whether all of its fields are blank; literal text around them does not count."""
        return bool(self.fields) and all(_reads_blank(fields.get(field)) for field in self.fields)

    def has_blank(self, fields: dict[str, Any]) -> bool:
        """Whether any of its fields is blank."""
        return any(_reads_blank(fields.get(field)) for field in self.fields)


def _reads_blank(value: Any) -> bool:
    return is_null(value) or not as_text(value).strip()


class FieldTemplate:
    """A prompt that is given and a completion that is learned, or only the latter.

    Args:
        kind: name of the layout, for messages.
        spec: for `options` and `answer`.
        pairs: (prompt or None, completion). The first is taken for which the row has all fields; all pairs but the
            last also want no field of the prompt blank.
    """

    def __init__(self, kind: str, spec: DataSpec, pairs: Sequence[tuple[Places | None, Places]]) -> None:
        self.kind = kind
        self.spec = spec
        self.pairs = pairs

    def _segments(self, row: Row) -> Segments | None:
        for prompt, completion in self.pairs:
            if prompt and prompt.has_blank(row.fields) and completion is not self.pairs[-1][1]:
                continue
            before = prompt.fill(row.fields) if prompt else ""
            after = completion.fill(row.fields)
            if before is not None and after is not None and after.strip() and not completion.is_blank(row.fields):
                return ((before, False), (after, True)) if before else ((after, True),)
        return None

    def key(self, row: Row) -> str | None:
        segments = self._segments(row)
        return None if segments is None else "\0".join(text for text, _ in segments)

    def example(self, row: Row) -> Example:
        options, answer = choice(row, self.spec)
        return Example(self._segments(row) or (), options=options, answer=answer)


def choice(row: Row, spec: DataSpec) -> tuple[tuple[str, ...], int | None]:
    """The row's answer options and the right one's index; none where the row has null for either.

    Raises:
        DataError: options that are no list of two or more, or an answer that is not among them.
    """
    options, answer = (row.fields.get(name) if name else None for name in (spec.options, spec.answer))
    if is_null(options) or is_null(answer):
        return (), None
    if not isinstance(options, list | tuple) or len(options) < 2:
        raise DataError(
            f"{row.where}: {spec.options!r} is not a list of two or more options",
            hint="data.options names a field that holds a list of texts",
        )
    index = _right_option(options, answer)
    if index is None:
        raise DataError(
            f"{row.where}: {spec.answer!r} is {answer!r}, which is none of the {len(options)} options",
            hint="data.answer names a field with the right option's index, counted from 0, or its text",
        )
    return tuple(as_text(option) for option in options), index


def _right_option(options: Sequence[Any], answer: Any) -> int | None:
    """An answer that equals an option is that option; any other whole number counts options from 0."""
    for index, option in enumerate(options):
        if (isinstance(answer, str) and answer == as_text(option)) or (
            type(answer) is type(option) and answer == option
        ):
            return index
    digits = "" if isinstance(answer, bool) else str(answer).strip()
    index = int(digits[:9]) if digits.isdecimal() else len(options)
    return index if index < len(options) else None


QUESTION = "Question: {question}\nAnswer:"
TASK = "### Task\n{instruction}\n\n"
MATERIAL = "### Material\n{input}\n\n"
RESPONSE = "### Response\n"

# Fields that must be there, and the (prompt, completion) templates to try in turn.
LAYOUTS: dict[tuple[str, ...], list[tuple[str | None, str]]] = {
    ("prompt", "completion"): [("{prompt}", "{completion}")],
    ("instruction", "output"): [(TASK + MATERIAL + RESPONSE, "{output}"), (TASK + RESPONSE, "{output}")],
    ("question", "answer"): [(QUESTION, " {answer}")],
    ("text",): [(None, "{text}")],
}


def question_example(spec: DataSpec, kind: str | None, question: str) -> Example:
    """A question from outside the data, put as training put a row's prompt.

    Args:
        spec: the recipe's data section.
        kind: `Template.kind` of the data; it decides where the recipe gives no template.

    Raises:
        RecipeError: the recipe's prompt has no place for a question.
    """
    pairs = next((pairs for needed, pairs in LAYOUTS.items() if needed[0] == kind), [(None, "")])
    prompt, completion = pairs[-1]
    if spec.prompt is not None and spec.completion is not None:
        prompt, completion = spec.prompt, spec.completion
    text = question if prompt is None else _with_question(Places(prompt, "data.prompt"), question)
    return open_example(text, space=leading_space(completion))


def _with_question(places: Places, question: str) -> str:
    """The prompt with the question in its last place and the others empty."""
    if not places.fields:
        raise RecipeError("data.prompt has no {field} to put a question in", hint="use --raw")
    return places.fill(dict.fromkeys(places.fields, "") | {places.fields[-1]: question}) or ""


def template_for(spec: DataSpec, rows: Sequence[Row], tokenizer: Any) -> Template:
    """The template that the recipe gives, or that the rows' fields call for.

    Args:
        spec: prompt, completion, messages, text, options, answer.
        rows: the data; a field counts as known when some row has it.
        tokenizer: its chat template serves messages.

    Raises:
        RecipeError: a template that cannot be read or names an unknown field, or no known layout.
        DataError: messages, but the tokenizer has no chat template.
    """
    known = known_fields(rows)
    for option, field in (("data.options", spec.options), ("data.answer", spec.answer)):
        if field:
            require_field(field, known, option)
    given = _given(spec, known)
    if given:
        return given
    if spec.messages or "messages" in known:
        from .chat import ChatTemplate

        require_field(spec.messages or "messages", known, "data.messages")
        return ChatTemplate(spec, spec.messages or "messages", tokenizer)
    return _by_fields(spec, known)


def _given(spec: DataSpec, known: list[str]) -> FieldTemplate | None:
    if spec.text is not None:
        return FieldTemplate("text", spec, [(None, _checked(spec.text, "data.text", known))])
    if spec.prompt is not None and spec.completion is not None:
        prompt = _checked(spec.prompt, "data.prompt", known)
        return FieldTemplate("prompt", spec, [(prompt, _checked(spec.completion, "data.completion", known))])
    return None


def _checked(template: str, option: str, known: list[str]) -> Places:
    places = Places(template, option)
    for field in places.fields:
        require_field(field, known, option)
    return places


def _by_fields(spec: DataSpec, known: list[str]) -> FieldTemplate:
    for needed, layouts in LAYOUTS.items():
        if set(needed) <= set(known):
            pairs = [(Places(p, needed[0]) if p else None, Places(c, needed[-1])) for p, c in layouts]
            return FieldTemplate(needed[0], spec, pairs)
    raise RecipeError(
        f"the fields of {spec.path} do not say what is given and what is learned: {listed(known)}",
        hint="set data.prompt and data.completion (or data.text, data.messages) with {field} places",
    )
