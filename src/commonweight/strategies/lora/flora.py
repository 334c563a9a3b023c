"""FLoRA: the sites' pairs side by side are exact; their product goes into the base, and a new pair begins."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...model.tensors import bytes_of
from ...seeding import derive_seed
from .factors import Factors, shortened, stacked
from .pairs import NO_MOVED_BASE, PairsStrategy


class FLoRA(PairsStrategy):
    """W₀ ← W₀ + [B₁ … B_k]·[p₁s₁A₁; …; p_ks_kA_k] = W₀ + Σ pᵢsᵢBᵢAᵢ; then A is drawn anew, B = 0 (Wang et al. 2024).

    Exact for sites of any ranks and scales, and each round's pair may learn another subspace. Weights scale A only: on
    both factors they would be squared. What a site receives grows with the cohort: its rank is that of all the sites'
    pairs together.

    Two choices are ours. The stack is sent as its SVD, of rank min(Σrᵢ, out, in): the same product in as many bytes at
    most, in which the sites' factors do not lie side by side to be read by each other. And A is drawn as LoRA's is at
    first, uniform in ±1/√in, from a seed made of the A before it: the first comes from the recipe's seed, so every
    later one does, and nothing has to be carried for it.
    """

    name = "flora"
    moves_base = True
    not_networked = NO_MOVED_BASE
    mixed_shapes = True
    rule = "W₀ ← W₀ + [B₁ … B_k]·[p₁s₁A₁; …; p_ks_kA_k]; A drawn anew, B ← 0"
    source = (
        "Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations, "
        "NeurIPS 2024, arXiv:2409.05976"
    )

    def combine_pair(self, before: Factors, sites: Sequence[Factors], weights: Sequence[float]) -> Factors:
        return Factors(torch.zeros_like(before.B), drawn_after(before.A))

    def left_over(self, sites: Sequence[Factors], weights: Sequence[float], after: Factors) -> Factors:
        total = stacked(sites, weights)
        return shortened(total, total.rank)


def drawn_after(A: Tensor) -> Tensor:
    """The A (r × in, float64) that follows another: uniform in ±1/√in, as peft draws the first one."""
    seed = derive_seed(0, "flora", hashlib.sha256(bytes_of(A)).hexdigest())
    uniform = torch.rand(A.shape, generator=torch.Generator().manual_seed(seed), dtype=A.dtype)
    return (2 * uniform - 1) / math.sqrt(A.shape[1])
