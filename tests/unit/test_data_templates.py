"""Templates: which text a row gives, and what of it is learned."""

from __future__ import annotations

from typing import Any

import pytest

from commonweight.data.formats import Row
from commonweight.data.templates import Example, template_for
from commonweight.errors import CommonweightError, DataError, RecipeError
from commonweight.recipe.schema import DataSpec
from tests.unit.tiny_tokenizers import ALTERNATING, CHATML, REWRITING, bpe

USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "hello there"}


def rows(*items: dict[str, Any]) -> list[Row]:
    return [Row(item, "a.jsonl", number, "line") for number, item in enumerate(items, 1)]


def example(fields: dict[str, Any], tokenizer: Any = None, **options: Any) -> Example:
    data = rows(fields)
    template = template_for(DataSpec(**options), data, tokenizer or bpe())
    assert template.key(data[0]) is not None
    return template.example(data[0])


def key(fields: dict[str, Any], known: dict[str, Any] | None = None, **options: Any) -> str | None:
    data = rows(fields, known or {})
    return template_for(DataSpec(**options), data, bpe(chat=CHATML)).key(data[0])


def refused(kind: type[CommonweightError], *items: dict[str, Any], tokenizer: Any = None, **options: Any) -> Any:
    data = rows(*items)

    def build() -> None:
        template = template_for(DataSpec(**options), data, tokenizer or bpe(chat=CHATML))
        for row in data:
            template.key(row)
            template.example(row)

    with pytest.raises(kind) as caught:
        build()
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("fields", "segments"),
    [
        ({"prompt": "2+2=", "completion": "4", "text": "no"}, (("2+2=", False), ("4", True))),
        (
            {"instruction": "Add.", "input": "2 2", "output": "4"},
            (("### Task\nAdd.\n\n### Material\n2 2\n\n### Response\n", False), ("4", True)),
        ),
        ({"instruction": "Say.", "output": "4"}, (("### Task\nSay.\n\n### Response\n", False), ("4", True))),
        (
            {"instruction": "Say.", "input": None, "output": "4"},
            (("### Task\nSay.\n\n### Response\n", False), ("4", True)),
        ),
        ({"question": "why?", "answer": "so"}, (("Question: why?\nAnswer:", False), (" so", True))),
        ({"text": "once", "other": 1}, (("once", True),)),
    ],
)
def test_the_fields_decide(fields: dict[str, Any], segments: Any) -> None:
    assert example(fields).segments == segments


def test_a_blank_alpaca_input_leaves_the_material_out() -> None:
    assert "Material" not in example({"instruction": "Say.", "input": "", "output": "4"}).prompt


def test_messages_come_before_all_other_fields() -> None:
    made = example({"messages": [USER, BOT], "prompt": "p", "completion": "c"}, tokenizer=bpe(chat=CHATML))
    assert made.templated


def test_own_templates_come_first() -> None:
    made = example({"prompt": "p", "completion": "c", "n": 3}, prompt="{{{n}}}", completion="{completion}!")
    assert made.segments == (("{3}", False), ("c!", True))
    assert (made.prompt, made.completion, made.text) == ("{3}", "c!", "{3}c!")
    assert example({"text": "t", "a": "x"}, text="<{a}>").segments == (("<x>", True),)


def test_values_as_text() -> None:
    fields = {"lines": ["a", "b"], "mixed": [1, "ü"], "object": {"k": 1}, "flag": True, "n": 1.5}
    made = example(fields, text="{lines}|{mixed}|{object}|{flag}|{n}")
    assert made.text == 'a\nb|[1, "ü"]|{"k": 1}|True|1.5'


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"question": "why?", "answer": None}, {}),
        ({"question": "why?", "answer": " \n"}, {}),
        ({"question": None, "answer": "so"}, {}),
        ({"question": "why?"}, {}),
        ({"question": "why?", "answer": float("nan")}, {}),
        ({"question": "why?", "answer": ""}, {"prompt": "{question}", "completion": "It is {answer}."}),
        ({"question": "why?", "answer": "x"}, {"prompt": "{question}", "completion": " "}),
        ({"question": "", "answer": ""}, {"text": "{question}-{answer}"}),
    ],
)
def test_rows_without_anything_to_learn_have_no_key(fields: dict[str, Any], options: Any) -> None:
    assert key(fields, {"question": "q", "answer": "a"}, **options) is None


def test_an_empty_prompt_is_only_left_out() -> None:
    assert example({"q": "", "a": "x"}, prompt="{q}", completion="{a}").segments == (("x", True),)


def test_key_tells_rows_apart_by_text_alone() -> None:
    assert key({"question": "q", "answer": "a", "site": 1}) == key({"question": "q", "answer": "a", "site": 2})
    assert key({"prompt": "ab", "completion": "c"}) != key({"prompt": "a", "completion": "bc"})


def test_a_missing_field_names_the_option_and_the_nearest_field() -> None:
    error = refused(RecipeError, {"Question": "q", "answer": "a"}, prompt="{question}", completion="{answer}")
    assert error.message == "data.prompt names the field 'question', which no row has"
    assert error.hint == "did you mean 'Question'? The fields are: Question, answer"


@pytest.mark.parametrize("template", ["{", "}", "{a", "{}", "{a!r}", "{a:>3}"])
def test_a_template_that_cannot_be_read(template: str) -> None:
    error = refused(RecipeError, {"a": "x"}, text=template)
    assert "data.text: the template" in error.message
    assert "{{" in error.hint


def test_no_layout_fits() -> None:
    error = refused(RecipeError, {"chosen": "x", "rejected": "y"})
    assert "chosen, rejected" in error.message
    assert "data.prompt" in error.hint


