"""What a strategy changes in a site's own steps.

Each correction works on flat gradients, after the loss's gradient is there and before clipping; one that keeps
something from moving also has a word after the optimizer's step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import SiteError
from ..model.tensors import NamedTensors
from ..model.trainables import has_part


class Correction(Protocol):
    """A change to the local gradient, and what the site must then remember and send."""

    def adjust(self, values: NamedTensors, gradients: NamedTensors) -> None:
        """Change the gradients in place, given the current values θᵢ: of the tensors that are shared."""

    def settle(self, values: NamedTensors) -> None:
        """After the optimizer's step: change the values θᵢ in place."""

    def finish(
        self, delta: NamedTensors, *, lr: float, steps: int
    ) -> tuple[dict[str, NamedTensors], dict[str, NamedTensors]]:
        """After the local work: (further channels of the update, the site's new private state)."""


class NoCorrection:
    def adjust(self, values: NamedTensors, gradients: NamedTensors) -> None:
        pass

    def settle(self, values: NamedTensors) -> None:
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


class Own(NoCorrection):
    """The global model is trained as by FedAvg; beside it the site trains a model of its own, for steps of
    v ← v − η(∇L(v) + λ(v − θ)) (Li 2021, arXiv:2012.04221, algorithm 1; λ = 0 leaves it to itself).

    Args:
        pull: λ.
        effort: its optimizer steps for each of the global model's.
    """

    def __init__(self, theta: NamedTensors, pull: float, effort: float) -> None:
        self.pull, self.effort = Prox(theta, pull) if pull else NoCorrection(), effort

    def steps(self, steps: int) -> int:
        """Of its own model, where the global one takes so many."""
        return max(1, math.floor(self.effort * steps + 1e-9))


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


class Freeze(NoCorrection):
    """RoLoRA: a part of the tensors rests, another one each round (Chen 2024, arXiv:2409.02346).

    Its gradient is made zero, so that clipping and the optimizer's moments do not know of it; weight decay, which needs
    no gradient, is undone after each step. So the part keeps θ's bits, and its delta is exactly zero.

    Args:
        in_turn: parts of dotted names; round r rests in_turn[(r − 1) mod their number]. Each tensor has one of them.
        round: r, from 1.
    """

    def __init__(self, theta: NamedTensors, in_turn: Sequence[str], round: int) -> None:
        if round < 1:
            raise ValueError(f"what rests alternates from round 1 on; this is round {round}")
        for name in theta:
            if sum(has_part(name, part) for part in in_turn) != 1:
                raise SiteError(
                    f"the strategy trains {' and '.join(in_turn)} in turn, and {name!r} is not one of them",
                    hint="use model.adapter.kind lora or rslora on linear layers, or federation.strategy fedavg",
                )
        resting = in_turn[(round - 1) % len(in_turn)]
        self.theta = {name: tensor for name, tensor in theta.items() if has_part(name, resting)}
        self.kept: dict[str, Tensor] = {}

    def adjust(self, values: NamedTensors, gradients: NamedTensors) -> None:
        for name in self.theta:
            gradients[name].zero_()

    def settle(self, values: NamedTensors) -> None:
        if not self.kept:
            self.kept = {name: tensor.to(values[name].device) for name, tensor in self.theta.items()}
        for name, tensor in self.kept.items():
            values[name].copy_(tensor)

    def finish(
        self, delta: NamedTensors, *, lr: float, steps: int
    ) -> tuple[dict[str, NamedTensors], dict[str, NamedTensors]]:
        """Raises SiteError: the objective moved what rests."""
        moved = next((name for name in self.theta if delta[name].any()), None)
        if moved is not None:
            raise SiteError(
                f"the objective trained {moved!r}, which rests in this round",
                hint="an objective with a `work` of its own must call task.correction: `adjust` before each optimizer "
                "step and `settle` after it",
            )
        return {}, {}


def correction(
    spec: Mapping[str, Any],
    theta: NamedTensors,
    broadcast: Mapping[str, NamedTensors],
    site_state: Mapping[str, NamedTensors],
    *,
    round: int = 0,
) -> Correction:
    """The correction that a strategy's `correction()` asked for, over one task's global tensors and the site's own.

    Args:
        round: the task's; one that alternates needs it.

    Raises:
        SiteError: a kind that is not known here, or one that does not fit the tensors.
    """
    kind = spec.get("kind")
    if kind == "none":
        return NoCorrection()
    if kind == "prox":
        return Prox(theta, float(spec["mu"]))
    if kind == "own":
        return Own(theta, float(spec["pull"]), float(spec["effort"]))
    if kind == "scaffold":
        return Scaffold(broadcast["control"], site_state.get("control"))
    if kind == "freeze":
        return Freeze(theta, list(spec["in_turn"]), round)
    raise SiteError(
        f"the strategy asks for a correction {kind!r}, which is not known here",
        hint="known are none, prox, own, scaffold and freeze; install the version of commonweight that has it",
    )
