"""RoLoRA: the halves of LoRA's pairs are trained in turn, a round each, so that every average is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import SumStrategy


class RoLoRA(SumStrategy):
    """Odd rounds: B ← B + Σ pᵢΔBᵢ with A fixed; even rounds: A ← A + Σ pᵢΔAᵢ with B fixed (Chen et al. 2024).

    In each round the sites share one half, so Σ pᵢ·s·BᵢAᵢ = s·B̄Ā exactly, and both halves learn in the end, which
    FFA-LoRA's A does not. Rounds count from 1. B goes first: it starts at zero, and A's gradient, s·Bᵀ∂L/∂W, is zero as
    long as B is, so that a first round of A would change nothing.

    The layout is the same in every round, so the half that rests travels too, its delta as zeros: a round costs the
    bytes of both halves. Control arms train both halves at once, as plain LoRA.
    """

    name = "rolora"
    rule = "odd rounds: B ← B + ΔB, A fixed; even rounds: A ← A + ΔA, B fixed"
    source = (
        "Chen et al., Robust Federated Finetuning of Foundation Models via Alternating Minimization of LoRA, "
        "2024, arXiv:2409.02346"
    )
    pairs = True
    in_turn = ("lora_A", "lora_B")
    of_plain_mean = False  # what rests in a round has no update, and must get no noise

    def correction(self) -> dict[str, Any]:
        """`{"kind": "freeze", "in_turn": ["lora_A", "lora_B"]}`: what rests in round 1, and in round 2."""
        return {"kind": "freeze", "in_turn": list(self.in_turn)}

    def step(self, theta: Tensor, delta: Tensor, slots: Mapping[str, Tensor]) -> None:
        theta.add_(delta)
