"""Differential privacy of single examples: a site's steps tell little of any one row that it trains on (DP-SGD).

Privacy unit: an example, one row of the site's training data. Neighbouring data sets: one example more or fewer. In
each step every example is in the batch with probability q, independently of the others; the gradient of each that is in
it is clipped to L2 norm C over all trained tensors together; to their sum noise of standard deviation z·C is added to
each element, and it is divided by the number that was to be expected (Abadi et al., Deep Learning with Differential
Privacy, CCS 2016, arXiv:1607.00133, algorithm 1). Sensitivity of the sum: C, in L2. Sampling: Poisson's, by coins that
nobody outside the site can know, so that its amplification may be claimed.

A site's releases are its steps. What is made of the noisy sums (the optimizer, a strategy's correction, the update, the
global model) costs nothing more. The number of a site's examples, of which q is made, is taken as known.

Noise and coins are functions of a key, and the key of the site's secret and of all that the work starts from. So a task
that is done again gives the same bits, and work that starts from anything else has noise of its own: nobody ever gets
two sums with the same noise, whose difference would have none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..model.tensors import NamedTensors
from .accounting import Releases, noise_multiplier
from .noise import Coins, GaussianNoise, derived

SAMPLING = "Poisson's: a site draws each example for each step by a coin that nobody else knows"

#: which rows of the noise go to which flat: row 4·step + this
_ROWS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def planned_steps(
    *,
    examples: int,
    batch_size: int,
    steps: int,
    rounds: int,
    delta: float,
    z: float | None = None,
    epsilon: float | None = None,
) -> Releases:
    """The releases of one round of a site, which may take part in every round.

    Args:
        examples: n, of its training rows; q = batch_size/n, at most 1.
        steps: optimizer steps a round.
        z: the noise multiplier; or `epsilon`, which `rounds` such rounds may cost.
    """
    sampling = min(1.0, batch_size / examples)
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
    """

    bound: float
    noise_multiplier: float
    sampling: float
    expected: float
    key: bytes = field(repr=False)

    def drawn(self, step: int, num_examples: int) -> list[int]:
        """The examples of a step's batch, each with probability q; perhaps none."""
        coins = Coins(derived(self.key, "sampling")).tossed(step, num_examples, self.sampling)
        return [int(place) for place in coins.nonzero()[0]]

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
