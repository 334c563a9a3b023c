"""What all robust strategies share: enough answers, a bound on norms, mixing; a subclass writes `plan`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from ...errors import RecipeError, RoundError
from ..side_by_side import THETA, SideBySide, SideBySideStrategy
from ..update import Update
from .rows import Prepared, Survey, all_rows, nearest_rows, num_columns, scales_within, survey

#: makes one row of n, (n, k) → (k,), float64, for the columns of any stretch; it may work in the rows' memory
Combine = Callable[[Tensor], Tensor]


class RobustOptions(BaseModel):
    """Options of every robust strategy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    f: int = Field(
        0,
        ge=0,
        description="How many sites of a round are assumed hostile, or with privacy.secure_group_size how many groups "
        "have one that is. The rule itself does not use it; mixing does, and a round with too few answers for it is "
        "refused.",
    )
    mixing: Literal["none", "nearest"] = Field(
        "none",
        description="`nearest`: each update is first replaced by the mean of the n − f nearest to it (Allouah 2023), "
        "which helps where sites' data differ. Needs f.",
    )
    norm_bound: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["median"] = Field(
        "median",
        description="The L2 norm to which a longer update is scaled down, or `median`: norm_multiple times the median "
        "norm of the round.",
    )
    norm_multiple: float = Field(
        2.0,
        gt=0,
        allow_inf_nan=False,
        description="How many times the round's median norm an update may be long, with norm_bound: median.",
    )
    lr: float = Field(1.0, gt=0, le=100, description="η, the server's learning rate.")

    @model_validator(mode="after")
    def _mixing_knows_how_many(self) -> RobustOptions:
        if self.mixing == "nearest" and self.f == 0:
            raise ValueError("mixing nearest with f = 0 makes every update the plain mean: give f, at least 1")
        return self


class StatedOptions(RobustOptions):
    """Options of a rule that works with f, which must be given: nobody but the recipe's author can know it."""

    # no number is a good default; null stands for none where options are listed, and is refused
    f: int = Field(
        cast(int, None),
        ge=0,
        validate_default=True,
        description="How many sites of a round are assumed hostile, or with privacy.secure_group_size how many groups "
        "have one that is. Must be given.",
    )

    @field_validator("f", mode="before")
    @classmethod
    def _given(cls, value: object) -> object:
        if value is None:
            raise ValueError("f must be given: how many sites of a round are assumed hostile")
        return value


class RobustStrategy(SideBySideStrategy):
    """θ ← θ + η·rule(rows), the rows being the round's updates Δᵢ, none longer than the norm bound.

    In this order: rows longer than the bound are scaled down to it; with `mixing: nearest` each is replaced by the mean
    of its n − f nearest; the rule makes one vector of them. Updates count alike: a weight is what a site says of
    itself, and a hostile one would say much. All is computed in float64, and θ is rounded once.

    The rows are read twice, and only a stretch of them is held. A subclass states `needed`: (a, b) where a round needs
    a·f + b answers for the rule to hold what it promises. One with a slot has the last aggregate in it, and its rule
    gets it as a last row, neither bounded nor mixed.
    """

    Options: ClassVar[type[BaseModel]] = RobustOptions
    needed: ClassVar[tuple[int, int]] = (2, 1)
    #: whether the rule works with the inner products of different rows
    pairwise: ClassVar[bool] = False
    of_group_means = True

    options: RobustOptions

    def __init__(self, options: BaseModel | None = None, *, num_sites: int = 1) -> None:
        """Args: as of every strategy. A single site stands for a number that is not known yet, and is not checked.

        Raises:
            RecipeError: the run has fewer sites than the rule needs with this f.
        """
        super().__init__(options, num_sites=num_sites)
        if num_sites > 1:
            self.check(num_sites)

    @classmethod
    def least_answers(cls, f: int) -> int:
        """The least number of updates of a round among which the rule withstands f hostile ones."""
        return cls.needed[0] * f + cls.needed[1]

    @property
    def least_updates(self) -> int:
        return self.least_answers(self.options.f)

    def check(self, num_sites: int) -> None:
        """Raises RecipeError: a round of `num_sites`, all the sites that it can have, is too small for this f."""
        wrong = self._too_few(num_sites)
        if wrong:
            raise RecipeError(f"{wrong[0]}, and the run has {num_sites}", hint=wrong[1])

    def _too_few(self, num_updates: int) -> tuple[str, str] | None:
        """What is wrong with so few updates, and what to do; None if they are enough."""
        f, least = self.options.f, self.least_updates
        if num_updates >= least:
            return None
        most = (num_updates - self.needed[1]) // self.needed[0]
        lower = f"lower f to {most}, " if most >= 0 else "choose another strategy, "
        return (
            f"federation.strategy {self.name!r} with f = {f} needs the updates of at least {least} sites a round",
            f"{lower}or see to it that {least} answer: more sites in federation.cohort, and federation.min_sites "
            f"{least}, so that a round with fewer is abandoned and tried again",
        )

    def merge(self, table: SideBySide) -> None:
        updates = table.updates
        wrong = self._too_few(len(updates))
        if wrong:
            raise RoundError(f"{wrong[0]}, and {len(updates)} answered in round {updates[0].round}", hint=wrong[1])
        slots, mixes = self.slot_names, self.options.mixing == "nearest"
        columns = self.columns(num_columns(table), updates[0].round)
        seen = survey(table, slots, pairwise=self.pairwise or mixes, columns=columns)
        prepared = self._prepared(seen.products, len(updates))
        samples = tuple(prepared.rows_(sample) for sample in seen.samples)
        combine = self.plan(Survey(prepared.products(seen.products), samples), updates)
        for stretch, rows in all_rows(table, slots):
            found = combine(prepared.rows_(rows))
            for slot in slots:
                table.hold(slot, stretch, found)
            theta = table.held(THETA, stretch)
            table.hold(THETA, stretch, found.mul_(self.options.lr).add_(theta))

    def _prepared(self, products: Tensor, num_updates: int) -> Prepared:
        """How the first rows, which are the updates', are bounded and mixed; others are left alone."""
        sent = products[:num_updates, :num_updates]
        scales = torch.ones(len(products), dtype=torch.float64)
        scales[:num_updates] = scales_within(sent, self._bound(sent))
        if self.options.mixing == "none":
            return Prepared(scales)
        nearest = torch.eye(len(products), dtype=torch.float64)
        bounded = Prepared(scales[:num_updates]).products(sent)
        nearest[:num_updates, :num_updates] = nearest_rows(bounded, self.options.f)
        return Prepared(scales, nearest)

    def _bound(self, products: Tensor) -> float:
        if self.options.norm_bound == "median":
            return self.options.norm_multiple * float(torch.quantile(products.diagonal().sqrt(), 0.5))
        return self.options.norm_bound

    def columns(self, num_columns: int, round: int) -> list[list[int]]:
        """Sets of columns, each in ascending order, whose values the rule wants to see beforehand."""
        return []

    @abstractmethod
    def plan(self, seen: Survey, updates: Sequence[Update]) -> Combine:
        """What to make of the rows, which are bounded and mixed, and come from these updates in this order.

        Args:
            seen: the inner products of all rows if the strategy is `pairwise`, else their squares alone; and the
                samples of `columns`.
        """
