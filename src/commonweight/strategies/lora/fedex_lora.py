"""FedEx-LoRA: plain averages of both factors, and what their product lacks goes into the base."""

from __future__ import annotations

from collections.abc import Sequence

from .factors import Factors, mean, residual, shortened
from .pairs import NO_MOVED_BASE, PairsStrategy


class FedExLoRA(PairsStrategy):
    """B ← B̄, A ← Ā, and W₀ ← W₀ + s(Σ pᵢBᵢAᵢ − B̄Ā) (Singhal et al. 2024).

    The adapter is FedAvg's; what its product lacks of the average of the products, the base takes up. That residual is
    s·Σ pᵢ(Bᵢ − B̄)(Aᵢ − Ā), of rank (k − 1)·r at most for k sites, and is sent as factors of that rank, never dense:
    what a site receives grows with the cohort. All sites have one rank.
    """

    name = "fedex-lora"
    moves_base = True
    not_networked = NO_MOVED_BASE
    rule = "A ← Ā; B ← B̄; W₀ ← W₀ + s(Σ pᵢBᵢAᵢ − B̄Ā)"
    source = (
        "Singhal et al., FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language "
        "Models, ACL 2025, arXiv:2410.09432"
    )

    def combine_pair(self, before: Factors, sites: Sequence[Factors], weights: Sequence[float]) -> Factors:
        return mean(sites, weights)

    def left_over(self, sites: Sequence[Factors], weights: Sequence[float], after: Factors) -> Factors:
        return shortened(residual(sites, weights, after), (len(sites) - 1) * after.rank)
