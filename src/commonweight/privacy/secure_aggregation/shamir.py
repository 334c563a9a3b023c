"""Shamir's secret sharing of 32-byte secrets over a prime field (Shamir, How to Share a Secret, CACM 1979).

A polynomial of degree t − 1 with the secret at 0 and uniform coefficients; share x is its value at x ∈ {1, 2, …}. Any t
shares give the secret; t − 1 are, for every secret, equally likely: they say nothing of it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

#: the smallest prime above 2²⁵⁶, so that every 32-byte string is an element
PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, places: Sequence[int]) -> dict[int, bytes]:
    """Shares of a secret, 33 bytes each, by place.

    Args:
        secret: 32 bytes.
        threshold: t, how many shares give the secret back.
        places: x of each share, all different and at least 1.

    Raises:
        ValueError: the secret has another length, the threshold cannot be met, or places are not as they must be.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes: it must have {SECRET_BYTES}")
    if not 1 <= threshold <= len(places):
        raise ValueError(f"a threshold of {threshold} among {len(places)} shares")
    if len(set(places)) != len(places) or min(places) < 1:
        raise ValueError("the places of shares must be different and at least 1")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {x: _value(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in places}


def _value(coefficients: Sequence[int], x: int) -> int:
    """The polynomial at x, by Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def weights_at_zero(places: Sequence[int]) -> list[int]:
    """Lagrange's weights: the value at 0 is Σ weight·share, for shares at these places."""
    weights = []
    for x in places:
        over, under = 1, 1
        for other in places:
            if other != x:
                over = over * other % PRIME
                under = under * (other - x) % PRIME
        weights.append(over * pow(under, -1, PRIME) % PRIME)
    return weights


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from at least `threshold` shares by place; the first ones by place are used.

    A share that is not the one handed out gives another secret, and nothing here can tell: what is reconstructed is to
    be compared with what is known of it.

    Raises:
        ValueError: there are too few shares, or what they give is no 32-byte secret.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares, {threshold} are needed")
    places = sorted(shares)[:threshold]
    total = sum(
        weight * int.from_bytes(shares[x], "big") for x, weight in zip(places, weights_at_zero(places), strict=True)
    )
    secret = total % PRIME
    if secret >= 1 << (8 * SECRET_BYTES):
        raise ValueError("the shares do not belong together")
    return secret.to_bytes(SECRET_BYTES, "big")
