"""HetLoRA: average factors of different ranks, padded with zeros, by how much each site's product says."""

from __future__ import annotations

from collections.abc import Sequence

from .factors import Factors, frobenius_of_product
from .pairs import PairsStrategy


class HetLoRA(PairsStrategy):
    """A ← Σ qᵢ[Aᵢ; 0], B ← Σ qᵢ(sᵢ/s)[Bᵢ 0], qᵢ = ‖sᵢBᵢAᵢ‖_F / Σⱼ ‖sⱼBⱼAⱼ‖_F (Cho et al. 2024).

    A site is handed the first rᵢ rows of A and columns of B. What lies beyond rᵢ comes from the sites of higher rank
    alone, and is damped by the zeros of the others; the norm weighs against that, as a product of more directions is
    longer. An average of factors is not the factors of the average: the result is not Σ pᵢsᵢBᵢAᵢ, which `flexlora`
    comes nearest to.

    The norm is all that weighs, as in the paper: `federation.weighting` is without effect. Where the paper leaves it
    open, here

    - each module has weights of its own, and counts the sites that hold it (`PairsStrategy`);
    - a site's scale sᵢ goes with its B, both ways, so that sites of different α mean the same by a product;
    - rows and columns that no site of the round holds stay: made zero, both would never see a gradient again. So does
      all of a module while every product is zero, as before any step.

    The paper's self-pruning, by which a site gives up ranks that it does not use, is not part of this.
    """

    name = "hetlora"
    rule = "A ← Σ qᵢ[Aᵢ; 0], B ← Σ qᵢ(sᵢ/s)[Bᵢ 0], qᵢ ∝ ‖sᵢBᵢAᵢ‖_F"
    source = (
        "Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024, "
        "arXiv:2401.06432"
    )
    mixed_shapes = True

    def combine_pair(self, before: Factors, sites: Sequence[Factors], weights: Sequence[float]) -> Factors:
        norms = [abs(site.scale) * frobenius_of_product(site.B, site.A) for site in sites]
        total, held = sum(norms), max(site.rank for site in sites)
        B, A = before.B.clone(), before.A.clone()
        if total > 0:
            B[:, :held], A[:held] = 0, 0
            for site, norm in zip(sites, norms, strict=True):
                B[:, : site.rank].add_(site.B, alpha=norm / total * site.scale)
                A[: site.rank].add_(site.A, alpha=norm / total)
        return Factors(B, A)
