"""What LoRA's strategies share: pairs of factors are combined side by side, every other tensor is averaged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import RecipeError, RoundError
from ...model.shapes import matrices
from ...model.tensors import Layout, NamedTensors, accumulator_dtype
from ..base import ServerState
from ..individuals import IndividualsStrategy, weights_of
from ..update import Update
from .factors import Factors

_HINT = "choose a LoRA adapter (model.adapter), or a strategy that averages any tensors, such as fedavg"


class PairsStrategy(IndividualsStrategy):
    """A strategy on pairs A, B. A subclass writes `combine_pair`.

    The adapter's scale s is constant and multiplies all alike, so it drops out: a site's factors here have the scale
    sᵢ/s, which is 1 unless the recipe gives the site an α of its own. A pair is combined in float64 and rounded once,
    to theta's dtype; pairs are taken one after the other, so that the memory beside the held updates is a single
    pair's. Tensors of no pair, such as a head that is trained whole, become θ + Σ pᵢΔᵢ, as in FedAvg; integers stay.

    Where sites hold different parts of the adapter (`mixed_shapes`), a module is combined from those that hold it, with
    weights that add up to 1 among them, and stays as it is if none of them answered. That is our choice, as the papers
    vary ranks only: were the others counted with a product of zero, a module that one site in ten holds would lose nine
    tenths of itself every round. Updates come in the whole adapter's layout, zero beyond a site's part.
    """

    pairs = True

    def validate(self, layout: Layout) -> None:
        """Whether the strategy can run on tensors of this layout.

        Raises:
            RecipeError: there is no LoRA pair among them.
        """
        if not matrices(layout):
            raise RecipeError(self._without_pairs(layout), hint=_HINT)

    def init(self, theta: NamedTensors) -> ServerState:
        """The state before round 1.

        Raises:
            RecipeError: theta holds no LoRA pair.
        """
        self.validate(theta.layout)
        return super().init(theta)

    def combine(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """A round's result.

        Raises:
            RoundError: theta holds no LoRA pair, or factors are too large for their product.
        """
        theta, weights = state.theta, weights_of(updates)
        found = matrices(theta.layout)
        if not found:
            raise RoundError(self._without_pairs(theta.layout), hint=_HINT)
        for module, (name_a, name_b) in found.items():
            before = Factors(theta[name_b].double(), theta[name_a].double())
            holders = [(u, w) for u, w in zip(updates, weights, strict=True) if self._holds(u.site, name_a)]
            if not holders:
                continue
            sites = [self._factors(theta, u, name_a, name_b) for u, _ in holders]
            among = [w for _, w in holders]
            if len(holders) < len(updates):
                among = [w / sum(among) for w in among]
            try:
                after = self.combine_pair(before, sites, among)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, but its stub is silent
                raise RoundError(
                    f"the sites' products B·A of {module!r} cannot be decomposed: {error}",
                    hint="lower training.lr, or set training.clip_norm; the last committed round is untouched",
                ) from error
            theta[name_a].copy_(after.A)
            theta[name_b].copy_(after.B)
        paired = {name for pair in found.values() for name in pair}
        for name, tensor in theta.items():
            if name not in paired and tensor.is_floating_point():
                _average(tensor, [update.delta[name] for update in updates], weights)
        return state

    def _holds(self, site: str, name: str) -> bool:
        shape = self.shapes.get(site)
        return shape is None or shape.holds(name)

    def _factors(self, theta: NamedTensors, update: Update, name_a: str, name_b: str) -> Factors:
        """A site's own factors after its work: what it was handed, and its delta."""
        shape = self.shapes.get(update.site)
        if shape is None:
            B, A = (theta[name].double() + update.delta[name] for name in (name_b, name_a))
            return Factors(B, A)
        B, A = (
            shape.handed(name, theta[name]).double() + shape.part(name, update.delta[name]) for name in (name_b, name_a)
        )
        return Factors(B, A, shape.ratio)

    @abstractmethod
    def combine_pair(self, before: Factors, sites: Sequence[Factors], weights: Sequence[float]) -> Factors:
        """A layer's new factors, of the rank that it had.

        Args:
            before: the global B (out × r) and A (r × in), float64, before the round.
            sites: each site's Bᵢ and Aᵢ after its local work, float64, and sᵢ/s; of other ranks than r and other scales
            than 1 only if `mixed_shapes`.
            weights: pᵢ, which add up to 1.

        Raises:
            torch.linalg.LinAlgError: the factors are too large for their product.
        """

    def _without_pairs(self, layout: Layout) -> str:
        names = ", ".join(list(layout.by_name)[:3])
        return f"{self.name} combines LoRA pairs (lora_A, lora_B), and there are none among the trainables: {names} …"


def _average(theta: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> None:
    """θ ← θ + Σ pᵢΔᵢ, summed in the accumulator's precision and rounded once."""
    total = torch.zeros(theta.shape, dtype=accumulator_dtype(theta.dtype))
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta.to(total.dtype), alpha=weight)
    theta.copy_(total.add_(theta))
