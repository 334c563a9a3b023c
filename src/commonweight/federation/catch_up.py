"""What a site lacks of the global tensors, from the round in which it was last invited; and what it is sent for that.

A round's task starts from the version that the round before it has left: version v is what round v left, and 0 the
initial one. What rounds have added to the base is sent whole, round by round. Of global tensors that are made small on
their way (`codec/down.py`) a site that holds version k is sent the differences that led from k to the present one, or
the tensors themselves if those are fewer bytes. Version 0 it makes by itself, out of the recipe's seed.

What is counted is what tasks of training bring. A site that is evaluated besides has a part of it earlier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Commits = Mapping[int, Mapping[str, Any]]


def sizes_of(commits: Commits) -> dict[int, int]:
    """Bytes of the difference that each round has made, where global tensors are made small."""
    return {round: found["bytes"] for round, record in commits.items() if (found := record["state"].get("down"))}


def chain(sizes: Mapping[int, int], whole: int, held: int | None, wanted: int) -> list[int] | None:
    """The rounds whose differences lead a site from one version to another in fewer bytes than the tensors themselves;
    None: it is sent these.

    Args:
        sizes: bytes of the differences that there are, by round.
        whole: bytes of the tensors.
        held: the version that it holds, if any.
    """
    if held is None or held > wanted:
        return None
    rounds = list(range(held + 1, wanted + 1))
    if not all(round in sizes for round in rounds) or sum(sizes[round] for round in rounds) >= whole:
        return None
    return rounds


def still_of_use(sizes: Mapping[int, int], whole: int) -> set[int]:
    """The rounds whose differences some site may still be sent: those since when they are fewer bytes than the tensors
    themselves."""
    total, found = 0, set[int]()
    for round in sorted(sizes, reverse=True):
        total += sizes[round]
        if total >= whole:
            break
        found.add(round)
    return found


def bytes_to_catch_up(commits: Commits, whole: Mapping[str, int], *, small: bool) -> dict[str, int]:
    """Bytes that each of a new round's sites is sent.

    Args:
        commits: the journal's records of the rounds so far.
        whole: bytes of the global tensors, by site of the cohort of the round after them.
        small: whether these are made small on their way.
    """
    sizes, added = sizes_of(commits), _added_to_base(commits)
    invited = {site: round for round, record in commits.items() for site in record.get("cohort", ())}
    found = {}
    for site, size_of_all in whole.items():
        since = invited.get(site, 0)
        rounds = chain(sizes, size_of_all, max(0, since - 1), max(commits)) if small else None
        tensors = size_of_all if rounds is None else sum(sizes[round] for round in rounds)
        # a round's task brings what the rounds before it have added
        found[site] = tensors + sum(size for round, size in added.items() if round >= since)
    return found


def _added_to_base(commits: Commits) -> dict[int, int]:
    return {round: record["state"].get("residual", {}).get("bytes", 0) for round, record in commits.items()}
