"""Plain text as pieces of one length: a site's rows end to end, cut every `max_tokens` tokens.

Rows are split into training and held-out ones first, so no piece mixes the two. A row is followed by the end-of-text
token (`data.end_of_text`) and by nothing otherwise; a separator is the text template's business. Each piece begins
with the tokenizer's own leading tokens (BOS), inside its length; without such tokens, its first token is context only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from commonweight.errors import DataError

from .tokens import Encoded, Tokens


def text_per_piece(prefix: Sequence[int], max_tokens: int) -> int:
    """Tokens of text in a full piece.

    Raises:
        DataError: the leading tokens leave no room for two tokens in all with one of text.
    """
    if max_tokens < max(2, len(prefix) + 1):
        raise DataError(f"max_tokens {max_tokens} leaves no room for text in a piece", hint="raise training.max_tokens")
    return max_tokens - len(prefix)


def cut(rows: Sequence[Encoded], prefix: Sequence[int], max_tokens: int) -> tuple[Tokens, list[int]]:
    """Join rows and cut them into pieces.

    Args:
        rows: each row's (ids, labelled), without leading tokens.
        prefix: what every piece begins with.
        max_tokens: length of a piece; the last may be shorter, and is left out when it has nothing to predict.

    Returns:
        The pieces, and for each the index of the row in which its text begins.
    """
    length = text_per_piece(prefix, max_tokens)
    stream = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in rows)])
    ends = np.cumsum([len(ids) for ids, _ in rows])
    starts = [start for start in range(0, len(stream), length) if len(stream) - start + len(prefix) > 1]
    pieces = [_piece(stream[start : start + length], prefix) for start in starts]
    return Tokens.of(pieces), np.searchsorted(ends, starts, side="right").tolist()


def _piece(text: NDArray[np.int32], prefix: Sequence[int]) -> Encoded:
    ids = np.concatenate([np.array(prefix, np.int32), text])
    labelled = np.arange(len(ids)) >= max(1, len(prefix))
    return ids, labelled
