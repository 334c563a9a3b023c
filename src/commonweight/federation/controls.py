"""The control arms: what each site gets alone, and what pooling all the data would give, on the same steps.

A federated figure never stands alone. `local` trains one model a site, on its rows only; `centralised` one on all rows.
Both do as many optimizer steps at the same learning rates as the federated arm gives them by plan: a site's chain has
the rounds to which the site was invited, the centralised chain each round's steps summed over its cohort. They keep
their optimizer's state from round to round, as anyone would who trains in one place.

Journal keys: `control/local/<site>`, `control/centralised`.
"""

from __future__ import annotations

import random

from ..errors import RoundError
from ..recipe.schema import Recipe
from ..seeding import derive_seed
from ..train.schedule import lr_in_round
from .cohort import choose_cohort
from .events import Events
from .journal import RunJournal
from .messages import ChainTask, Completed, Engine
from .tally import Sites

#: local models are tested on everyone's held-out rows; of more sites than this, on a draw of so many
EVERYONE_AT_MOST = 32


def control_tasks(recipe: Recipe, sites: Sites, *, apart: bool = False) -> list[ChainTask]:
    """The chains that the recipe asks for, the longest first.

    Args:
        apart: the sites' data lies apart: nobody can pool it, and a local model is tested at home only.
    """
    cohorts = {
        number: choose_cohort(sites.names, recipe.federation, seed=recipe.seed, round=number)
        for number in range(1, recipe.federation.rounds + 1)
    }
    lrs = {number: lr_in_round(recipe.training, number, recipe.federation.rounds) for number in cohorts}
    generate = recipe.evaluation.exact_match
    tasks = []
    if "centralised" in recipe.evaluation.controls and not apart:
        rounds = tuple((n, lrs[n], sum(sites.steps[s] for s in cohort)) for n, cohort in cohorts.items())
        everyone = sites.names
        tasks.append(
            ChainTask(
                "control/centralised", "centralised", everyone, rounds, everyone, (), "controls/centralised", generate
            )
        )
    if "local" in recipe.evaluation.controls:
        everyone = () if apart else _everyone(recipe, sites)
        for place, site in enumerate(sites.names):
            rounds = tuple((n, lrs[n], sites.steps[site]) for n, cohort in cohorts.items() if site in cohort)
            folder = f"controls/local/{place:03d}"
            tasks.append(
                ChainTask(f"control/local/{site}", "local", (site,), rounds, (site,), everyone, folder, generate)
            )
    return tasks


def _everyone(recipe: Recipe, sites: Sites) -> tuple[str, ...]:
    if len(sites.names) <= EVERYONE_AT_MOST:
        return sites.names
    return tuple(random.Random(derive_seed(recipe.seed, "everyone")).sample(sites.names, EVERYONE_AT_MOST))


def run_controls(
    recipe: Recipe, sites: Sites, engine: Engine, journal: RunJournal, events: Events, *, apart: bool = False
) -> None:
    """Carry out the chains that the journal does not have yet.

    Args:
        apart: the sites' data lies apart. A chain that fails is then left out, with an event.

    Raises:
        RoundError: a chain failed; the federated arm's result is not affected.
    """
    tasks = [task for task in control_tasks(recipe, sites, apart=apart) if journal.get(task.key) is None]
    events.emit("controls_started", chains=len(tasks))
    for outcome in engine.run(tasks):
        task = outcome.task
        assert isinstance(task, ChainTask)
        if not isinstance(outcome, Completed):
            if apart:
                events.emit("control_missing", arm=task.arm, sites=list(task.sites[:1]), reason=outcome.reason)
                continue
            raise RoundError(
                f"the {task.arm} control of {', '.join(task.sites[:3])} failed: {outcome.reason}",
                hint="the federated adapter is complete; repeat with --resume",
                retry=True,
            )
        journal.put(task.key, outcome.result)
        events.emit("control_finished", arm=task.arm, sites=list(task.sites[:1]), seconds=outcome.result["seconds"])
