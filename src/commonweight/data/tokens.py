"""Examples to token arrays.

An example's whole text is tokenised at once, as the model will see it, and the labels follow from where each token
lies in the text: a token is learned when any of its characters is in a learned segment. So a token that straddles the
end of the prompt is learned (" yes" after "Answer: " + "yes"), and all of a completion is. Position 0 is never a
label: nothing comes before it that could predict it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commonweight.errors import DataError

from .templates import Example

BATCH = 512

Ids = NDArray[np.int32]
Flags = NDArray[np.bool_]
Encoded = tuple[Ids, Flags]


@dataclass(frozen=True, eq=False)
class Tokens:
    """N examples of T tokens together, end to end.

    Args:
        ids: token ids, int32 [T].
        labelled: whether the token is to be predicted from those before it in its example, bool [T].
        bounds: example i is [bounds[i], bounds[i + 1]), int64 [N + 1], from 0 to T.
    """

    ids: Ids
    labelled: Flags
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def ids_of(self, i: int) -> Ids:
        """Token ids of example i, a view."""
        return self.ids[self.bounds[i] : self.bounds[i + 1]]

    def labelled_of(self, i: int) -> Flags:
        """Label flags of example i, a view."""
        return self.labelled[self.bounds[i] : self.bounds[i + 1]]

    def prompt_of(self, i: int) -> Ids:
        """Token ids of example i before its last run of labels, a view: what the model is given to answer."""
        return prompt_ids((self.ids_of(i), self.labelled_of(i)))

    def answer_of(self, i: int) -> Ids:
        """Token ids of example i's last run of labels, a view."""
        start, stop = _last_run(self.labelled_of(i))
        return self.ids_of(i)[start:stop]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, [N]."""
        return np.diff(self.bounds)

    @property
    def num_label_tokens(self) -> int:
        """Label tokens of all examples."""
        return int(self.labelled.sum())

    @classmethod
    def of(cls, examples: Sequence[Encoded]) -> Tokens:
        """From (ids, labelled) pairs, one an example."""
        bounds = np.zeros(len(examples) + 1, np.int64)
        np.cumsum([len(ids) for ids, _ in examples], out=bounds[1:])
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in examples)])
        labelled = np.concatenate([np.zeros(0, np.bool_), *(flags for _, flags in examples)])
        return cls(ids, labelled, bounds)

    def subset(self, indices: Sequence[int]) -> Tokens:
        """The examples at `indices`, in that order; an index may come twice."""
        return Tokens.of([(self.ids_of(i), self.labelled_of(i)) for i in indices])


def prompt_ids(encoded: Encoded) -> Ids:
    """The ids before an example's last run of labels; all of them if nothing is labelled."""
    ids, labelled = encoded
    return ids[: _last_run(labelled)[0]]


def _last_run(labelled: Flags) -> tuple[int, int]:
    """[start, stop) of the last run of True, or both the length if there is none."""
    found = np.flatnonzero(labelled)
    if not len(found):
        return len(labelled), len(labelled)
    gaps = np.flatnonzero(np.diff(found) > 1)
    return int(found[gaps[-1] + 1] if len(gaps) else found[0]), int(found[-1]) + 1


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """The examples of several `Tokens`, one after another."""
    return Tokens.of([(part.ids_of(i), part.labelled_of(i)) for part in parts for i in range(len(part))])


@dataclass(frozen=True)
class TokenCounts:
    """How many examples were cut at `max_tokens`, and how many dropped as nothing learned was left of them."""

    truncated: int = 0
    dropped: int = 0


def tokenise(
    examples: Sequence[Example], tokenizer: Any, *, max_tokens: int, end_of_text: bool
) -> tuple[Tokens, list[int], TokenCounts]:
    """Tokenise examples and cut them on the right at `max_tokens`.

    Special tokens that the tokenizer puts in front of a text (BOS) are added, but not to a chat template's text, nor
    where the text begins with them. Those it puts at the end are not: `end_of_text` decides.

    Args:
        examples: texts with their learned parts.
        tokenizer: a transformers tokenizer; a slow one is served by tokenising prefixes of the text.
        max_tokens: bound on an example's tokens, special ones included.
        end_of_text: append the tokenizer's EOS, learned, unless the text ends with it or the tokenizer has none.

    Returns:
        The tokens; the indices of the examples that they are of, ascending (one with no label within `max_tokens` is
        dropped); and the counts.

    Raises:
        DataError: the tokenizer fails on a text, or `max_tokens` is below 2.
    """
    if max_tokens < 2:
        raise DataError(
            f"max_tokens {max_tokens} leaves nothing to predict", hint="set training.max_tokens to at least 2"
        )
    encoded = list(encode(examples, tokenizer, end_of_text=end_of_text))
    cut = [(ids[:max_tokens], labelled[:max_tokens]) for ids, labelled in encoded]
    kept = [i for i, (_, labelled) in enumerate(cut) if labelled.any()]
    truncated = sum(len(encoded[i][0]) > max_tokens for i in kept)
    return Tokens.of([cut[i] for i in kept]), kept, TokenCounts(truncated, len(examples) - len(kept))


