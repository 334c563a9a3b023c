"""Fewer numbers: some of them, and which."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .stage import BadPayload, Draw, Matrices, Shortening

Index = NDArray[np.int64]


class KeepOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: float = Field(0.05, gt=0, lt=1, description="The share of the numbers that are sent.")


class _Sparse(Shortening):
    Options = KeepOptions
    options: KeepOptions

    def count(self, matrices: Matrices) -> int:
        return kept(_numel(matrices), self.options.keep)

    def restore(self, which: bytes, kept: Tensor, matrices: Matrices, draw: Draw) -> Tensor:
        numel = _numel(matrices)
        values = torch.zeros(numel)
        values[torch.from_numpy(self._index(which, len(kept), numel, draw))] = kept
        return values

    @abstractmethod
    def _index(self, which: bytes, count: int, numel: int, draw: Draw) -> Index: ...


class TopK(_Sparse):
    """The largest numbers. Wrong in the mean, so it needs error feedback."""

    name, rule = "top-k", "the ⌈keep·n⌉ numbers of largest size; 0 for the others"
    source = "Stich et al., Sparsified SGD with Memory, NeurIPS 2018"

    def shorten(self, values: Tensor, matrices: Matrices, draw: Draw, *, unbiased: bool) -> tuple[bytes, Tensor]:
        size = self.count(matrices)
        index = torch.topk(values.abs(), size, sorted=False).indices.sort().values
        return gaps(index.numpy()), values[index]

    def most(self, matrices: Matrices) -> int:
        numel = _numel(matrices)
        return kept(numel, self.options.keep) + numel // _ESCAPE

    def _index(self, which: bytes, count: int, numel: int, draw: Draw) -> Index:
        return from_gaps(which, count, numel)


class RandomK(_Sparse):
    """Numbers drawn without regard to what they are. Both ends draw the same ones, so that they need not be told."""

    name, rule = "random-k", "⌈keep·n⌉ numbers, drawn alike at both ends; times 1/keep without error feedback: E = x"
    source = "Konečný et al., 2016; Stich et al., NeurIPS 2018"

    def shorten(self, values: Tensor, matrices: Matrices, draw: Draw, *, unbiased: bool) -> tuple[bytes, Tensor]:
        size = self.count(matrices)
        found = values[torch.from_numpy(self._index(b"", size, len(values), draw))]
        if unbiased and size:
            found = (found.double() * (len(values) / size)).clamp(-_MOST, _MOST).float()
        return b"", found

    def most(self, matrices: Matrices) -> int:
        return 0

    def places(self, matrices: Matrices, draw: Draw) -> Index:
        """Of the numbers of a span that are sent, in rising order."""
        return self._index(b"", self.count(matrices), _numel(matrices), draw)

    def _index(self, which: bytes, count: int, numel: int, draw: Draw) -> Index:
        if which:
            raise BadPayload("places of numbers that both ends draw")
        return drawn(count, numel, draw.value("which"))


_MOST = torch.finfo(torch.float32).max
#: a gap is written as so many bytes 255 and a last one that is less
_ESCAPE = 255


def kept(numel: int, keep: float) -> int:
    """At least one, of any."""
    return min(numel, max(1, -int(-keep * numel // 1)))


def gaps(index: Index) -> bytes:
    """Places in rising order, as the distances between them: a byte each where they are dense, for an entropy coder to
    shorten."""
    distances = np.diff(index, prepend=-1) - 1
    longer, last = np.divmod(distances, _ESCAPE)
    written = np.full(len(index) + int(longer.sum()), _ESCAPE, dtype=np.uint8)
    written[np.cumsum(longer + 1) - 1] = last
    return written.tobytes()


def from_gaps(raw: bytes, count: int, numel: int) -> Index:
    """The places that `gaps` wrote.

    Raises:
        BadPayload: they are not `count` places below `numel`.
    """
    written = np.frombuffer(raw, dtype=np.uint8)
    ends = np.flatnonzero(written != _ESCAPE)
    if len(ends) != count or (len(written) and written[-1] == _ESCAPE):
        raise BadPayload(f"{len(ends)} places of numbers, {count} are needed")
    index = np.cumsum(written, dtype=np.int64)[ends] + np.arange(count)
    if count and index[-1] >= numel:
        raise BadPayload(f"a place {index[-1]} among {numel} numbers")
    return index


def drawn(count: int, numel: int, seed: int) -> Index:
    """`count` of `numel` places in rising order, every choice as likely: those of the smallest of `numel` words of a
    keystream, so that they depend on nothing but the seed; of equal words, of which there are few, the first."""
    if not 0 < count < numel:
        return np.arange(count)
    key = seed.to_bytes(16, "little")
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * numel))
    words = np.frombuffer(stream, dtype=np.uint32)
    border = np.partition(words, count - 1)[count - 1]
    below = np.flatnonzero(words < border)
    # of words that are equal, the first
    return np.sort(np.concatenate([below, np.flatnonzero(words == border)[: count - len(below)]]))


def _numel(matrices: Matrices) -> int:
    return sum(rows * columns for rows, columns in matrices)
