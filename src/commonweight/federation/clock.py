"""A virtual clock: when a simulated site's work would arrive, had the site the speed that the recipe gives it.

A task of S optimizer steps at a site of speed s (steps a virtual second) takes S/s virtual seconds; a try that breaks
off (`availability`) costs as much and is repeated. Everything is drawn from the recipe's seed, so that it depends
neither on the machine nor on the number of workers, and a resumed run draws the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError
from ..recipe.schema import ClockSpec
from ..seeding import derive_seed
from .tally import Sites


@dataclass(frozen=True)
class VirtualClock:
    """How long each site takes.

    Args:
        speeds: optimizer steps a virtual second, by site.
        steps: optimizer steps a task, by site.
        availability: the chance that a try is carried through.
    """

    seed: int
    speeds: Mapping[str, float]
    steps: Mapping[str, int]
    availability: float = 1.0

    @classmethod
    def of(cls, spec: ClockSpec, sites: Sites, *, seed: int) -> VirtualClock:
        """Raises RecipeError: there are not as many speeds as sites."""
        speeds = _speeds(spec, len(sites.names), seed)
        return cls(seed, dict(zip(sites.names, speeds, strict=True)), sites.steps, spec.availability)

    def duration(self, site: str, round: int) -> float:
        """Virtual seconds that a site's task of a round takes."""
        return self.steps[site] / self.speeds[site] * self._tries(site, round)

    def _tries(self, site: str, round: int) -> int:
        """1, 2, …: geometric, by inverting its distribution function."""
        if self.availability == 1:
            return 1
        draw = random.Random(derive_seed(self.seed, "tries", site, round)).random()
        return 1 + math.floor(math.log1p(-draw) / math.log1p(-self.availability))

    def facts(self, commits: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """For the metrics: each site's speed, and the virtual time at the end of each round.

        An asynchronous run's commits say it. A synchronous round takes as long as the slowest site that it waited for.
        """
        times, now = [], 0.0
        for number, record in commits.items():
            if number > 0:
                waited_for = [*record.get("answered", ()), *record.get("failed", ())]
                slowest = max((self.duration(site, number) for site in waited_for), default=0.0)
                now = record["virtual_s"] if "virtual_s" in record else now + slowest
                times.append(now)
        return {"speeds": dict(self.speeds), "virtual_s": times}


def _speeds(spec: ClockSpec, num_sites: int, seed: int) -> Sequence[float]:
    if spec.speeds is not None:
        if len(spec.speeds) != num_sites:
            raise RecipeError(
                f"federation.clock.speeds has {len(spec.speeds)} numbers, but the data has {num_sites} sites",
                hint="give one for each site, in the order of the sites, or slowest and fastest instead",
            )
        return spec.speeds
    assert spec.slowest is not None
    assert spec.fastest is not None
    draw = random.Random(derive_seed(seed, "speeds"))
    if spec.spread == "even":
        step = (spec.fastest - spec.slowest) / max(1, num_sites - 1)
        return draw.sample([spec.slowest + place * step for place in range(num_sites)], num_sites)
    low, high = math.log(spec.slowest), math.log(spec.fastest)
    draws = [draw.gauss((low + high) / 2, (high - low) / 4) for _ in range(num_sites)]
    return [min(spec.fastest, max(spec.slowest, math.exp(value))) for value in draws]
