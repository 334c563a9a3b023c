"""FlexLoRA: average the products of the factors, and hand back the best factors of that average."""

from __future__ import annotations

from collections.abc import Sequence

from .factors import Factors, stacked, svd_of_product
from .pairs import PairsStrategy


class FlexLoRA(PairsStrategy):
    """W = Σ pᵢsᵢBᵢAᵢ = s·U·S·Vᵀ; B ← U_r S_r, A ← V_rᵀ (Bai et al. 2024).

    Of all products of rank r that is the nearest to W (Eckart and Young 1936), and W itself if the sites' changes
    happen to have rank r together. Sites may have different ranks, scales and modules: as the rows of A are in falling
    order of their singular values, the first rᵢ that a site is handed, with B times s/sᵢ, are the nearest to W that
    its rank allows. What it was not handed is missing from its product, and so, by its weight, from W. A module counts
    the sites that hold it (`PairsStrategy`).

    The singular values go to B whole. Then the rows of A have length 1, about as drawn at first (uniform in ±1/√in:
    0.58), and a direction that W does not use has a zero column in B and a live row in A, as at LoRA's start, so that
    it can be trained. With √S on both sides both would be zero, and stay so: neither would ever see a gradient.

    While W = 0, as before any step, A stays as it is. If the layer has fewer outputs or inputs than r, or the sites'
    ranks together are less than r, the rows of A beyond stay too, with zeros in B.
    """

    name = "flexlora"
    rule = "W = Σ pᵢsᵢBᵢAᵢ = s·U·S·Vᵀ; B ← U_r S_r, A ← V_rᵀ"
    source = (
        "Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources, "
        "NeurIPS 2024, arXiv:2402.11505"
    )
    mixed_shapes = True

    def combine_pair(self, before: Factors, sites: Sequence[Factors], weights: Sequence[float]) -> Factors:
        total = stacked(sites, weights)
        u, s, vt = svd_of_product(total.B, total.A, before.rank)
        B, A = before.B.new_zeros(before.B.shape), before.A.clone()
        if s[0] > 0:
            B[:, : len(s)] = u * s
            A[: len(s)] = vt
        return Factors(B, A)
