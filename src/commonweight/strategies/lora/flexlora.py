"""FlexLoRA: average the products of the factors, and hand back the best factors of that average."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from .factors import Factors, stacked, svd_of_product
from .pairs import PairsStrategy


class FlexLoRA(PairsStrategy):
    """W = Σ pᵢsᵢBᵢAᵢ = s·U·S·Vᵀ; B ← U_r S_r, A ← V_rᵀ (Bai et al. 2024).

    Of all products of rank r that is the nearest to W (Eckart and Young 1936), and W itself if the sites' changes
    happen to have rank r together. Sites may have different ranks, scales and modules: as the rows of A are in falling
    order of their singular values, the first rᵢ that a site is handed, with B times s/sᵢ, are the nearest to W that
    its rank allows. A module counts the sites that hold it (`PairsStrategy`).

    What a site was not handed is missing from its product, and so, by its weight, from W: with many small sites the
    directions beyond their ranks fade away round by round. With `fill`, which is ours and not the paper's, each site's
    product is filled up with what it was not handed, as it was before the round:

        W + s·Σₖ mₖbₖaₖᵀ, mₖ = Σ pᵢ over the sites with rᵢ < k, bₖ and aₖ being the global B's and A's column and row k

    which is the old product and the mean of what the sites changed of their parts. Where all have rank r, mₖ = 0.

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

    class Options(BaseModel):
        """FlexLoRA's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        fill: bool = Field(
            False,
            description="With sites of lower ranks: count what a site was not handed as unchanged, and not as zero.",
        )

    options: Options

    def combine_pair(self, before: Factors, sites: Sequence[Factors], weights: Sequence[float]) -> Factors:
        total = stacked(sites, weights)
        if self.options.fill and any(site.rank < before.rank for site in sites):
            total = stacked([total, _not_handed(before, sites, weights)], [1.0, 1.0])
        u, s, vt = svd_of_product(total.B, total.A, before.rank)
        B, A = before.B.new_zeros(before.B.shape), before.A.clone()
        if s[0] > 0:
            B[:, : len(s)] = u * s
            A[: len(s)] = vt
        return Factors(B, A)


def _not_handed(before: Factors, sites: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σₖ mₖbₖaₖᵀ."""
    pairs = list(zip(sites, weights, strict=True))
    missing = [sum(weight for site, weight in pairs if site.rank <= k) for k in range(before.rank)]
    return Factors(before.B, before.A * before.A.new_tensor(missing)[:, None])
