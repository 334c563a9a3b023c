"""Masks: long pseudo-random rows of 32-bit integers, expanded from keys of 32 bytes and added modulo 2³².

Two sites expand the same key and one of them subtracts: the sum of both does not know the mask. Expansion is AES-128 in
counter mode, written by `update_into` into one reused buffer of 1 MiB: no mask is ever held whole.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

Ring = NDArray[np.uint32]

_PIECE_BYTES = 1 << 20
_ZEROS = bytes(_PIECE_BYTES)
#: elements in a block of the cipher
_BLOCK_ELEMENTS = 4


class Expander:
    """Adds masks to rows; holds the buffer that they are expanded into."""

    def __init__(self) -> None:
        # a block cipher's `update_into` asks for one block less one byte of room behind what it writes
        self._buffer = np.empty(_PIECE_BYTES + 16, dtype=np.uint8)
        self._into = memoryview(self._buffer)  # type: ignore[arg-type]  # an array is a buffer
        self._words: Ring = self._buffer[:_PIECE_BYTES].view(np.uint32)

    def add(self, row: Ring, key: bytes, *, sign: int = 1, first: int = 0) -> None:
        """row ← row ± PRG(key) mod 2³², in place.

        Args:
            row: 1-D, uint32, contiguous.
            key: 16 bytes, never used for another mask.
            sign: 1 or −1.
            first: where `row` begins, if it is a stretch of a longer one: the mask is as random in any order.
        """
        block, skipped = divmod(first, _BLOCK_ELEMENTS)
        encryptor = Cipher(algorithms.AES(key), modes.CTR(block.to_bytes(16, "big"))).encryptor()
        encryptor.update(bytes(4 * skipped))
        change = np.add if sign > 0 else np.subtract
        step = _PIECE_BYTES // 4
        for start in range(0, len(row), step):
            piece = row[start : start + step]
            encryptor.update_into(_ZEROS, self._into)
            change(piece, self._words[: len(piece)], out=piece)


def own_key(seed: bytes, context: bytes) -> bytes:
    """The key of a site's own mask, from its 32-byte seed b."""
    return _derived(seed, b"own mask\n" + context)


def pair_key(mine: X25519PrivateKey, theirs: bytes, context: bytes) -> bytes:
    """The key of the mask that two sites share: the same from either side.

    Raises:
        ValueError: `theirs` is no X25519 public key, or one that gives no secret.
    """
    secret = mine.exchange(X25519PublicKey.from_public_bytes(theirs))
    return _derived(secret, b"pair mask\n" + context)


def channel_key(mine: X25519PrivateKey, theirs: bytes, context: bytes) -> bytes:
    """The key under which two sites seal shares for each other, 32 bytes.

    Raises:
        ValueError: as `pair_key`.
    """
    secret = mine.exchange(X25519PublicKey.from_public_bytes(theirs))
    return _derived(secret, b"channel\n" + context, length=32)


def _derived(secret: bytes, info: bytes, *, length: int = 16) -> bytes:
    return HKDF(SHA256(), length, None, b"commonweight secure aggregation 1\n" + info).derive(secret)
