"""What `plan` says beside privacy: bytes on the wire, hours, memory of each role."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import DataError, ModelError, RecipeError
from .terminal import say

if TYPE_CHECKING:
    from ..engines.forecast import Forecast
    from ..federation.tally import Sites
    from ..recipe.schema import Recipe


@dataclass(frozen=True)
class Asked:
    """What a person said of the sites.

    Args:
        sites: how many there are.
        units: how many training examples, or with privacy of groups groups, each has, in place of the recipe's data.
        bandwidth: each site's line.
        step_seconds: of an optimizer step.
        measure: take an optimizer step here, and its time.
    """

    sites: int | None = None
    units: int | None = None
    bandwidth: str | None = None
    step_seconds: float | None = None
    measure: bool = False

    @property
    def explicit(self) -> bool:
        """Whether figures were asked for, so that their lack is an error."""
        return self.bandwidth is not None or self.step_seconds is not None or self.measure


def foresee(recipe: Recipe, asked: Asked, *, secure: bool) -> tuple[Forecast | None, str]:
    """The forecast, and what keeps it from being whole, as a sentence.

    Raises:
        CommonweightError: it was asked for, and cannot be had.
    """
    from ..engines.forecast import Line, forecast, measured_step

    if asked.measure and asked.step_seconds is not None:
        raise RecipeError("--measure and --step-seconds both say how long a step takes", hint="leave one out")
    if asked.step_seconds is not None and not 0 < asked.step_seconds < math.inf:
        raise RecipeError(f"--step-seconds {asked.step_seconds:g}", hint="a step takes some seconds, more than 0")
    line = None if asked.bandwidth is None else Line.parse(asked.bandwidth)
    sites, why = _sites(recipe, asked)
    try:
        step_s = measured_step(recipe) if asked.measure else asked.step_seconds
        found = forecast(recipe, secure=secure, sites=sites, num_sites=asked.sites, line=line, step_s=step_s)
    except ModelError as error:
        if asked.explicit:
            raise
        return None, f"Bytes and memory are not known: {error.message}."
    return found, why


def _sites(recipe: Recipe, asked: Asked) -> tuple[Sites | None, str]:
    from ..engines.forecast import alike, sites_of

    if asked.units is not None:
        return alike(recipe, asked.sites or 1, asked.units), ""
    if asked.sites is not None and recipe.training.steps is not None:
        return None, ""
    try:
        return sites_of(recipe), ""
    except (DataError, ModelError) as error:
        return None, f"The sites are not known here ({error.message}): say --sites N and --examples N."


def to_json(found: Forecast | None) -> dict[str, Any]:
    return {"forecast": None if found is None else found.to_json()}


def say_forecast(found: Forecast | None, why: str, asked: Asked) -> None:
    """Print it."""
    if found is not None:
        _say(found, asked)
    if why:
        say(why)


def _say(found: Forecast, asked: Asked) -> None:
    from ..evaluate.text import duration, size

    rounds = "versions" if found.asynchronous else "rounds"
    own = found.trained - found.sent
    how = found.hidden or ("compressed" if found.coded else "")
    ratio = f", {found.plain_up / found.up:.1f} times fewer bytes" if found.coded else ""
    say("")
    say(f"On the wire: {found.sent:,} of {found.num_parameters:,} parameters")
    if own:
        say(f"  kept at the sites     {own:,} more are trained")
    most = "at most " if found.up_at_most else ""
    say(f"  a site sends          {most}{size(found.up)} a round{f' ({how}{ratio})' if how else ''}")
    most = "at most " if found.down_at_most else ""
    ratio = f" (compressed, {found.plain_down / found.down:.1f} times fewer bytes)" if found.small_down else ""
    say(f"  a site fetches        {most}{size(found.down)} a round{ratio}")
    if found.moved_up is not None and found.moved_down is not None:
        moved = f"{size(found.moved_up)} up, {size(found.moved_down)} down"
        say(f"  all together          {moved}: {found.rounds} {rounds} of {found.cohort} updates")
    if found.transfer_s is not None:
        say(f"  over {asked.bandwidth:<17}{duration(found.transfer_s)} a round, one way after the other")
    if found.steps is not None:
        taken = "" if found.train_s is None else f", {duration(found.train_s)}"
        say(f"  training              {found.steps} steps a round at most{taken}{' as measured here' * asked.measure}")
    if found.hours is not None:
        known = {"transfer": found.transfer_s, "training": found.train_s}
        parts = " and ".join(part for part, seconds in known.items() if seconds is not None)
        say(f"  {parts:<22}{duration(3600 * found.hours)} in all, without evaluation and waiting")
    for role, held in found.memory.items():
        items = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in held.items() if num_bytes)
        say(f"Memory of {role}: about {size(sum(held.values()))} ({items})")
