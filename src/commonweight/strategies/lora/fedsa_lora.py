"""FedSA-LoRA: of every LoRA pair A is averaged, and each site keeps a B of its own."""

from __future__ import annotations

from ..fedavg import FedAvg


class FedSALoRA(FedAvg):
    """A ← A + Σ pᵢΔAᵢ; Bᵢ is trained at site i and stays there (Guo et al. 2025).

    The paper finds that the A of different sites become alike, and their B differ with their data: what is common is in
    A. Site i uses s·BᵢA, s = α/r, with the averaged A (r × in) and its own Bᵢ (out × r, zero at first). Averaging one
    factor alone, the A are exactly their mean; but no site's product is an average of products.

    The B are not in the layout of what is sent: a round's bytes are those of the A. A site that has not been invited
    yet has B = 0: the base model.
    """

    name = "fedsa-lora"
    rule = "A ← A + ΔA; each Bᵢ stays at its site"
    source = (
        "Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025, arXiv:2410.01463"
    )
    pairs = True
    personal = ("lora_B",)
