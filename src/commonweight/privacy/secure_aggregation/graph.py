"""Who masks against whom: everyone against everyone up to 50 sites, beyond that each against k others.

Sites stand in a circle in an order that follows from all their keys, and each is a neighbour of the k/2 before and
the k/2 behind it (a Harary graph on a random order: Bell et al., Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead, CCS 2020). k and the threshold t come from the declared shares of corrupt and of lost sites,
so that, except with probability 2⁻⁴⁰,

    fewer than t of any honest site's neighbours are corrupt     (t shares would open its mask)
    honest sites that stay hang together                         (else the sum of a part of them would come out)

and, except with probability 2⁻²⁰, at least t neighbours of each site stay (else the round must be repeated).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import RecipeError

#: up to this many sites, everyone is everyone's neighbour
FULL_UP_TO = 50
MIN_SITES = 3
_SECURITY, _CORRECTNESS = 2.0**-40, 2.0**-20


@dataclass(frozen=True)
class Degree:
    """Args: neighbours: k. threshold: t, shares of a site's secrets that open them, its own share counted."""

    neighbours: int
    threshold: int


def majority(num_sites: int) -> int:
    """The least whole number above two thirds: two groups of so many share more than a third."""
    return 2 * num_sites // 3 + 1


def degree(num_sites: int, *, corrupt: float = 0.1, lost: float = 0.3) -> Degree:
    """k and t for a round to which so many sites are invited.

    Args:
        corrupt: share of the sites that may work together with the coordinator.
        lost: share of the sites that may be lost on the way.

    Raises:
        RecipeError: there are fewer than 3 sites, or no degree does what is asked.
    """
    if num_sites < MIN_SITES:
        raise RecipeError(
            f"secure aggregation of {num_sites} sites: with fewer than {MIN_SITES} a sum shows what one of them sent",
            hint="invite more sites, or turn privacy.secure_aggregation off",
        )
    if num_sites <= FULL_UP_TO:
        return Degree(num_sites - 1, majority(num_sites))
    num_corrupt, num_lost = math.floor(corrupt * num_sites), math.ceil(lost * num_sites)
    for half in range(1, (num_sites + 1) // 2):
        k = 2 * half
        if num_sites * _run_probability(num_sites, min(num_sites, num_corrupt + num_lost), half) > _SECURITY:
            continue
        # the smallest threshold that corrupt neighbours do not reach
        t = next((t for t in range(1, k + 1) if num_sites * _tail(num_sites - 1, num_corrupt, k, t) <= _SECURITY), None)
        # its own share is not to be had of a site that is lost
        if t is not None and num_sites * _tail(num_sites - 1, num_lost, k, k - t + 1) <= _CORRECTNESS:
            return Degree(k, t)
    return Degree(num_sites - 1, majority(num_sites))


def _tail(population: int, marked: int, drawn: int, least: int) -> float:
    """P[at least `least` of `drawn` without replacement are marked]; hypergeometric."""
    ways = sum(
        math.comb(marked, hit) * math.comb(population - marked, drawn - hit)
        for hit in range(max(0, least), min(drawn, marked) + 1)
    )
    return ways / math.comb(population, drawn)


def _run_probability(population: int, marked: int, length: int) -> float:
    """P[`length` given places of a random order are all marked]: a gap so long would cut the circle."""
    return math.comb(marked, length) / math.comb(population, length) if length <= marked else 0.0


def neighbours(sites: Sequence[str], k: int, seed: bytes) -> dict[str, tuple[str, ...]]:
    """Each site's neighbours, in the order of `sites`.

    Args:
        k: how many; even unless it is everyone.
        seed: decides the order in the circle; nobody can choose it who does not choose all sites' keys.
    """
    if k >= len(sites) - 1:
        return {site: tuple(other for other in sites if other != site) for site in sites}
    circle = sorted(sites, key=lambda site: hashlib.sha256(seed + site.encode()).digest())
    place = {site: index for index, site in enumerate(circle)}
    found = {}
    for site in sites:
        steps = range(1, k // 2 + 1)
        near = {circle[(place[site] + sign * step) % len(circle)] for step in steps for sign in (1, -1)}
        found[site] = tuple(other for other in sites if other in near)
    return found
