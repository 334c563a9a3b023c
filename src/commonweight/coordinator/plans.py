"""What a run needs to be known for on every replica: its recipe, its strategy, the shape of its tensors."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..codec.common import common_numbers
from ..codec.down import Down, down_of
from ..codec.feedback import Coder, coder_of
from ..errors import RecipeError, StateError
from ..federation.asynchronous import check_asynchronous
from ..federation.secure_rounds import check_sums
from ..model.shapes import Shape, shapes_of
from ..model.tensors import Layout
from ..privacy.secure_aggregation.rows import MASKED, row_layout
from ..recipe.load import check_methods, parse_recipe
from ..recipe.schema import Recipe
from ..registry import built_in, is_listed, resolve
from ..strategies.base import Strategy
from ..wire.frames import Channel, Frame, parse_header
from ..wire.protocol_pb2 import Job
from ..wire.refusals import Refusal, Refused
from .store import Store
from .stored_model import Combining

#: plans that are kept; a job's header may have megabytes
_KEPT = 256


@dataclass(frozen=True)
class RunPlan:
    """One run, as its lead signed it."""

    job: Job
    recipe: Recipe

    @classmethod
    def of(cls, job: Job, strategies: Collection[str]) -> RunPlan:
        """A job's plan. `strategies` are those whose code may run here (`CoordinatorSettings.strategies`).

        Raises:
            RecipeError: the recipe cannot be carried out by this coordinator. No code was imported that it may not run.
        """
        recipe = parse_recipe(job.recipe, f"the recipe of job {job.name!r}")
        name = recipe.federation.strategy.name
        if not is_listed("strategy", name, strategies):
            raise RecipeError(
                f"federation.strategy {name!r} is not among those that this coordinator runs: {', '.join(strategies)}",
                hint="whoever runs the coordinator may install it there and list it in coordinator.yaml under "
                "`strategies`",
            )
        # the code of an objective that a lead brings along runs at sites, never here
        check_methods(recipe, network=True, objective=recipe.training.objective.name in built_in("objective"))
        plan = cls(job, recipe)
        strategy = plan.strategy(1)
        check_asynchronous(recipe, len(job.sites) or None)
        if job.sites:
            check_sums(recipe, len(job.sites), plan.layout)
        if not isinstance(strategy, Combining):
            raise RecipeError(
                f"federation.strategy {name!r} is none of the kinds that a coordinator, which combines from files, can "
                "run",
                hint="write it as a subclass of commonweight.strategies.base.SumStrategy, or of "
                "commonweight.strategies.side_by_side.SideBySideStrategy",
            )
        return plan

    def strategy(self, num_sites: int) -> Strategy:
        method = self.recipe.federation.strategy
        kind = resolve("strategy", method.name)
        strategy: Strategy = kind(kind.Options(**method.options), num_sites=num_sites)
        return strategy

    @cached_property
    def initial(self) -> Frame:
        """The frame of the initial global tensors."""
        return parse_header(self.job.initial)

    def check_initial(self) -> None:
        """Whether the initial tensors are what the recipe makes of them.

        Raises:
            Refused: they are not one channel `theta`.
            RecipeError: a site's part cannot be cut from them, or updates cannot be made as small as it wants.
        """
        channels = self.initial.plan.channels
        if channels != (Channel("theta"),):
            raise Refused(Refusal.WRONG_SHAPE, f"a job's initial tensors are one channel theta, not {len(channels)}")
        _ = self.shapes, self.coder, self.down

    @property
    def layout(self) -> Layout:
        return self.initial.plan.layout

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Of the sites that hold less than the whole adapter.

        Raises:
            RecipeError: one cannot be cut from the initial tensors.
        """
        return shapes_of(self.recipe.model.adapter, self.layout)

    @cached_property
    def parts(self) -> dict[str, Any]:
        """What those sites hold, for people."""
        return {site: shape.facts(self.layout) for site, shape in self.shapes.items()}

    @cached_property
    def coder(self) -> Coder | None:
        """What updates are made small by, one by one; None: nothing."""
        if self.secure:
            return None
        return coder_of(self.recipe.compression, self.layout, self.recipe.seed, len(self.update_channels))

    @cached_property
    def down(self) -> Down | None:
        """What global tensors are made small by on their way to the sites; None: nothing."""
        return down_of(self.recipe.compression.down, self.layout, self.recipe.seed)

    @property
    def secure(self) -> bool:
        """Whether updates come masked."""
        return self.recipe.privacy.summed

    @cached_property
    def _row(self) -> Layout:
        return row_layout(self.layout, common_numbers(self.recipe, self.layout, 0))

    def update_layout(self, site: str) -> Layout:
        """Of the tensors that a site sends."""
        if self.secure:
            return self._row
        shape = self.shapes.get(site)
        return self.layout if shape is None else shape.layout

    @cached_property
    def update_channels(self) -> tuple[str, ...]:
        if self.secure:
            return (MASKED,)
        return self.strategy(1).update_channels


class Plans:
    """Plans of the store's runs, each read once.

    Args:
        strategies: those whose code may run here.
    """

    def __init__(self, store: Store, strategies: Collection[str]) -> None:
        self.store, self.strategies = store, strategies
        self._known: dict[str, RunPlan] = {}
        self._lock = threading.Lock()

    def of(self, run: str) -> RunPlan | None:
        """A run's plan, or None if there is no such run."""
        with self._lock:
            found = self._known.get(run)
        if found is None:
            try:
                row = self.store.run_row(run)
            except StateError:
                return None
            found = RunPlan.of(Job.FromString(row.job), self.strategies)
            with self._lock:
                self._known[run] = found
                while len(self._known) > _KEPT:
                    self._known.pop(next(iter(self._known)))
        return found
