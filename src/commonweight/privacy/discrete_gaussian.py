"""Whole numbers as noise: the discrete Gaussian, out of a secret key.

    P(k) ∝ exp(−k²/2σ²), k any whole number, σ a power of two

(Canonne, Kamath and Steinke, The Discrete Gaussian for Differential Privacy, NeurIPS 2020, arXiv:2004.00010). Drawn by
rejection (Karney, Sampling Exactly from the Normal Distribution, TOMS 2016, arXiv:1303.6257, algorithm D): |k| = iσ + j
with i ∝ exp(−i²/2) and j uniform from 0 to σ − 1, kept with probability exp(−x(2i + x)/2) for x = j/σ, because

    (iσ + j)²/2σ² = i²/2 + x(2i + x)/2

and a sign, where −0 is drawn again. σ is a power of two so that j is simply some bits of a random word and x is exact.
All else are coins against 64 random bits. So every outcome's probability is right to a relative 10⁻¹³, the tails
included, up to 14σ, beyond which less than 10⁻⁴² lies: a release of d numbers has its ε off by 2d·10⁻¹³ at most.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from .noise import KEY_BYTES

#: numbers made of one stream of random words, and at once
PIECE = 1 << 16
_WEIGHTS = np.exp(-(np.arange(15) ** 2) / 2)[::-1].cumsum()[::-1]
#: P(i > n | i ≥ n), for n = 0 … 13
_MORE = tuple(float(more) for more in _WEIGHTS[1:] / _WEIGHTS[:-1])
#: of so many that are drawn one is kept, on average 1/0.715; with some to spare, since two turns cost more than one
_TRIES = 1.42
_TWO_64 = 2.0**64


class Words:
    """Random words of 64 bits, ChaCha20's, one after the other.

    Args:
        key: 32 bytes.
        number: of the stream, which nothing else is made of.
    """

    def __init__(self, key: bytes, number: int) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a noise key of {len(key)} bytes: it must have {KEY_BYTES}")
        nonce = bytes(4) + number.to_bytes(12, "little")
        self._stream = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()

    def take(self, count: int) -> NDArray[np.uint64]:
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)

    def below(self, probability: NDArray[np.float64] | float, count: int) -> NDArray[np.bool_]:
        """Coins, each True with its probability: to a relative 10⁻¹³, down to 10⁻⁶."""
        coins: NDArray[np.bool_] = self.take(count).astype(np.float64) < probability * _TWO_64
        return coins


class DiscreteGaussian:
    """A row of independent numbers.

    Args:
        key: 32 bytes, of one row only.
        bits: σ = 2^bits, at most 2³¹.
    """

    def __init__(self, key: bytes, bits: int) -> None:
        if not 0 <= bits <= 31:
            raise ValueError(f"σ = 2^{bits}: it must be from 1 to 2^31")
        self._key, self.bits = key, bits

    def add_(self, row: NDArray[np.uint32]) -> None:
        """row ← row + noise mod 2³², in place: the whole row."""
        for number, start in enumerate(range(0, len(row), PIECE)):
            piece = row[start : start + PIECE]
            piece += self._piece(number, len(piece)).astype(np.uint32)

    def values(self, count: int) -> NDArray[np.int64]:
        """The first numbers of the row."""
        pieces = [self._piece(number, min(PIECE, count - start)) for number, start in enumerate(range(0, count, PIECE))]
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)

    def _piece(self, number: int, count: int) -> NDArray[np.int64]:
        words, found = Words(self._key, number), np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            kept = self._kept(words, int(_TRIES * (count - done)) + 16)[: count - done]
            found[done : done + len(kept)] = kept
            done += len(kept)
        return found

    def _kept(self, words: Words, tries: int) -> NDArray[np.int64]:
        """Of so many tries those that are kept."""
        drawn = words.take(tries)
        j = (drawn & np.uint64((1 << self.bits) - 1)).astype(np.int64)
        i = np.zeros(tries, dtype=np.int64)
        still = np.flatnonzero(words.below(_MORE[0], tries))
        for more in _MORE[1:]:
            i[still] += 1
            still = still[words.below(more, len(still))]
            if not len(still):
                break
        x = j * 2.0**-self.bits
        places = np.flatnonzero(words.below(np.exp(x * (x + 2 * i) / -2), tries))
        size = (i[places] << self.bits) + j[places]
        sign = 1 - 2 * (drawn[places] >> np.uint64(63)).astype(np.int64)
        kept: NDArray[np.int64] = (size * sign)[(size > 0) | (sign > 0)]
        return kept