def test_chat_learns_every_answer_with_its_end() -> None:
    system = {"role": "system", "content": "be brief"}
    made = example({"messages": [system, USER, BOT, USER, BOT, USER]}, tokenizer=bpe(chat=CHATML))
    learned = [text for text, flag in made.segments if flag]
    assert learned == ["hello there<|end|>", "hello there<|end|>"]
    assert made.text == (
        "<|turn|>system\nbe brief<|end|>\n<|turn|>user\nhi<|end|>\n<|turn|>assistant\nhello there<|end|>\n"
        "<|turn|>user\nhi<|end|>\n<|turn|>assistant\nhello there<|end|>"
    )
    assert made.completion == "hello there"
    assert made.prompt.endswith("<|turn|>assistant\n")


def test_chat_that_the_assistant_opens() -> None:
    made = example({"messages": [BOT, USER, BOT]}, tokenizer=bpe(chat=CHATML))
    assert sum(flag for _, flag in made.segments) == 2


def test_chat_template_that_rewrites_earlier_turns() -> None:
    one, two = {"role": "assistant", "content": "oh yes"}, {"role": "assistant", "content": "no way"}
    made = example({"messages": [one]}, tokenizer=bpe(chat=REWRITING))
    assert made.segments == (("<s>assistant: ", False), ("oh yes</s>", True))
    error = refused(DataError, {"messages": [USER, one, USER, two]}, tokenizer=bpe(chat=REWRITING))
    assert "a.jsonl, line 1, message 2" in error.message


def test_chat_template_without_a_generation_prompt_learns_the_role_too() -> None:
    made = example({"messages": [USER, BOT]}, tokenizer=bpe(chat=REWRITING))
    assert made.segments == (("<s>user: hi</s>", False), ("assistant: hello there</s>", True))


def test_messages_in_a_field_of_another_name() -> None:
    made = example({"talk": [USER, BOT]}, tokenizer=bpe(chat=CHATML), messages="talk")
    assert made.completion == "hello there"


@pytest.mark.parametrize("messages", [None, [], [USER], [USER, {"role": "assistant", "content": " "}]])
def test_chat_without_an_answer_has_no_key(messages: Any) -> None:
    assert key({"messages": messages}) is None


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hi", "is not a list of messages"),
        ({"role": "user"}, "is not a list of messages"),
        (["hi"], "message 1: not an object with role and content"),
        ([{"from": "human", "value": "hi"}], "message 1: not an object"),
        ([USER, {"role": "asistant", "content": "x"}], "message 2: the role 'asistant' is unknown"),
        ([{"role": 3, "content": "x"}], "the role 3 is unknown"),
        ([{"role": "user", "content": [{"type": "image"}]}, BOT], "message 1: the content is not text"),
    ],
)
def test_wrong_messages_are_named(messages: Any, words: str) -> None:
    error = refused(DataError, {"messages": messages})
    assert words in error.message
    assert error.message.startswith("a.jsonl, line 1")


def test_a_near_role_is_suggested() -> None:
    assert "'assistant'" in refused(DataError, {"messages": [{"role": "asistant", "content": "x"}]}).hint


def test_a_template_that_refuses_the_messages() -> None:
    error = refused(DataError, {"messages": [USER, USER, BOT]}, tokenizer=bpe(chat=ALTERNATING))
    assert "roles must alternate" in error.message


def test_no_chat_template() -> None:
    assert "has no chat template" in refused(DataError, {"messages": [USER, BOT]}, tokenizer=bpe()).message


def test_messages_field_that_no_row_has() -> None:
    assert "data.messages" in refused(RecipeError, {"talk": []}, messages="talks").message


CHOICE = {"prompt": "{q}", "completion": " {a}", "options": "o", "answer": "r"}


@pytest.mark.parametrize(
    ("options", "answer", "index"),
    [
        (["yes", "no"], 1, 1),
        (["yes", "no"], "yes", 0),
        (["yes", "no"], "1", 1),
        ([10, 20, 1], "1", 2),
        ([10, 20, 30], 20, 1),
        ([3, 1, 2], 1, 1),
        ([True, False], False, 1),
        (["yes", "no"], 0, 0),
    ],
)
def test_the_right_option_by_index_or_text(options: Any, answer: Any, index: int) -> None:
    fields = {"q": "q", "a": "a", "o": options, "r": answer}
    made = example(fields, **CHOICE)
    assert made.answer == index
    assert made.options == tuple(str(option) for option in options)
    assert made.option_completions == tuple(f" {option}" for option in options)


@pytest.mark.parametrize(("options", "answer"), [(None, 1), (["yes", "no"], None)])
def test_a_row_without_options_or_answer_is_no_multiple_choice(options: Any, answer: Any) -> None:
    made = example({"q": "q", "a": "a", "o": options, "r": answer}, **CHOICE)
    assert (made.options, made.answer) == ((), None)


@pytest.mark.parametrize(
    ("options", "answer", "words"),
    [
        ("yes,no", 0, "is not a list"),
        (["yes"], 0, "two or more"),
        (["yes", "no"], 2, "none of the 2 options"),
        (["yes", "no"], -1, "none of the 2 options"),
        (["yes", "no"], "maybe", "'maybe'"),
        (["yes", "no"], True, "True"),
    ],
)
def test_wrong_options_are_named(options: Any, answer: Any, words: str) -> None:
    error = refused(DataError, {"q": "q", "a": "a", "o": options, "r": answer}, **CHOICE)
    assert words in error.message
    assert "a.jsonl, line 1" in error.message


def test_options_field_that_no_row_has() -> None:
    assert "data.options" in refused(RecipeError, {"q": "q", "a": "a", "r": 0}, **CHOICE).message