def encode(examples: Sequence[Example], tokenizer: Any, *, end_of_text: bool, begin: bool = True) -> Iterator[Encoded]:
    """Each example's (ids [T], labelled [T]), uncut.

    Args:
        begin: put the tokenizer's own leading special tokens in front and clear position 0's label; False for texts
            that are to be joined.
    """
    # Workers are forked later: the tokenizer's own threads would not survive that.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    prefix = leading_tokens(tokenizer) if begin else ()
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        for example, (ids, labelled) in zip(batch, _bodies(batch, tokenizer), strict=True):
            ids, labelled = _with_end(example, ids, labelled, tokenizer) if end_of_text else (ids, labelled)
            if prefix and not example.templated and tuple(ids[: len(prefix)].tolist()) != prefix:
                ids = np.concatenate([np.array(prefix, np.int32), ids])
                labelled = np.concatenate([np.zeros(len(prefix), np.bool_), labelled])
            if begin:
                labelled[:1] = False
            yield ids, labelled


def leading_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts in front of a text by default: its BOS, or none."""
    body = _ids(tokenizer, ["a"])[0]
    whole = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    for start in range(len(whole) - len(body) + 1):
        if whole[start : start + len(body)] == body:
            return tuple(whole[:start])
    return ()


def _ids(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    try:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)
    except Exception as error:  # a tokenizer raises whatever its Rust or Python side raises
        raise DataError(
            f"the tokenizer fails on a text that begins {texts[0][:60]!r}: {error}",
            hint="check that model.tokenizer fits the data, and that the text is valid",
        ) from error
    return encoded if options else encoded["input_ids"]


def _bodies(batch: Sequence[Example], tokenizer: Any) -> Iterator[Encoded]:
    texts = [example.text for example in batch]
    if not getattr(tokenizer, "is_fast", False):
        for example, ids in zip(batch, _ids(tokenizer, texts), strict=True):
            yield np.array(ids, np.int32), _labels_by_prefix(example, ids, tokenizer)
    elif all(len(example.segments) == 1 for example in batch):
        for example, ids in zip(batch, _ids(tokenizer, texts), strict=True):
            yield np.array(ids, np.int32), np.full(len(ids), example.segments[0][1])
    else:
        encoded = _ids(tokenizer, texts, return_offsets_mapping=True)
        for example, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield np.array(ids, np.int32), _labels_by_offset(example, offsets)


def _labels_by_offset(example: Example, offsets: list[tuple[int, int]]) -> Flags:
    """Whether each token overlaps a learned character. A token without width stands for the character before it."""
    lengths = [len(text) for text, _ in example.segments]
    learned = np.repeat([flag for _, flag in example.segments], lengths)
    before = np.concatenate([[0], np.cumsum(learned)])
    spans = np.array(offsets, np.int64).reshape(-1, 2)
    end = np.minimum(np.maximum(spans[:, 1], 1), len(learned))
    start = np.minimum(spans[:, 0], end - 1)
    flags: Flags = before[end] > before[start]
    return flags


def _labels_by_prefix(example: Example, ids: list[int], tokenizer: Any) -> Flags:
    """The same without offsets: a segment's tokens begin where the text before it stops tokenising alike."""
    labelled = np.zeros(len(ids), np.bool_)
    text = ""
    for segment, learned in example.segments:
        first, _ = _shared(text, ids, tokenizer)
        text += segment
        shared, whole = _shared(text, ids, tokenizer)
        if learned:
            labelled[first : shared if whole else shared + 1] = True
    return labelled


def _shared(prefix: str, ids: list[int], tokenizer: Any) -> tuple[int, bool]:
    """How many tokens the prefix alone has in common with the whole text, and whether these are all of its own."""
    alone = _ids(tokenizer, [prefix])[0] if prefix else []
    shared = next((k for k, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids)))
    return shared, shared == len(alone)


def _with_end(example: Example, ids: Ids, labelled: Flags, tokenizer: Any) -> Encoded:
    eos = tokenizer.eos_token_id
    if eos is None or example.text.rstrip().endswith(tokenizer.eos_token):
        return ids, labelled
    return np.append(ids, np.int32(eos)), np.append(labelled, True)
