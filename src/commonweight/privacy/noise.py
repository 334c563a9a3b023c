"""Gaussian noise out of a secret key: the same key gives the same noise, and nobody without it can predict a bit.

Element k of a row is a function of the key, the row's number and k alone, so that a row may be made in stretches, in
any order. So noise can be journalled as its key, 32 bytes, before a sum is published: whoever goes on after a crash
adds the very same noise, and two noisy versions of one sum never exist.

Uniform words are ChaCha20's; pairs of them become pairs of normal numbers by Box and Muller's formula in float64. Noise
in floating point is not the real-valued noise of the proofs: the lowest bits of a sum in float32 may tell something
(Mironov, On Significance of the Least Significant Bits for Differential Privacy, CCS 2012), which no accountant counts.
"""

from __future__ import annotations

import hashlib
import secrets
from abc import ABC, abstractmethod

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from torch import Tensor

KEY_BYTES = 32
#: elements made at once; even, and a whole number of ChaCha20's blocks of 64 bytes
_PIECE = 1 << 18
_BLOCK_BYTES = 64
#: elements in a block: 8 bytes each
_PER_BLOCK = _BLOCK_BYTES // 8


def new_key() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


class Noise(ABC):
    """Rows of normal numbers, in stretches."""

    @abstractmethod
    def values(self, number: int, start: int, count: int) -> NDArray[np.float64]:
        """Elements start … start + count − 1 of a row."""

    def add_(self, row: Tensor, sigma: float, *, number: int, start: int = 0) -> Tensor:
        """row ← row + σ·w, in place, w the noise; summed in float64 and rounded once.

        Args:
            row: 1-D, float32 or float64, on the CPU: elements from `start` on of the row of this number.
            sigma: σ, at least 0.
            number: of the row, from 0 to 2³² − 1.
            start: of the stretch.
        """
        done = 0
        while done < len(row):
            # stretches end at the same places whoever makes them: a pair is never cut
            size = min(_PIECE - (start + done) % _PIECE, len(row) - done)
            piece = row[done : done + size]
            noise = torch.from_numpy(self.values(number, start + done, size))
            piece.copy_(piece.double().add_(noise, alpha=sigma))
            done += size
        return row


class GaussianNoise(Noise):
    """Rows of independent standard normal numbers.

    Args:
        key: 32 bytes, of one release only.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a noise key of {len(key)} bytes: it must have {KEY_BYTES}")
        self._key = key

    def values(self, number: int, start: int, count: int) -> NDArray[np.float64]:
        first, last = start // _PER_BLOCK, -(-(start + count) // _PER_BLOCK)
        words = self._words(number, first, (last - first) * _PER_BLOCK).reshape(-1, 2)
        # 53 bits each; the first is never 0, of which there is no logarithm
        radius = np.sqrt(-2 * np.log(((words[:, 0] >> 11) + 1) * 2.0**-53))
        angle = (words[:, 1] >> 11) * (2 * np.pi * 2.0**-53)
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
        skipped = start - first * _PER_BLOCK
        return pairs[skipped : skipped + count]

    def _words(self, number: int, block: int, count: int) -> NDArray[np.uint64]:
        return _words(self._key, number, block, count)


class Coins:
    """Rows of independent coins.

    Args:
        key: 32 bytes, which nothing else is made of.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key of {len(key)} bytes: it must have {KEY_BYTES}")
        self._key = key

    def tossed(self, number: int, count: int, probability: float) -> NDArray[np.bool_]:
        """`count` coins of a row, each True with this probability, to 2⁻⁵³."""
        return (self._row(number, count) >> 11) * 2.0**-53 < probability

    def order(self, number: int, count: int) -> list[int]:
        """The numbers below `count` in an order drawn by a row."""
        return [int(place) for place in np.argsort(self._row(number, count), kind="stable")]

    def _row(self, number: int, count: int) -> NDArray[np.uint64]:
        return _words(self._key, number, 0, -(-count // _PER_BLOCK) * _PER_BLOCK)[:count]


def derived(secret: bytes, purpose: str) -> bytes:
    """32 bytes for one purpose out of a secret of at least 32, by BLAKE2b with a key: who has them learns neither the
    secret nor what it gives for another purpose."""
    if len(secret) < KEY_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes: it must have {KEY_BYTES}")
    return hashlib.blake2b(purpose.encode(), key=secret, digest_size=KEY_BYTES).digest()


def _words(key: bytes, number: int, block: int, count: int) -> NDArray[np.uint64]:
    """64-bit words from a block of a row's stream on."""
    if block + count // _PER_BLOCK > 1 << 32:
        raise ValueError("a row is too long for one stream of noise")
    nonce = block.to_bytes(4, "little") + number.to_bytes(12, "little")
    stream = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(8 * count)), dtype=np.uint64)
