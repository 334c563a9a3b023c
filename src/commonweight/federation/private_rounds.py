"""Noise of a run whose releases are differentially private, and what they have cost.

A round's noise is a key of 32 random bytes. It is in the journal before the noisy mean is made, so that a run that was
killed makes the very same one; and it is struck out once the round is committed, so that nobody can take the noise off
again. Where the noise of later rounds is made of it too (`privacy/toeplitz.py`) it is struck out with the last. Where
the sites add the noise (`privacy/distributed.py`) there is no key here.

Where the clipping norm follows the updates, what it is in the next round is in each commit.

Journal keys: `privacy` (what the sums are divided by, and the noise's coefficients, fixed before round 1), `noise/NNNN`
(the sealed key of an open round).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import StateError
from ..privacy import example_level
from ..privacy.accounting import Releases, epsilon, epsilon_by_rdp
from ..privacy.adaptive_clip import UNDER_CLIP, AdaptiveClip
from ..privacy.example_level import planned_steps
from ..privacy.noise import GaussianNoise, new_key
from ..privacy.secure_aggregation.graph import majority
from ..privacy.site_level import COUNT_ROW, NoisyMean, planned_noise
from ..privacy.spending import UNPROTECTED, Spend, adjacency, unit_of
from ..privacy.toeplitz import CorrelatedNoise, optimised
from ..recipe.schema import Recipe
from ..strategies.update import Update
from .journal import RunJournal
from .tally import Sites

UNIT = "site"
NOISY_STEPS = "noisy steps"


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
        spec, self.rounds = recipe.privacy, recipe.federation.rounds
        assert spec.clip is not None
        self.bound, self.noise_multiplier = spec.clip, planned_noise(recipe)
        self.mechanism = spec.mechanism
        begun = journal.get("privacy")
        if begun is None:
            begun = {"expected": recipe.federation.cohort.size(num_sites)}
            if spec.mechanism.name == "banded-toeplitz":
                begun["coefficients"] = list(optimised(self.rounds, band_of(recipe)))
            journal.put("privacy", begun)
        self.expected = int(begun["expected"])
        self.coefficients: list[float] = begun.get("coefficients", [])
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
        """How a round's sum is released; its noise is in the journal when this returns, unless it is in the sum."""
        if self.mechanism.at_sites:
            return NoisyMean(self.bound, 0.0, self.expected, None)
        key, z = self._key(round), self.noise_multiplier
        if self.coefficients:
            keys = [*(self._known(number) for number in range(1, round)), key]
            return NoisyMean(self.bound, z, self.expected, CorrelatedNoise(keys, self.coefficients))
        noise = GaussianNoise(key)
        if self.adaptive is not None:
            z = self.adaptive.sum_noise
            share = self.adaptive.share(self._centred, float(noise.values(COUNT_ROW, 0, 1)[0]))
            self._further = {"sum_noise": z, "share": share, "next_clip": self.adaptive.after(self.bound, share)}
        return NoisyMean(self.bound, z, self.expected, noise)

    def _key(self, round: int) -> bytes:
        """A round's key, drawn and put into the journal if it is not there."""
        name = _name(round)
        if self.journal.get(name) is not None:
            return self._known(round)
        key = new_key()
        self.journal.put(name, {"key": self.seal.close(name, key)})
        return key

    def _known(self, round: int) -> bytes:
        name = _name(round)
        kept = self.journal.get(name)
        if kept is None:
            raise StateError(
                f"the noise of round {round} is not in the journal, and that of later rounds takes a part of it back",
                hint="this run cannot go on; start a new one",
            )
        return self.seal.open(name, kept["key"])

    def record(self) -> dict[str, Any]:
        """What a commit says of its release."""
        said = {"noise_multiplier": self.noise_multiplier, "clip": self.bound, "divided_by": self.expected}
        name = self.mechanism.name
        return {**said, **({"mechanism": name} if name != "gaussian" else {}), **self._further}

    def committed(self, round: int) -> None:
        """A round's commit is in the journal: noise that no round needs any more can never be made again."""
        if not self.coefficients:
            self.journal.drop(_name(round))
        elif round == self.rounds:
            for number in range(1, round + 1):
                self.journal.drop(_name(number))
        self.bound = self._further.get("next_clip", self.bound)


def sampling(recipe: Recipe) -> str:
    """What is assumed of who takes part when."""
    separation = recipe.privacy.mechanism.separation
    if separation == 1:
        return "none assumed: this is what a site pays whose update is in every round"
    return f"none assumed: of {separation} rounds in a row a site takes part in one at most"


def assumed(recipe: Recipe) -> str:
    """On whose noise ε counts (`dp: site`)."""
    spec = recipe.privacy.mechanism
    if not spec.at_sites:
        return "the coordinator adds the noise"
    count = recipe.federation.cohort.count
    of = "more than two thirds of the sites" if count is None else f"at least {majority(count)} of {count} sites"
    less = f", less {spec.colluding:.0%} of those invited," if spec.colluding else ""
    return f"{of} that a round invites{less} add their noise and tell nobody; what further sites add is not counted"


def band_of(recipe: Recipe) -> int:
    """Rounds over which noise is spread."""
    return recipe.privacy.mechanism.band or recipe.privacy.mechanism.separation


