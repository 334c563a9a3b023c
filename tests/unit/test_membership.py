"""Membership inference: each figure against a few lines of its own."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commonweight.data.tokens import Tokens
from commonweight.evaluate import membership as module
from commonweight.evaluate.membership import auc, lowest_mean, membership, min_k_plus_plus, standardised, tpr_at_fpr
from commonweight.train.loss import LanguageModel
from tests.unit.tiny_models import tiny

RNG = np.random.default_rng(5)


def test_auc_counts_pairs() -> None:
    members, others = np.array([3.0, 1.0, 2.0, 2.0]), np.array([0.0, 2.0, 1.0])
    pairs = [1.0 if m > o else 0.5 if m == o else 0.0 for m, o in itertools.product(members, others)]
    assert auc(members, others) == pytest.approx(sum(pairs) / len(pairs))
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1
    assert auc(np.array([1.0]), np.array([1.0])) == 0.5


def test_tpr_is_the_best_of_all_thresholds() -> None:
    for _ in range(20):
        members, others = RNG.integers(0, 12, 30) * 1.0 + 2, RNG.integers(0, 12, 20) * 1.0
        for fpr in (0.0, 0.05, 0.1, 0.33):
            # "above t" for every t that there is, and for one above all
            cuts = [*np.unique(np.concatenate([members, others])) - 0.5, 99]
            best = max((members > t).mean() for t in cuts if (others > t).mean() <= fpr + 1e-12)
            assert tpr_at_fpr(members, others, fpr) == pytest.approx(best)


def test_one_false_alarm_in_a_hundred_is_allowed_at_one_percent() -> None:
    others = np.arange(100.0)
    members = np.array([98.5, 98.5, 97.5, 3.0])
    assert tpr_at_fpr(members, others, 0.01) == 0.5
    assert tpr_at_fpr(members, others, 0.001) == 0


def test_the_interval_holds_the_truth() -> None:
    """Normal scores one standard deviation apart: AUC = Φ(1/√2) = .760; rows in groups of two."""
    truth, hits = 0.5 * (1 + math.erf(0.5)), 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        shared = [np.repeat(rng.normal(size=30), 2) for _ in range(2)]
        noise = [rng.normal(size=60) for _ in range(2)]
        members, others = ((a + b) / math.sqrt(2) for a, b in zip(shared, noise, strict=True))
        groups = [str(k // 2) for k in range(60)]
        found = membership(members + 1, others, groups, groups, resamples=300, seed=seed)
        low, high = found["auc_ci95"]
        assert low < found["auc"] < high
        hits += low <= truth <= high
    assert hits >= 53


def test_certainty_has_an_interval_too_and_few_groups_have_none() -> None:
    groups = [str(k) for k in range(20)]
    found = membership(np.arange(20.0) + 50, np.arange(20.0), groups, groups, resamples=100, seed=0)
    assert found["auc"] == 1
    assert found["auc_ci95"][0] == pytest.approx(1 - (1 - 0.025 ** (1 / 20)))
    assert set(found["tpr"]) == {"0.01", "0.001"}
    few = membership(np.arange(3.0), np.arange(3.0) + 0.5, groups[:3], groups[:3], resamples=100, seed=0)
    assert few["auc_ci95"] is None


def test_min_k_plus_plus_of_three_tokens() -> None:
    """A vocabulary of three with chances 1/2, 1/4, 1/4: log p is −1, −2, −2 in bits, its mean −1.5, its spread .5."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]])).repeat(2, 1)
    z = standardised(logits, torch.tensor([0, 2]))
    torch.testing.assert_close(z, torch.tensor([1.0, -1.0], dtype=torch.float64), rtol=0, atol=1e-6)
    even = standardised(torch.zeros(1, 4), torch.tensor([1]))
    assert float(even[0]) == 0


def test_the_lowest_fifth_and_at_least_one() -> None:
    assert lowest_mean(np.array([5.0, 1.0, 4.0, 2.0, 3.0]), 0.2) == 1
    assert lowest_mean(np.array([5.0, 1.0, 4.0, 2.0, 3.0]), 0.4) == 1.5
    assert lowest_mean(np.array([5.0]), 0.2) == 5
    assert lowest_mean(np.arange(11.0), 0.2) == 1


def test_min_k_plus_plus_of_a_model(tmp_path: Path) -> None:
    """Example by example, from the model's own logits, in NumPy."""
    torch.manual_seed(0)
    model: Any = tiny("llama")
    rng = np.random.default_rng(0)
    rows = []
    for length in (9, 4, 17):
        labelled = np.arange(length) >= 2
        rows.append((rng.integers(3, 60, length).astype(np.int32), labelled))
    tokens = Tokens.of(rows)
    found = min_k_plus_plus(LanguageModel(model), tokens, 0.2)
    for i, (ids, labelled) in enumerate(rows):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].double().numpy()
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        p = np.exp(log_p)
        mean = (p * log_p).sum(-1)
        spread = np.sqrt((p * log_p**2).sum(-1) - mean**2)
        z = [(log_p[t - 1, ids[t]] - mean[t - 1]) / spread[t - 1] for t in range(1, len(ids)) if labelled[t]]
        expected = np.mean(sorted(z)[: math.ceil(0.2 * len(z))])
        assert found[i] == pytest.approx(expected, rel=1e-4)
    assert module.LOWEST_SHARE == 0.2
