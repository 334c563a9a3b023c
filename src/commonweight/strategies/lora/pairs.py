"""What LoRA's strategies share: pairs of factors are combined side by side, every other tensor is averaged.

A pair can hold a product of rank r, and the average of the sites' products has more. Some strategies leave the rest to
the base: `left_over` says what that is, as thin factors, module by module.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import RecipeError, RoundError
from ...model.shapes import matrices
from ...model.tensors import Entry, Layout, NamedTensors, accumulator_dtype
from ..base import ServerState
from ..individuals import weights_of
from ..side_by_side import THETA, SideBySide, SideBySideStrategy, Stretch
from .factors import Factors

#: why a strategy that `moves_base` cannot run over a network
NO_MOVED_BASE = "it adds to the base, of which each networked site has its own"

_HINT = "choose a LoRA adapter (model.adapter), or a strategy that averages any tensors, such as fedavg"


class PairsStrategy(SideBySideStrategy):
    """A strategy on pairs A, B. A subclass writes `combine_pair`.

    The adapter's scale s is constant and multiplies all alike, so it drops out: a site's factors here have the scale
    sᵢ/s, which is 1 unless the recipe gives the site an α of its own. A pair is combined in float64 and rounded once,
    to theta's dtype; pairs are taken one after the other, so that no more is held than all sites' factors of the
    largest. Tensors of no pair, such as a head that is trained whole, become θ + Σ pᵢΔᵢ, as in FedAvg; integers stay.

    Where sites hold different parts of the adapter (`mixed_shapes`), a module is combined from those that hold it, with
    weights that add up to 1 among them, and stays as it is if none of them answered. That is our choice, as the papers
    vary ranks only: were the others counted with a product of zero, a module that one site in ten holds would lose nine
    tenths of itself every round. Updates come in the whole adapter's layout, zero beyond a site's part.
    """

    pairs = True

    def validate(self, layout: Layout) -> None:
        """Raises RecipeError: there is no LoRA pair among the tensors."""
        if not matrices(layout):
            raise RecipeError(self._without_pairs(layout), hint=_HINT)

    def init(self, theta: NamedTensors) -> ServerState:
        """The state before round 1.

        Raises:
            RecipeError: theta holds no LoRA pair.
        """
        self.validate(theta.layout)
        return super().init(theta)

    def merge(self, table: SideBySide) -> None:
        """See `SideBySideStrategy`.

        Raises:
            RoundError: theta holds no LoRA pair, or factors are too large for their product.
        """
        weights = weights_of(table.updates)
        found = matrices(table.layout)
        if not found:
            raise RoundError(self._without_pairs(table.layout), hint=_HINT)
        modules = {name_a: module for module, (name_a, _) in found.items()}
        paired = {name for pair in found.values() for name in pair}
        # in the layout's order, in which a file is read from front to back
        for entry in table.layout.entries:
            if entry.name in modules:
                self._merge_pair(table, modules[entry.name], *found[modules[entry.name]], weights)
            elif entry.name not in paired and entry.dtype.is_floating_point:
                _average(table, entry, weights)

    def _merge_pair(self, table: SideBySide, module: str, name_a: str, name_b: str, weights: Sequence[float]) -> None:
        places = [place for place, update in enumerate(table.updates) if self._holds(update.site, name_a)]
        if not places:
            return
        entry_a, entry_b = table.layout.by_name[name_a], table.layout.by_name[name_b]
        A, B = (table.held(THETA, Stretch.of(entry)).view(entry.shape) for entry in (entry_a, entry_b))
        # one factor of all sites after the other: what `sent` hands out is good until the next call
        own_a, own_b = self._own(table, places, entry_a, A), self._own(table, places, entry_b, B)
        shapes = [self.shapes.get(table.updates[place].site) for place in places]
        sites = [
            Factors(own_B, own_A, 1.0 if shape is None else shape.ratio)
            for own_B, own_A, shape in zip(own_b, own_a, shapes, strict=True)
        ]
        among = [weights[place] for place in places]
        if len(places) < len(weights):
            among = [weight / sum(among) for weight in among]
        try:
            after = self.combine_pair(Factors(B.double(), A.double()), sites, among)
            left = self.left_over(sites, among, after)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, but its stub is silent
            raise RoundError(
                f"the sites' products B·A of {module!r} cannot be decomposed: {error}",
                hint="lower training.lr, or set training.clip_norm; the last committed round is untouched",
            ) from error
        table.hold(THETA, Stretch.of(entry_a), after.A)
        table.hold(THETA, Stretch.of(entry_b), after.B)
        if left.rank:
            dtype = accumulator_dtype(entry_b.dtype)
            table.leave(module, Factors(left.B.to(dtype), left.A.to(dtype)))

    def _holds(self, site: str, name: str) -> bool:
        shape = self.shapes.get(site)
        return shape is None or shape.holds(name)

    def _own(self, table: SideBySide, places: Sequence[int], entry: Entry, theta: Tensor) -> list[Tensor]:
        """One factor of the sites at these places after their work: what each was handed, and its delta; float64."""
        deltas, found = table.sent(Stretch.of(entry)), []
        for place in places:
            delta, shape = deltas[place].view(entry.shape), self.shapes.get(table.updates[place].site)
            if shape is not None:
                found.append(shape.handed(entry.name, theta).double() + shape.part(entry.name, delta))
            else:
                found.append(theta.double() + delta)
        return found

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

    def left_over(self, sites: Sequence[Factors], weights: Sequence[float], after: Factors) -> Factors:
        """What the pair `after` cannot hold of the sites' work, to be added to the base: of scale 1, and of rank 0 if
        there is nothing.

        Raises:
            torch.linalg.LinAlgError: the factors are too large for their product.
        """
        return Factors(after.B[:, :0], after.A[:0])

    def _without_pairs(self, layout: Layout) -> str:
        names = ", ".join(list(layout.by_name)[:3])
        return f"{self.name} combines LoRA pairs (lora_A, lora_B), and there are none among the trainables: {names} …"


def _average(table: SideBySide, entry: Entry, weights: Sequence[float]) -> None:
    """θ ← θ + Σ pᵢΔᵢ for one tensor, summed in the accumulator's precision and rounded once."""
    for stretch in Stretch.of(entry).cut(len(weights)) if entry.numel else ():
        total = torch.zeros(stretch.numel, dtype=accumulator_dtype(entry.dtype))
        for delta, weight in zip(table.sent(stretch), weights, strict=True):
            total.add_(delta.to(total.dtype), alpha=weight)
        table.hold(THETA, stretch, total.add_(table.held(THETA, stretch)))