def spends_of(recipe: Recipe, names: Iterable[str], sites: Sites | None = None) -> dict[str, Spend]:
    """What a round costs each of these sites.

    Args:
        sites: with privacy of examples or groups it depends on a site's size and steps.
    """
    if recipe.privacy.noisy_steps:
        assert sites is not None
        unit = unit_of(recipe.privacy)
        planned = {n: planned_round(recipe, units=sites.units[n], steps=sites.steps[n]) for n in names}
        return {n: Spend(unit, NOISY_STEPS, r.noise_multiplier, r.sampling, r.count) for n, r in planned.items()}
    if recipe.privacy.dp == "none":
        return dict.fromkeys(names, UNPROTECTED)
    return dict.fromkeys(names, Spend(UNIT, recipe.privacy.mechanism.name, planned_noise(recipe)))


def spends_in(record: Mapping[str, Any]) -> dict[str, Spend]:
    """What a commit's record says of its releases, by the sites that pay for them."""
    found = record.get("privacy")
    if found is None:
        return {}
    if "sites" in found:
        return {site: Spend.from_json(values) for site, values in found["sites"].items()}
    spend = Spend(UNIT, found.get("mechanism", "gaussian"), float(found["noise_multiplier"]))
    return dict.fromkeys(record["answered"], spend)


def unit_count(recipe: Recipe) -> str:
    """By which of its counts a site says how many examples, or with privacy of groups how many groups, it trains on."""
    return "train_groups" if recipe.privacy.dp == "group" else "train_examples"


def planned_round(recipe: Recipe, *, units: int, steps: int) -> Releases:
    """What a round releases of each example or group of a site: its noisy steps.

    The noise that an ε needs is that of a site which takes part in every round.

    Args:
        units: the site's training examples, or groups of them.
        steps: its optimizer steps a round.
    """
    spec = recipe.privacy
    assert spec.delta is not None
    return planned_steps(
        units=units,
        batch_size=recipe.training.batch_size,
        steps=steps,
        rounds=recipe.federation.rounds,
        delta=spec.delta,
        z=spec.noise_multiplier,
        epsilon=spec.epsilon,
    )


def released(records: Sequence[Mapping[str, Any]]) -> Releases | None:
    """What rounds have cost a site that took part as often as any, by the commits' records; None: nothing private."""
    private = [record for record in records if "privacy" in record]
    if not private:
        return None
    said, count = private[0]["privacy"], len(private)
    if said.get("mechanism") == "banded-toeplitz":
        answers = Counter(site for record in private for site in record["answered"])
        count = max(answers.values(), default=0)
    spend = Spend(UNIT, said.get("mechanism", "gaussian"), float(said["noise_multiplier"]), count=count)
    return spend.releases("site")


def spent_by_site(records: Sequence[Mapping[str, Any]]) -> dict[str, Releases]:
    """The releases of each site's examples or groups."""
    found: dict[str, Releases] = {}
    for record in records:
        for site, spend in spends_in(record).items():
            before = found[site].count if site in found else 0
            found[site] = Releases(spend.noise_multiplier, before + spend.count, spend.sampling)
    return found


def statement(recipe: Recipe, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run's metrics say of its privacy."""
    spec = recipe.privacy
    if spec.dp == "none":
        return {"dp": "none", "epsilon": None}
    assert spec.delta is not None
    if spec.noisy_steps:
        return _noisy_steps_statement(recipe, records)
    plan = released(records) or Releases(planned_noise(recipe), 0)
    name = spec.mechanism.name
    cost, rdp = epsilon(plan, spec.delta), epsilon_by_rdp(plan, spec.delta)
    finite = cost < math.inf
    return {
        "dp": "site",
        "epsilon": cost if finite else None,
        "epsilon_rdp": rdp if finite else None,
        "delta": spec.delta,
        "unit": UNIT,
        "adjacency": adjacency(UNIT, name),
        "mechanism": name,
        "sampling": sampling(recipe),
        "assumed": assumed(recipe),
        "noise_multiplier": planned_noise(recipe),
        "clip": next((r["privacy"]["clip"] for r in reversed(records) if "privacy" in r), spec.clip),
        "releases": plan.count,
    }


def _noisy_steps_statement(recipe: Recipe, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    spec = recipe.privacy
    assert spec.delta is not None
    plans, rounds = spent_by_site(records), Counter(site for record in records for site in spends_in(record))
    costs = {site: epsilon(plan, spec.delta) for site, plan in plans.items()}
    worst = max(costs, key=lambda site: costs[site], default=None)
    finite = worst is not None and costs[worst] < math.inf
    return {
        "dp": spec.dp,
        "epsilon": costs[worst] if worst is not None and finite else None,
        "epsilon_rdp": epsilon_by_rdp(plans[worst], spec.delta) if worst is not None and finite else None,
        "delta": spec.delta,
        "unit": unit_of(spec),
        **({"by": spec.by, "rows_per_group": spec.rows_of_unit} if spec.by is not None else {}),
        "adjacency": adjacency(unit_of(spec)),
        "sampling": example_level.SAMPLING.format(unit=spec.dp),
        "noise_multiplier": plans[worst].noise_multiplier if worst is not None else None,
        "clip": spec.clip,
        "releases": plans[worst].count if worst is not None else 0,
        "rounds_planned": recipe.federation.rounds,
        "sites": {
            site: {
                "rounds": rounds[site],
                "noise_multiplier": plan.noise_multiplier,
                "count": plan.count,
                "sampling": plan.sampling,
                "epsilon": costs[site] if costs[site] < math.inf else None,
            }
            for site, plan in plans.items()
        },
    }


def _name(round: int) -> str:
    return f"noise/{round:04d}"
