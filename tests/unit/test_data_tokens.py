"""Tokens: labels from where a token lies, special tokens once, cuts and drops counted."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from commonweight.data.chunks import cut
from commonweight.data.formats import Row
from commonweight.data.templates import Example, template_for
from commonweight.data.tokens import Tokens, concatenate, encode, leading_tokens, tokenise
from commonweight.errors import DataError
from commonweight.recipe.schema import DataSpec
from tests.unit.tiny_tokenizers import CHATML, Characters, bpe, ended

TOKENIZERS = {"bpe": bpe(), "untrimmed": bpe(trim=False), "without bos": bpe(bos=False), "slow": Characters()}


def made(*segments: tuple[str, bool], **options: Any) -> Example:
    return Example(segments, **options)


def learned(example: Example, tokenizer: Any, max_tokens: int = 64, end_of_text: bool = True) -> str:
    tokens, kept, _ = tokenise([example], tokenizer, max_tokens=max_tokens, end_of_text=end_of_text)
    return str(tokenizer.decode(tokens.ids_of(0)[tokens.labelled_of(0)])) if kept else ""


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("segments", "text"),
    [
        ([("Answer:", False), (" yes", True)], " yes</s>"),
        ([("Answer: ", False), ("yes", True)], " yes</s>"),
        ([("Answer:\n", False), ("\n yes", True)], "\n yes</s>"),
        ([("Question: ", False), ("no", True), (" Answer:", False), (" maybe", True)], " no maybe</s>"),
    ],
)
def test_every_token_that_overlaps_a_learned_segment_is_learned(name: str, segments: Any, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    expected = text if name != "slow" or not text.startswith(" no") else text[1:]
    assert learned(made(*segments), tokenizer) == expected


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_text_is_tokenised_as_a_whole(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens, _, _ = tokenise([made(("Answer: ", False), ("yes", True))], tokenizer, max_tokens=64, end_of_text=False)
    assert tokens.ids_of(0).tolist() == tokenizer("Answer: yes")["input_ids"]


@pytest.mark.parametrize("segments", [[("é漢🙂", False), ("🙂 é", True)], [("", False), ("漢", True)]])
def test_characters_of_several_tokens(segments: Any) -> None:
    assert learned(made(*segments), bpe(), end_of_text=False) == segments[1][0]


def test_position_0_is_never_a_label() -> None:
    tokens, _, _ = tokenise([made(("a fever", True))], bpe(bos=False), max_tokens=64, end_of_text=False)
    assert not tokens.labelled_of(0)[0]
    assert tokens.labelled_of(0)[1:].all()
    with_bos, _, _ = tokenise([made(("a fever", True))], bpe(), max_tokens=64, end_of_text=False)
    assert with_bos.labelled_of(0).tolist() == [False] + [True] * (len(with_bos.ids) - 1)


def test_bos_is_put_in_front_once() -> None:
    tokens, _, _ = tokenise(
        [made(("<s>", False), ("yes", True)), made(("yes", True))], bpe(), max_tokens=64, end_of_text=False
    )
    assert tokens.ids_of(0).tolist() == tokens.ids_of(1).tolist()
    assert leading_tokens(bpe()) == (0,)
    assert leading_tokens(bpe(bos=False)) == () == leading_tokens(Characters())


def test_chat_text_gets_no_special_tokens_of_the_tokenizer() -> None:
    tokenizer = bpe(chat=CHATML)
    row = Row({"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]}, "a", 1)
    example = template_for(DataSpec(), [row], tokenizer).example(row)
    tokens, _, _ = tokenise([example], tokenizer, max_tokens=64, end_of_text=False)
    assert tokenizer.decode(tokens.ids) == example.text
    assert tokenizer.decode(tokens.ids[tokens.labelled]) == "so<|end|>"
    assert learned(example, tokenizer) == "so<|end|></s>"


@pytest.mark.parametrize("text", ["yes</s>", "yes</s>\n"])
def test_eos_is_not_appended_to_a_text_that_ends_with_it(text: str) -> None:
    assert learned(made(("x", False), (text, True)), bpe()) == text


def test_without_eos_nothing_is_appended() -> None:
    assert learned(made(("x", False), (" yes", True)), bpe(eos=None)) == " yes"


@pytest.mark.parametrize(("end_of_text", "ids"), [(True, [5, 6, 1]), (False, [5, 6])])
def test_an_eos_of_the_post_processor_follows_the_recipe(end_of_text: bool, ids: list[int]) -> None:
    tokens, _, _ = tokenise([made(("a", False), (" b", True))], ended(), max_tokens=8, end_of_text=end_of_text)
    assert tokens.ids.tolist() == ids


def test_cut_and_dropped_are_counted() -> None:
    long = made(("a", False), (" b" * 10, True))
    late = made(("a " * 10, False), ("b", True))
    short = made(("a", False), (" b", True))
    tokens, kept, counts = tokenise([late, long, short], ended(), max_tokens=4, end_of_text=True)
    assert kept == [1, 2]
    assert tokens.lengths.tolist() == [4, 3]
    assert (counts.truncated, counts.dropped) == (1, 1)


def test_nothing_to_predict_is_dropped_and_no_examples_are_fine() -> None:
    tokens, kept, counts = tokenise([made(("a", True))], ended(), max_tokens=4, end_of_text=False)
    assert (len(tokens), kept, counts.dropped) == (0, [], 1)
    assert len(tokenise([], ended(), max_tokens=4, end_of_text=True)[0]) == 0


def test_batches_do_not_change_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [made((f"{i}: ", False), ("yes" * (i % 3 + 1), True)) for i in range(7)] + [made(("no", True))]
    whole, _, _ = tokenise(examples, bpe(), max_tokens=64, end_of_text=True)
    monkeypatch.setattr("commonweight.data.tokens.BATCH", 3)
    parts, _, _ = tokenise(examples, bpe(), max_tokens=64, end_of_text=True)
    assert np.array_equal(whole.ids, parts.ids)
    assert np.array_equal(whole.labelled, parts.labelled)


def test_fast_and_slow_tokenizers_have_no_threads_after_a_fork() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenise([made(("a", True))], ended(), max_tokens=4, end_of_text=True)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_bad_calls() -> None:
    with pytest.raises(DataError, match="max_tokens 1"):
        tokenise([made(("a", True))], ended(), max_tokens=1, end_of_text=True)
    with pytest.raises(DataError, match="the tokenizer fails"):
        tokenise([made(("a\ud800", True))], bpe(), max_tokens=4, end_of_text=True)


def test_types_subset_and_concatenate() -> None:
    tokens = Tokens.of(
        [(np.array([1, 2], np.int32), np.array([False, True])), (np.array([3], np.int32), np.array([True]))]
    )
    assert (tokens.ids.dtype, tokens.labelled.dtype, tokens.bounds.dtype) == (np.int32, np.bool_, np.int64)
    assert (len(tokens), tokens.num_label_tokens, tokens.bounds.tolist()) == (2, 2, [0, 2, 3])
    assert tokens.subset([1, 0, 1]).ids.tolist() == [3, 1, 2, 3]
    assert concatenate([tokens, tokens.subset([1])]).bounds.tolist() == [0, 2, 3, 4]
    empty = concatenate([])
    assert (len(empty), empty.ids.dtype, empty.subset([]).bounds.tolist()) == (0, np.int32, [0])


def stream(*lengths: int) -> list[tuple[Any, Any]]:
    ids = iter(range(100, 100 + sum(lengths)))
    return [(np.array([next(ids) for _ in range(n)], np.int32), np.ones(n, np.bool_)) for n in lengths]


def test_pieces_cover_the_stream_once_and_know_their_row() -> None:
    pieces, rows = cut(stream(3, 4, 2), (), 4)
    assert [pieces.ids_of(i).tolist() for i in range(2)] == [[100, 101, 102, 103], [104, 105, 106, 107]]
    assert [pieces.labelled_of(i).tolist() for i in range(2)] == [[False, True, True, True]] * 2
    assert rows == [0, 1]


def test_pieces_begin_with_the_tokenizers_own_tokens() -> None:
    pieces, rows = cut(stream(3, 4, 2), (7,), 4)
    assert [pieces.ids_of(i).tolist() for i in range(3)] == [[7, 100, 101, 102], [7, 103, 104, 105], [7, 106, 107, 108]]
    assert pieces.num_label_tokens == 9
    assert rows == [0, 1, 1]


def test_a_piece_needs_room_for_text() -> None:
    with pytest.raises(DataError, match="no room"):
        cut(stream(3), (7, 8), 2)
    assert len(cut([], (), 4)[0]) == 0


def test_rows_to_be_joined_have_no_leading_tokens() -> None:
    ((ids, labelled),) = encode([made(("yes", True))], bpe(), end_of_text=True, begin=False)
    assert bpe().decode(ids) == "yes</s>"
    assert labelled.all()
