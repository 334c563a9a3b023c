"""FedNova: updates per local step, so that who works longer does not pull harder.

    θ ← θ + η·τ_eff·Σ pᵢΔᵢ/‖aᵢ‖₁        τ_eff = Σ pᵢ‖aᵢ‖₁        (Wang et al. 2020, Equation 6 and Section 4.1)

Legend: p the sites' weights over their sum; Δᵢ = θᵢ − θ; η the server's learning rate; aᵢ the weights of site i's
gradients in Δᵢ, which are all 1 for plain SGD, so that ‖aᵢ‖₁ is τᵢ, the number of its local steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..errors import RoundError
from ..model.tensors import Layout, NamedTensors
from .base import ServerState, SumStrategy, WeightedSum
from .update import Update


def gradient_weight(steps: int, momentum: float) -> float:
    """‖a‖₁ of so many steps of SGD whose momentum starts at 0: (τ − ρ(1 − ρ^τ)/(1 − ρ))/(1 − ρ); τ for ρ = 0."""
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


class PerStepSum(WeightedSum):
    """Σ wᵢΔᵢ/ρᵢ, and the sums that τ_eff needs.

    Lengths are measured in that of the first update folded: ρᵢ = ‖aᵢ‖₁/‖a₁‖₁. The rule is the same in any unit, and
    where all sites take equal steps every ρᵢ is exactly 1, so that the bits are those of a plain mean. Updates are
    folded in the same order into every stretch of elements, so that all stretches have the same unit.

    Args:
        length: ‖a‖₁ by number of steps.
    """

    def __init__(self, layout: Layout, channels: tuple[str, ...], length: Callable[[int], float]) -> None:
        super().__init__(layout, channels)
        self._length = length
        self._unit = 0.0
        self._total_length = 0.0  # Σ wᵢρᵢ

    def count(self, update: Update) -> None:
        """See `WeightedSum`.

        Raises:
            RoundError: it says that it took no step.
        """
        if update.num_steps < 1:
            raise RoundError(
                f"the update of site {update.site!r} for round {update.round} took {update.num_steps} local steps; "
                "fednova divides by them",
                hint="an objective of one's own must report its steps in LocalResult.num_steps; or use fedavg",
            )
        self._unit = self._unit or self._length(update.num_steps)
        super().count(update)
        self._total_length += update.weight * self._relative(update)

    def merge(self, other: WeightedSum) -> None:
        """See `WeightedSum`. The other sum has a unit of its own: 1/ρᵢ there is (its unit)/(this one) of 1/ρᵢ here."""
        assert isinstance(other, PerStepSum)
        if other.num_updates == 0:
            return
        self._unit = self._unit or other._unit
        ratio = other._unit / self._unit
        self._add_sums(other, 1 / ratio)
        self._total_length += other._total_length * ratio

    def _relative(self, update: Update) -> float:
        return self._length(update.num_steps) / self._unit

    def weight(self, update: Update, channel: str) -> float:
        """wᵢ/ρᵢ."""
        return update.weight / self._relative(update)

    def mean(self) -> NamedTensors:
        """τ_eff·Σ pᵢΔᵢ/‖aᵢ‖₁, in the accumulator's precision; the sum is used up."""
        mean = super().mean()
        effective = self._total_length / self.total_weight
        for _, flat in mean.floating():
            flat.mul_(effective)
        return mean


class FedNova(SumStrategy):
    """θ ← θ + η·τ_eff·Σ pᵢΔᵢ/‖aᵢ‖₁, with τ_eff = Σ pᵢ‖aᵢ‖₁ (Wang et al. 2020, Equation 6 and Section 4.1).

    Where sites take unequal numbers of steps, their plain mean goes to the minimum of another objective, in which a
    site counts by pᵢτᵢ. FedNova averages what each site changed by step, and takes as many steps as the sites did on
    average, so that sites count by pᵢ alone.

    It is derived for SGD at a rate that stays the same within a round, with each site's momentum starting at 0: plain
    (`training.optimizer: sgd`, ‖aᵢ‖₁ = τᵢ), or with the momentum that the option `momentum` repeats. AdamW divides each
    gradient by its own size: Δᵢ is no weighted sum of gradients and no aᵢ exists. Steps are counted there too. The
    length of Δᵢ still grows with them, by about the learning rate each, so the rule takes out most of what unequal
    steps do, but no theorem says that the mean then goes to the right minimum.

    The steps are what a site says. One that claims more than it took shrinks its own part and lengthens everyone's. A
    coordinator takes no claim above the steps that the site's task asked for; but these are what the site, when it
    joined, said that its rows make.
    """

    name = "fednova"
    rule = "θ ← θ + η·τ_eff·Σ pᵢΔᵢ/τᵢ; τ_eff = Σ pᵢτᵢ; τᵢ: local steps (of SGD with momentum: ‖aᵢ‖₁)"
    source = (
        "Wang et al., Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization, "
        "NeurIPS 2020, arXiv:2007.07481"
    )

    class Options(BaseModel):
        """FedNova's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        lr: float = Field(
            1.0, gt=0, le=100, description="η, the server's learning rate. Known to be good: 1, the paper's choice."
        )
        momentum: float = Field(
            0.0,
            ge=0,
            lt=1,
            description="The sites' own `training.momentum`, with optimizer sgd: how much each step weighs follows "
            "from it. 0 counts steps.",
        )

    options: Options

    def open(self, state: ServerState) -> PerStepSum:
        length = partial(gradient_weight, momentum=self.options.momentum)
        return PerStepSum(state.theta.layout, self.update_channels, length)

    def step(self, theta: Tensor, delta: Tensor, slots: Mapping[str, Tensor]) -> None:
        theta.add_(delta, alpha=self.options.lr)
