"""Differential privacy of single examples, or of groups of them: a site's steps tell little of any one row that it
trains on, or of any one patient with all rows (DP-SGD).

Privacy unit: an example, one row of the site's training data; or a group, all rows with one value of a field.
Neighbouring data sets: one unit more or fewer. In each step every unit is in the batch with probability q,
independently of the others; the gradient of each that is in it is clipped to L2 norm C over all trained tensors
together; to their sum noise of standard deviation z·C is added to each element, and it is divided by the number of
units that was to be expected (Abadi et al., Deep Learning with Differential Privacy, CCS 2016, arXiv:1607.00133,
algorithm 1). A group's gradient is the mean of those of its rows, of which at most so many are drawn for the step.
Sensitivity of the sum: C, in L2. Sampling: Poisson's, by coins that nobody outside the site can know, so that its
amplification may be claimed.

A site's releases are its steps. What is made of the noisy sums (the optimizer, a strategy's correction, the update, the
global model) costs nothing more. The number of a site's units, of which q is made, is taken as known.

Noise and coins are functions of a key, and the key of the site's secret and of all that the work starts from. So a task
that is done again gives the same bits, and work that starts from anything else has noise of its own: nobody ever gets
two sums with the same noise, whose difference would have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..model.tensors import NamedTensors
from .accounting import Releases, noise_multiplier
from .noise import Coins, GaussianNoise, derived

#: of `unit`: what it is
SAMPLING = "Poisson's: a site draws each {unit} for each step by a coin that nobody else knows"

#: which rows of the noise go to which flat: row 4·step + this
_ROWS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def planned_steps(
    *,
    units: int,
    batch_size: int,
    steps: int,
    rounds: int,
    delta: float,
    z: float | None = None,
    epsilon: float | None = None,
) -> Releases:
    """The releases of one round of a site, which may take part in every round.

    Args:
        units: n, of its training rows or groups of them; q = batch_size/n, at most 1.
        steps: optimizer steps a round.
        z: the noise multiplier; or `epsilon`, which `rounds` such rounds may cost.
    """
    sampling = min(1.0, batch_size / max(1, units))
    if z is None:
        assert epsilon is not None
        z = noise_multiplier(epsilon, delta, count=steps * rounds, sampling=sampling)
    return Releases(z, steps, sampling)


@dataclass(frozen=True)
class NoisySteps:
    """One task's draws and noise.

    Args:
        bound: C.
        noise_multiplier: z.
        sampling: q.
        expected: q·n, what a sum is divided by.
        key: of this task alone.
        units: the training examples of each unit.
        rows: that a unit has in a step, at most.
    """

    bound: float
    noise_multiplier: float
    sampling: float
    expected: float
    key: bytes = field(repr=False)
    units: Sequence[Sequence[int]] = field(default=(), repr=False)
    rows: int = 1

    def drawn(self, step: int) -> list[list[int]]:
        """The units of a step's batch, each with probability q, and the examples of each; perhaps none."""
        coins = Coins(derived(self.key, "sampling")).tossed(step, len(self.units), self.sampling)
        found = [list(self.units[int(place)]) for place in coins.nonzero()[0]]
        return [unit if len(unit) <= self.rows else self._some(unit, step) for unit in found]

    def _some(self, unit: list[int], step: int) -> list[int]:
        """So many of a unit's examples, every choice being equally likely."""
        order = Coins(derived(self.key, f"rows of {unit[0]}")).order(step, len(unit))
        return sorted(unit[place] for place in order[: self.rows])

    @property
    def seed(self) -> int:
        """For whatever else is drawn in the work: dropout."""
        return int.from_bytes(derived(self.key, "dropout")[:8], "big") >> 1

    @torch.no_grad()
    def release(self, total: NamedTensors, step: int) -> NamedTensors:
        """(Σ min(1, C/‖gᵢ‖)·gᵢ + N(0, z²C²))/(q·n), in place.

        Args:
            total: the sum of clipped gradients, wide, on any device.
        """
        noise = GaussianNoise(derived(self.key, "noise"))
        for dtype, flat in total.floating():
            row = flat.cpu()  # the flat itself, if it lies there
            noise.add_(row, self.noise_multiplier * self.bound, number=4 * step + _ROWS[dtype])
            flat.copy_(row.div_(self.expected))
        return total
