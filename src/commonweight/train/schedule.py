"""The learning rate across rounds. Inside a round it is constant, so that a round is one task with one number."""

from __future__ import annotations

import math

from ..recipe.schema import TrainingSpec


def lr_in_round(spec: TrainingSpec, round: int, num_rounds: int) -> float:
    """The local learning rate of round 1 … num_rounds.

    After `warmup_rounds` (rising evenly to `lr`), it falls from `lr` to `lr × final_lr_ratio` in the last round:
    `linear`, or by half a cosine. OpenFedLLM's recipe is `cosine` with ratio 0.02 (Ye 2024, arXiv:2402.06954, section
    4).
    """
    if round <= spec.warmup_rounds:
        return spec.lr * round / (spec.warmup_rounds + 1)
    if spec.schedule == "constant":
        return spec.lr
    first = spec.warmup_rounds + 1
    progress = (round - first) / max(1, num_rounds - first)
    if spec.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return spec.lr * (1 - progress * (1 - spec.final_lr_ratio))
