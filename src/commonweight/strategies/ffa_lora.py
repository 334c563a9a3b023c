"""FFA-LoRA: one half of every LoRA pair stays as it was made, so that the average of the other half is exact."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .base import SumStrategy


class FFALoRA(SumStrategy):
    """B ← B + Σ pᵢΔBᵢ, with every A as it was first drawn (Sun et al. 2024, section 4).

    The change of a layer's weight is s·BA, s = α/r. With one A for all, Σ pᵢ·s·BᵢA = s·(Σ pᵢBᵢ)A: the average of the
    factors is the average of their products, where averaging A and B both is not. The A are drawn from the recipe's
    seed wherever the model is opened; they are no part of the layout, so they are neither sent nor averaged, and a
    round's bytes are those of the B alone. The adapter that a run leaves holds them all the same.

    Control arms train the same tensors as the sites: B.
    """

    name = "ffa-lora"
    rule = "A as first drawn, never trained or sent; B ← B + ΔB"
    source = "Sun et al., Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, arXiv:2403.12313"
    pairs = True
    frozen = "lora_A"

    def step(self, theta: Tensor, delta: Tensor, slots: Mapping[str, Tensor]) -> None:
        theta.add_(delta)
