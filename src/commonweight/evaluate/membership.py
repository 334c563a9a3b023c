"""Membership inference: how well a score tells rows that a model was trained on from rows that it was not.

Figures: the area under the ROC curve (AUC), which is the chance that a row trained on has the larger score of two, and
the share of rows trained on that are recognised (TPR) while at most a given share of the others is taken for such
(FPR); it is the latter that says whether a few people are exposed (Carlini et al., Membership Inference Attacks From
First Principles, S&P 2022).

Scores, both larger for rows trained on:

- reference loss: the base model's mean loss of the row less the trained one's, so that rows that are easy for any
  model do not look known (Carlini et al. 2021, Extracting Training Data from Large Language Models; Mireshghallah et
  al. 2022)
- Min-K%++: at each learned token (log p(token) − μ)/σ, with μ and σ the mean and the standard deviation of log p over
  the vocabulary under the model's own p; the mean over the lowest k % of a row's tokens (Zhang et al., Min-K%++, ICLR
  2025, arXiv:2404.02936). It needs no base model. k = 20 is our choice.

Intervals are bootstrap intervals by groups (`bootstrap.py`), members' and others' groups drawn apart.

Legend: N rows, G groups, U different scores, B resamples, L labelled positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.tokens import Tokens
from ..train.batches import collate
from ..train.loss import LanguageModel
from .bootstrap import Floats, boundary_interval, interval, resample_indices
from .scoring import batch_tokens, by_length

#: rates of false alarms at which the rate of right ones is reported
FPRS = (0.01, 0.001)
LOWEST_SHARE = 0.2


def auc(members: Floats, others: Floats) -> float:
    """The chance that a member's score is above another's; a draw counts a half."""
    members_1N, others_1N = np.ones((1, len(members))), np.ones((1, len(others)))
    return float(_Curves(members, others).auc(members_1N, others_1N)[0])


def tpr_at_fpr(members: Floats, others: Floats, fpr: float) -> float:
    """The largest share of members above a threshold that at most `fpr` of the others is above."""
    members_1N, others_1N = np.ones((1, len(members))), np.ones((1, len(others)))
    return float(_Curves(members, others).tpr(members_1N, others_1N, fpr)[0])


class _Curves:
    """ROC curves of one set of scores under any weights of its rows."""

    def __init__(self, members: Floats, others: Floats) -> None:
        _, place = np.unique(np.concatenate([members, others]), return_inverse=True)
        self.size = int(place.max()) + 1
        self.members_N, self.others_N = place[: len(members)], place[len(members) :]

    def auc(self, members_BN: Floats, others_BN: Floats) -> Floats:
        p_BU, n_BU = self._by_score(self.members_N, members_BN), self._by_score(self.others_N, others_BN)
        below_BU = np.cumsum(n_BU, axis=1) - n_BU / 2
        area_B: Floats = (p_BU * below_BU).sum(axis=1) / (p_BU.sum(axis=1) * n_BU.sum(axis=1))
        return area_B

    def tpr(self, members_BN: Floats, others_BN: Floats, fpr: float) -> Floats:
        p_BU, n_BU = self._by_score(self.members_N, members_BN), self._by_score(self.others_N, others_BN)
        fp_BU, tp_BU = (np.cumsum(w_BU[:, ::-1], axis=1) for w_BU in (n_BU, p_BU))
        allowed_B1 = fpr * fp_BU[:, -1:] * (1 + 1e-12)
        rate_B: Floats = np.where(fp_BU <= allowed_B1, tp_BU, 0).max(axis=1) / tp_BU[:, -1]
        return rate_B

    def _by_score(self, place_N: NDArray[np.int64], weights_BN: Floats) -> Floats:
        sums_UB = np.zeros((self.size, len(weights_BN)))
        np.add.at(sums_UB, place_N, weights_BN.T)
        return sums_UB.T


def membership(
    members: Floats,
    others: Floats,
    member_groups: Sequence[str],
    other_groups: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """AUC and TPR with their 95 % intervals, as JSON: `auc`, `auc_ci95`, `tpr` (by FPR: `rate`, `ci95`).

    Args:
        members: scores of rows trained on.
        others: scores of rows not trained on.
        member_groups, other_groups: the group of each row (patient, disease …); rows of one are drawn together.
    """
    curves = _Curves(members, others)
    weights_BN, num_groups = _weights(member_groups, resamples, (seed, 0))
    other_weights_BN, num_other = _weights(other_groups, resamples, (seed, 1))
    degrees, fewest = num_groups + num_other - 2, min(num_groups, num_other)

    def bounds(value: float, replicates_B: Floats, groups: int) -> list[float] | None:
        return boundary_interval(value, groups) if value in (0.0, 1.0) else interval(replicates_B, degrees)

    area = auc(members, others)
    rates = {fpr: tpr_at_fpr(members, others, fpr) for fpr in FPRS}
    return {
        "members": len(members),
        "others": len(others),
        "auc": area,
        # an AUC of 1 is at least so many independent pairs, all of them in the right order
        "auc_ci95": bounds(area, curves.auc(weights_BN, other_weights_BN), fewest),
        "tpr": {
            f"{fpr:g}": {
                "rate": rate,
                "ci95": bounds(rate, curves.tpr(weights_BN, other_weights_BN, fpr), num_groups),
            }
            for fpr, rate in rates.items()
        },
    }


def _weights(groups: Sequence[str], resamples: int, seed: Sequence[int]) -> tuple[Floats, int]:
    """How often each row is drawn in each resample, [B, N], and the number of groups."""
    names, code_N = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    counts = [_counts(drawn, len(names)) for drawn in resample_indices(len(names), resamples, seed)]
    return np.concatenate(counts)[:, code_N], len(names)


def _counts(drawn_bD: NDArray[np.int64], num_groups: int) -> Floats:
    counts_bG = np.zeros((len(drawn_bD), num_groups))
    np.add.at(counts_bG, (np.arange(len(drawn_bD))[:, None], drawn_bD), 1)
    return counts_bG


@torch.no_grad()
def min_k_plus_plus(language_model: LanguageModel, tokens: Tokens, share: float = LOWEST_SHARE) -> Floats:
    """Min-K%++ of each of N examples, [N]."""
    language_model.model.eval()
    scores = np.zeros(len(tokens))
    for rows in by_length(tokens, batch_tokens(language_model.device)):
        batch = collate(tokens, [[row] for row in rows], language_model.device)
        states, targets, examples = language_model.at_labels(batch)
        found = [
            standardised(language_model.logits(states[p]), targets[p]) for p in language_model.pieces(len(targets))
        ]
        z_L, example_L = torch.cat(found).cpu().numpy(), examples.cpu().numpy()
        for row in rows:
            scores[row] = lowest_mean(z_L[example_L == row], share)
    return scores


def standardised(logits_LV: Tensor, targets_L: Tensor) -> Tensor:
    """(log p(target) − μ)/σ at each position, float64 [L]; where σ is 0, the model gives all tokens one chance: 0."""
    log_p_LV = torch.log_softmax(logits_LV.double(), dim=-1)
    p_LV = log_p_LV.exp()
    mean_L = (p_LV * log_p_LV).sum(dim=-1)
    variance_L = (p_LV * (log_p_LV - mean_L[:, None]) ** 2).sum(dim=-1)
    z_L = (log_p_LV.gather(1, targets_L[:, None])[:, 0] - mean_L) / variance_L.sqrt()
    return torch.where(variance_L > 0, z_L, torch.zeros_like(z_L))


def lowest_mean(values_L: Floats, share: float) -> float:
    """The mean of the lowest `share` of the values, at least of one."""
    count = max(1, math.ceil(share * len(values_L) - 1e-9))
    return float(np.sort(values_L)[:count].mean())
