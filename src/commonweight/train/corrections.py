"""What a strategy changes in a site's own steps.

Each correction works on flat gradients, after the loss's gradient is there and before clipping.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..model.tensors import NamedTensors


class Correction(Protocol):
    """A change to the local gradient, and what the site must then remember and send."""

    def adjust(self, values: NamedTensors, gradients: NamedTensors) -> None:
        """Change the gradients in place, given the current values θᵢ."""

    def finish(
        self, delta: NamedTensors, *, lr: float, steps: int
    ) -> tuple[dict[str, NamedTensors], dict[str, NamedTensors]]:
        """After the local work: (further channels of the update, the site's new private state)."""


class NoCorrection:
    def adjust(self, values: NamedTensors, gradients: NamedTensors) -> None:
        pass

    def finish(
        self, delta: NamedTensors, *, lr: float, steps: int
    ) -> tuple[dict[str, NamedTensors], dict[str, NamedTensors]]:
        return {}, {}


class Prox(NoCorrection):
    """FedProx: adds μ(θᵢ − θ), the gradient of μ/2 ‖θᵢ − θ‖² (Li 2020, arXiv:1812.06127, equation 2)."""

    def __init__(self, theta: NamedTensors, mu: float) -> None:
        self.theta, self.mu = theta, mu

    def adjust(self, values: NamedTensors, gradients: NamedTensors) -> None:
        for dtype, gradient in gradients.floating():
            theta = self.theta.flats[dtype].to(gradient.device)
            gradient.add_(values.flats[dtype] - theta, alpha=self.mu)


class Scaffold(NoCorrection):
    """SCAFFOLD: each step uses g − cᵢ + c (Karimireddy 2020, arXiv:1910.06378, algorithm 1, option II).

    After K steps cᵢ⁺ = cᵢ − c + (θ − θᵢ)/(Kη). The site keeps cᵢ⁺ and sends cᵢ⁺ − cᵢ as channel `control`. The rule is
    derived for plain SGD; with AdamW (θ − θᵢ)/(Kη) is a mean preconditioned step, not a mean gradient.
    """

    def __init__(self, control: NamedTensors, own: NamedTensors | None) -> None:
        self.control = control
        self.own = own if own is not None else NamedTensors.zeros(control.layout)

    def adjust(self, values: NamedTensors, gradients: NamedTensors) -> None:
        for dtype, gradient in gradients.floating():
            shift = self.control.flats[dtype] - self.own.flats[dtype]
            gradient.add_(shift.to(gradient.device))

    def finish(
        self, delta: NamedTensors, *, lr: float, steps: int
    ) -> tuple[dict[str, NamedTensors], dict[str, NamedTensors]]:
        if lr == 0:  # nothing moved, so nothing is known of the gradient: cᵢ stays
            return {"control": NamedTensors.zeros(delta.layout)}, {"control": self.own}
        change, new = NamedTensors.zeros(delta.layout), NamedTensors.zeros(delta.layout)
        for dtype, flat in delta.floating():
            torch.sub(flat * (-1.0 / (steps * lr)), self.control.flats[dtype], out=change.flats[dtype])
            torch.add(self.own.flats[dtype], change.flats[dtype], out=new.flats[dtype])
        return {"control": change}, {"control": new}


def correction(
    spec: Mapping[str, Any],
    theta: NamedTensors,
    broadcast: Mapping[str, NamedTensors],
    site_state: Mapping[str, NamedTensors],
) -> Correction:
    """The correction that a strategy's `correction()` asked for, over one task's global tensors and the site's own."""
    if spec["kind"] == "prox":
        return Prox(theta, float(spec["mu"]))
    if spec["kind"] == "scaffold":
        return Scaffold(broadcast["control"], site_state.get("control"))
    return NoCorrection()
