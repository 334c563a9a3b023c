"""Noise of a run whose releases are differentially private, and what they have cost.

A round's noise is a key of 32 random bytes. It is in the journal before the noisy mean is made, so that a run that was
killed makes the very same one; and it is struck out once the round is committed, so that nobody can take the noise off
again.

Where the clipping norm follows the updates, what it is in the next round is in each commit.

Journal keys: `privacy` (what the sums are divided by, fixed before round 1), `noise/NNNN` (the sealed key of an open
round).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..privacy.accounting import Releases, epsilon_by_rdp, epsilon_of_all, noise_multiplier
from ..privacy.adaptive_clip import UNDER_CLIP, AdaptiveClip
from ..privacy.noise import GaussianNoise, new_key
from ..privacy.site_level import COUNT_ROW, NoisyMean
from ..privacy.spending import ADJACENCY, UNPROTECTED, Spend
from ..recipe.schema import Recipe
from ..strategies.update import Update
from .journal import RunJournal

UNIT = "site"
SAMPLING = "none assumed: this is what a site pays whose update is in every round"


@dataclass(frozen=True)
class Seal:
    """How keys lie in a journal: as they are, or under a key of the journal's owner."""

    close: Callable[[str, bytes], str] = lambda name, key: key.hex()
    open: Callable[[str, str], bytes] = lambda name, text: bytes.fromhex(text)


class PrivateRounds:
    """The noisy means of one run.

    Args:
        num_sites: sites that the run begins with.
    """

    def __init__(self, recipe: Recipe, journal: RunJournal, num_sites: int, seal: Seal | None = None) -> None:
        self.journal, self.seal = journal, seal or Seal()
        spec = recipe.privacy
        assert spec.clip is not None
        self.bound, self.noise_multiplier = spec.clip, planned_noise(recipe)
        begun = journal.get("privacy")
        if begun is None:
            begun = {"expected": recipe.federation.cohort.size(num_sites)}
            journal.put("privacy", begun)
        self.expected = int(begun["expected"])
        adaptive = spec.adaptive_clip
        self.adaptive = AdaptiveClip.of(adaptive, self.noise_multiplier, self.expected) if adaptive else None
        commits = journal.commits() if adaptive else {}
        if commits:
            self.bound = float(commits[max(commits)].get("privacy", {}).get("next_clip", self.bound))
        self._centred = 0.0
        self._further: dict[str, float] = {}

    @classmethod
    def of(cls, recipe: Recipe, journal: RunJournal, num_sites: int, seal: Seal | None = None) -> PrivateRounds | None:
        """None: the recipe's releases are not private."""
        return cls(recipe, journal, num_sites, seal) if recipe.privacy.dp == "site" else None

    @property
    def task_clip(self) -> float | None:
        """What a training task says of the clipping norm; None: it is the recipe's."""
        return None if self.adaptive is None else self.bound

    def open(self) -> None:
        """A round begins, or is tried again."""
        self._centred = 0.0

    def hear(self, update: Update) -> None:
        """An update is in the sum. Whatever it says, it counts for half a site more or less."""
        self._centred += 0.5 if update.metrics.get(UNDER_CLIP, 0.0) > 0.5 else -0.5

    def mean(self, round: int) -> NoisyMean:
        """How a round's sum is released; its noise is in the journal when this returns."""
        name = _name(round)
        kept = self.journal.get(name)
        key = new_key() if kept is None else self.seal.open(name, kept["key"])
        if kept is None:
            self.journal.put(name, {"key": self.seal.close(name, key)})
        noise, z = GaussianNoise(key), self.noise_multiplier
        if self.adaptive is not None:
            z = self.adaptive.sum_noise
            share = self.adaptive.share(self._centred, float(noise.values(COUNT_ROW, 0, 1)[0]))
            self._further = {"sum_noise": z, "share": share, "next_clip": self.adaptive.after(self.bound, share)}
        return NoisyMean(self.bound, z, self.expected, noise)

    def record(self) -> dict[str, Any]:
        """What a commit says of its release."""
        said = {"noise_multiplier": self.noise_multiplier, "clip": self.bound, "divided_by": self.expected}
        return {**said, **self._further}

    def committed(self, round: int) -> None:
        """A round's commit is in the journal: its noise can never be made again."""
        self.journal.drop(_name(round))
        self.bound = self._further.get("next_clip", self.bound)


def planned_noise(recipe: Recipe) -> float:
    """z, as the recipe says it or as its ε needs it."""
    spec = recipe.privacy
    if spec.noise_multiplier is not None:
        return spec.noise_multiplier
    assert spec.epsilon is not None
    assert spec.delta is not None
    return noise_multiplier(spec.epsilon, spec.delta, count=recipe.federation.rounds)


def spend_of(recipe: Recipe) -> Spend:
    """What a round costs each site whose update is in its sum."""
    return UNPROTECTED if recipe.privacy.dp == "none" else Spend(UNIT, "gaussian", planned_noise(recipe))


def spent_in(record: Mapping[str, Any]) -> Spend | None:
    """What a commit's record says of its release; None if it says nothing."""
    found = record.get("privacy")
    return None if found is None else Spend(UNIT, "gaussian", float(found["noise_multiplier"]))


def spent(records: Sequence[Mapping[str, Any]]) -> list[Releases]:
    """The releases that commits' records tell of, those of equal noise together."""
    counts: dict[float, int] = {}
    for record in records:
        if "privacy" in record:
            z = float(record["privacy"]["noise_multiplier"])
            counts[z] = counts.get(z, 0) + 1
    return [Releases(z, count) for z, count in counts.items()]


def statement(recipe: Recipe, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run's metrics say of its privacy."""
    spec = recipe.privacy
    if spec.dp == "none":
        return {"dp": "none", "epsilon": None}
    assert spec.delta is not None
    plans = spent(records)
    epsilon = epsilon_of_all(plans, spec.delta)
    rdp = max((epsilon_by_rdp(plan, spec.delta) for plan in plans), default=0.0)
    finite = epsilon < float("inf")
    return {
        "dp": "site",
        "epsilon": epsilon if finite else None,
        "epsilon_rdp": rdp if finite and len(plans) == 1 else None,
        "delta": spec.delta,
        "unit": UNIT,
        "adjacency": ADJACENCY[UNIT],
        "sampling": SAMPLING,
        "noise_multiplier": planned_noise(recipe),
        "clip": next((r["privacy"]["clip"] for r in reversed(records) if "privacy" in r), spec.clip),
        "releases": sum(plan.count for plan in plans),
    }


def _name(round: int) -> str:
    return f"noise/{round:04d}"
