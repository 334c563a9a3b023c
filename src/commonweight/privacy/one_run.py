"""A lower bound on ε from one run: how well it can be told which made-up rows the run has trained on.

m rows are each put among the training rows or left out by a fair coin of their own. Whoever sees the result guesses
for some of them which way the coin fell. If what made the result is (ε, δ)-differentially private in each of these
rows (one row more or fewer), v of r guesses are right with a probability of at most

    P[B ≥ v] + 2·m·δ · max over i in 1 … v of P[v > B ≥ v − i]/i,    B ~ Binomial(r, e^ε/(e^ε + 1))

(Steinke, Nasr and Jagielski, Privacy Auditing with One (1) Training Run, NeurIPS 2023, arXiv:2305.08846, theorem 5.2
and appendix D). Where that is below 5 %, the run is not (ε, δ)-private, at 95 % confidence; the largest such ε is the
bound.

The converse proves nothing: a bound of 0 says that these guesses failed, not that others would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

LEVEL = 0.05
#: shares of the canaries that are guessed at; the others are abstained from. Fixed before a run is looked at, and paid
#: for by dividing the level among them. The choice is ours
GUESSED = (1.0, 0.5, 0.25, 0.125)
#: fewer cannot show anything: all of 8 guesses are right by chance in one case of 256, and the level is divided by 4
MIN_CANARIES = 8
_BISECTIONS = 40
_LARGEST = 60.0


def p_value(canaries: int, guesses: int, correct: int, *, epsilon: float, delta: float) -> float:
    """The largest probability of so many right guesses, or more, against anything that is (ε, δ)-private.

    Args:
        canaries: m, each in or out by a fair coin.
        guesses: r ≤ m.
        correct: v ≤ r.
    """
    from scipy.stats import binom

    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} right of {guesses} guesses at {canaries} canaries")
    q = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, q))
    if delta == 0 or correct == 0:
        return min(1.0, beta)
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, q))
    return min(1.0, beta + 2 * canaries * delta * float((below / np.arange(1, correct + 1)).max()))


def lower_bound(canaries: int, guesses: int, correct: int, *, delta: float, level: float = LEVEL) -> float:
    """The largest ε at which so many right guesses have a probability below `level`; 0 if there is none.

    Args:
        delta: of the claim that is tested.
        level: one less the confidence.
    """

    def refused(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon=epsilon, delta=delta) < level

    if not refused(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refused(high) and high < _LARGEST:
        low, high = high, high + 1
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if refused(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class OneRun:
    """What guessing came to.

    Args:
        canaries: m.
        guesses: r, of the number of guesses that gave the bound.
        correct: v, of these.
        epsilon: the lower bound, at 95 % confidence.
        delta: at this δ.
    """

    canaries: int
    guesses: int
    correct: int
    epsilon: float
    delta: float


def audit(scores: Sequence[float] | NDArray[np.float64], planted: Sequence[bool], *, delta: float) -> OneRun:
    """Guess by a score and bound ε.

    The highest scores are guessed to be in and as many of the lowest to be out, for each of the shares `GUESSED`; the
    best of these bounds, each at a confidence of 1 − 5 %/4, holds at 95 %.

    Args:
        scores: of each canary, larger where it is likelier that it was trained on; nothing in them but what the model
            says may depend on the coins.
        planted: how the coins fell.
        delta: of the claim.

    Raises:
        DataError: fewer than `MIN_CANARIES`, or a score that is not finite.
    """
    score_M, in_M = np.asarray(scores, np.float64), np.asarray(planted, bool)
    if len(score_M) < MIN_CANARIES:
        raise DataError(
            f"{len(score_M)} canaries cannot show anything: guesses must be too many to be right by chance",
            hint=f"plant {MIN_CANARIES} at least, better some hundreds (privacy.canaries.count)",
        )
    if not np.isfinite(score_M).all():
        raise DataError("the model's loss of a canary is not finite", hint="did training go astray?")
    order = np.argsort(-score_M, kind="stable")
    found = []
    for share in GUESSED:
        each = int(len(order) * share) // 2
        if each:
            correct = int(in_M[order[:each]].sum() + (~in_M[order[-each:]]).sum())
            epsilon = lower_bound(len(order), 2 * each, correct, delta=delta, level=LEVEL / len(GUESSED))
            found.append(OneRun(len(order), 2 * each, correct, epsilon, delta))
    return max(found, key=lambda one: one.epsilon)
