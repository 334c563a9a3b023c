"""Random choices without state: every one is drawn from (the recipe's seed, what it is for).

Nothing needs to be saved to resume a run, and no choice depends on how many were made before it or where.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose: `derive_seed(0, "order", "site-3", 7)`."""
    text = "/".join([str(seed), *(f"{len(str(p))}:{p}" for p in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
