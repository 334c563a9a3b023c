"""Sums of encrypted rows: CKKS by TenSEAL, in place of masks (Cheon, Kim, Kim and Song, ASIACRYPT 2017).

    every site       encrypts its row (`secure_aggregation/rows.py`) under one secret key, which all sites share
    the coordinator  adds ciphertexts; it has no key that opens them
    one site         decrypts the total, rounds it to whole numbers and hands that to the coordinator

CKKS computes with approximations: what is decrypted is off by a little noise, which depends on the secret key, and who
sees it beside the ciphertext can work the key out (Li and Micciancio, EUROCRYPT 2021). So what is encrypted here are
whole numbers whose sum stays below 2³¹ (`fixed_point.py`), and what leaves the site that decrypts is rounded: no noise
is left on it, and the sum is exact. It has the very bits of a sum under masks.

Parameters, ours: N = 4096 coefficients, moduli of 60 and 49 bits, the most that 128-bit security allows at this N
(Homomorphic Encryption Standard, 2018); a scale of 2²⁶, so that sums of 2³¹ times that lie below the first modulus.
Measured, the sum of ten rows of the largest size is off by 2e-5, where half a whole number would be too much. A
ciphertext holds 2048 elements in 65.7 kB: 32 bytes an element, where a masked one has 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RecipeError, RoundError
from .secure_aggregation.masks import Ring

_DEGREE, _MODULI_BITS, _SCALE = 4096, (60, 49), 2.0**26
#: elements in a ciphertext
SLOTS = _DEGREE // 2
#: of one, as TenSEAL writes it; one with less than 128 elements may have a byte less
_CIPHERTEXT_BYTES = 65_676
#: how far from a whole number a decrypted one may be; beyond, it is no sum of rows under this key
_SURE = 0.25


def tenseal() -> Any:
    """The package.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import tenseal
    except ImportError as error:
        raise RecipeError(
            "privacy.secure_aggregation homomorphic needs the package tenseal",
            hint="pip install 'commonweight[homomorphic]'; or set it to on: masks need no package, an eighth of the "
            "bytes, and less time",
        ) from error
    return tenseal


def num_bytes(length: int) -> int:
    """What a site sends of a row of so many elements."""
    return -(-length // SLOTS) * _CIPHERTEXT_BYTES


def _context() -> Any:
    """Parameters, and a fresh secret key."""
    package = tenseal()
    context = package.context(
        package.SCHEME_TYPE.CKKS,
        _DEGREE,
        coeff_mod_bit_sizes=list(_MODULI_BITS),
        encryption_type=package.ENCRYPTION_TYPE.SYMMETRIC,
    )
    context.global_scale = _SCALE
    return context


class Keyholder:
    """A site that has the sites' secret key.

    Args:
        secret: as `secret` of another gives it; None: a fresh key.
    """

    def __init__(self, secret: bytes | None = None) -> None:
        self._context = _context() if secret is None else tenseal().context_from(secret)

    def secret(self) -> bytes:
        """The key, for the other sites and nobody else."""
        found: bytes = self._context.serialize(
            save_public_key=False, save_secret_key=True, save_galois_keys=False, save_relin_keys=False
        )
        return found

    def encrypt(self, row: Ring) -> list[bytes]:
        """A row's ciphertexts, `SLOTS` elements in each."""
        values = row.view(np.int32).astype(np.float64)
        pieces = (values[start : start + SLOTS].tolist() for start in range(0, len(values), SLOTS))
        return [tenseal().ckks_vector(self._context, piece).serialize() for piece in pieces]

    def decrypt(self, total: Sequence[bytes]) -> Ring:
        """The sum of rows, rounded.

        Raises:
            RoundError: it was not made of ciphertexts under this key, or of numbers that are too large.
        """
        pieces = [tenseal().ckks_vector_from(self._context, one).decrypt() for one in total]
        values: NDArray[np.float64] = np.concatenate([np.asarray(piece) for piece in pieces])
        whole = np.rint(values)
        if not (np.abs(values - whole) < _SURE).all() or not (np.abs(whole) < 2.0**31).all():
            raise RoundError(
                "what was decrypted is no sum of whole numbers: a ciphertext is not under the sites' key, or damaged",
                hint="the last committed round is untouched",
            )
        return whole.astype(np.int64).astype(np.uint32)


class Adder:
    """The coordinator: it adds up what it cannot open.

    Its context has the same parameters, and a key of its own that nothing was encrypted under.
    """

    def __init__(self) -> None:
        self._context = _context()
        self._sums: list[Any] = []

    def add(self, row: Sequence[bytes]) -> None:
        """Raises ValueError: a row of another length."""
        vectors = [tenseal().ckks_vector_from(self._context, one) for one in row]
        if not self._sums:
            self._sums = vectors
            return
        for total, vector in zip(self._sums, vectors, strict=True):
            total += vector

    def total(self) -> list[bytes]:
        """What goes to the site that decrypts."""
        return [one.serialize() for one in self._sums]
