"""LoRA-FAIR: plain averages of both factors, and a correction of B that brings their product near the right one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .factors import Factors, mean, residual
from .pairs import PairsStrategy


class LoRAFair(PairsStrategy):
    """A ← Ā, B ← B̄ + ΔB, with ΔB = argmin ‖(B̄ + ΔB)Ā − W‖² + λa·‖ΔB‖², W = Σ pᵢBᵢAᵢ, a = ‖Ā‖²/r.

    All norms are Frobenius's. The solution is that of ridge regression, ΔB = (W − B̄Ā)Āᵀ(ĀĀᵀ + λa·I)⁻¹.

    That is not the paper's objective (Bian et al. 2024), which is 1 − cos(W, (B̄ + ΔB)Ā) + λ‖ΔB‖, minimised by gradient
    steps on the server. The two differ so:

    - Without λ both have the same direction: of all products XĀ, W's projection on the row space of Ā is the nearest to
      W, and has the largest cosine with it. The cosine cannot see a product's length; least squares sets it.
    - With λ the optima differ. The paper's norm is not squared and is set against a cosine: it may leave ΔB exactly 0,
      and depends on B's size. Here the penalty shrinks ΔB in each direction of Ā's rows by e/(e + λa), e being the
      eigenvalue of ĀĀᵀ and a the mean of all, so λ is a pure number: it means the same however A and B share
      their sizes. At .01 a direction of mean strength keeps 99% of its correction.
    - A closed form needs no learning rate or number of steps, and gives the same bits each time.

    What lies outside the row space of Ā stays lost, as in the paper.
    """

    name = "lora-fair"
    rule = "A ← Ā; B ← B̄ + (Σ pᵢBᵢAᵢ − B̄Ā)Āᵀ(ĀĀᵀ + λ(‖Ā‖²/r)I)⁻¹"
    source = (
        "Bian et al., LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, "
        "ICCV 2025, arXiv:2411.14961"
    )

    class Options(BaseModel):
        """LoRA-FAIR's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        regularization: float = Field(
            0.01,
            ge=0,
            le=1e6,
            description="λ, how strongly the correction of B is held back, as a fraction of the mean squared row of A. "
            "Known to be good: 0.01, the paper's choice for its own objective; 0: none.",
        )

    options: Options

    def combine_pair(self, before: Factors, sites: Sequence[Factors], weights: Sequence[float]) -> Factors:
        average = mean(sites, weights)
        missing = residual(sites, weights, average)
        return Factors(average.B + ridge(missing, average.A, self.options.regularization), average.A)


def ridge(target: Factors, A: Tensor, regularization: float) -> Tensor:
    """argmin over X of ‖XA − T‖² + λ(‖A‖²/r)·‖X‖²; out × r. With λ = 0 and dependent rows of A, the smallest such X.

    Args:
        target: T as factors, of scale 1: out × in.
        A: r × in, float64.
        regularization: λ, at least 0.

    Raises:
        torch.linalg.LinAlgError: A holds NaN or infinity.
    """
    u, s, vt = torch.linalg.svd(A, full_matrices=False)
    squares = s.square()
    penalty = regularization * squares.sum() / A.shape[0]
    # directions that rounding alone has made are none
    real = s > s[0] * torch.finfo(s.dtype).eps * max(A.shape)
    filtered = torch.where(real, s / (squares + penalty), 0.0)
    solution: Tensor = (target.B @ (target.A @ vt.T) * filtered) @ u.T
    return solution
