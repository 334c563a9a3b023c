"""FlexLoRA, LoRA-FAIR, FLoRA and FedEx-LoRA against dense float64 NumPy, on layers whose two sides differ.

The rounds: four sites with unequal weights, one of them missing in the second; two layers of different shapes, a head
that is trained whole, and integers. What is compared is the product B·A, which the model sees,
and with it what FLoRA and FedEx-LoRA leave to the base.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from commonweight import registry
from commonweight.errors import RecipeError, RoundError
from commonweight.model.tensors import Layout, NamedTensors
from commonweight.strategies.base import ServerState, Strategy
from commonweight.strategies.fedavg import FedAvg
from commonweight.strategies.lora.factors import Factors
from commonweight.strategies.lora.fedex_lora import FedExLoRA
from commonweight.strategies.lora.flexlora import FlexLoRA
from commonweight.strategies.lora.flora import FLoRA, drawn_after
from commonweight.strategies.lora.lora_fair import LoRAFair, ridge
from commonweight.strategies.lora.pairs import PairsStrategy
from commonweight.strategies.update import Update, check

Array = NDArray[np.float64]

RANK = 4
LAYERS = {"q": (23, 14), "up.default": (9, 31)}
WEIGHTS = (3.0, 1.0, 7.5, 20.0)
EXACT = [FLoRA, FedExLoRA]
ALL = [FlexLoRA, LoRAFair, *EXACT]
#: of the product's norm, after a round: float64 arithmetic, and one rounding of each factor to its dtype
RTOL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 6e-3}


def names_of(layer: str) -> tuple[str, str]:
    module, _, adapter = layer.partition(".")
    tail = f"{adapter}.weight" if adapter else "weight"
    return f"{module}.lora_A.{tail}", f"{module}.lora_B.{tail}"


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def initial(dtype: torch.dtype = torch.float64) -> NamedTensors:
    made: dict[str, Tensor] = {"head": drawn(90, 5, 3).to(dtype), "ids": torch.tensor([4, -2, 2**40])}
    for seed, (layer, (out, inner)) in enumerate(LAYERS.items()):
        name_a, name_b = names_of(layer)
        made[name_a], made[name_b] = drawn(seed, RANK, inner).to(dtype), drawn(seed + 50, out, RANK).to(dtype)
    return NamedTensors.of(made)


def update_of(delta: NamedTensors, weight: float, site: str = "s", round: int = 1) -> Update:
    return Update(site, round, {"delta": delta}, weight, num_examples=1, num_label_tokens=1, num_steps=1)


def update_to(theta: NamedTensors, reached: Mapping[str, Tensor], weight: float) -> Update:
    """The update of a site that has brought theta to these tensors; what is not named stays."""
    delta = NamedTensors.zeros(theta.layout)
    for name, tensor in reached.items():
        delta[name].copy_(tensor - theta[name])
    return update_of(delta, weight)


def cohort_of(theta: NamedTensors, round: int = 1, absent: int | None = None) -> list[Update]:
    cohort = []
    for site, weight in enumerate(WEIGHTS):
        if site == absent:
            continue
        delta = NamedTensors.zeros(theta.layout)
        for index, (_, tensor) in enumerate(sorted(delta.items())):
            tensor.copy_(drawn(1000 * round + 10 * site + index, *tensor.shape) * 0.7)
        cohort.append(update_of(delta, weight, f"site{site}", round))
    return cohort


def closed(strategy: Strategy, state: ServerState, cohort: Sequence[Update]) -> ServerState:
    fold = strategy.open(state)
    for update in cohort:
        check(update, round=update.round, layout=state.theta.layout, channels=strategy.update_channels)
        fold.add(update)
    return strategy.close(state, fold)


def one_round(strategy: Strategy, theta: NamedTensors, cohort: Sequence[Update]) -> NamedTensors:
    return closed(strategy, strategy.init(theta.clone()), cohort).theta


# what it should be, in NumPy


def as_array(tensor: Tensor) -> Array:
    return tensor.to(torch.float64).numpy().copy()


def product_of(theta: Mapping[str, Tensor], layer: str) -> Array:
    name_a, name_b = names_of(layer)
    product: Array = as_array(theta[name_b]) @ as_array(theta[name_a])
    return product


def site_factors(theta: NamedTensors, cohort: Sequence[Update], layer: str) -> list[tuple[float, Array, Array]]:
    """(pᵢ, Bᵢ, Aᵢ) of the sites that answered."""
    name_a, name_b = names_of(layer)
    total = sum(update.weight for update in cohort)
    return [
        (
            update.weight / total,
            as_array(theta[name_b]) + as_array(update.delta[name_b]),
            as_array(theta[name_a]) + as_array(update.delta[name_a]),
        )
        for update in cohort
    ]


def dense_sum(sites: Sequence[tuple[float, Array, Array]]) -> Array:
    total: Array = np.sum([p * (B @ A) for p, B, A in sites], axis=0)
    return total


def averages(sites: Sequence[tuple[float, Array, Array]]) -> tuple[Array, Array]:
    return np.sum([p * B for p, B, _ in sites], axis=0), np.sum([p * A for p, _, A in sites], axis=0)


def nearest_of_rank(W: Array, rank: int) -> Array:
    u, s, vt = np.linalg.svd(W, full_matrices=False)
    product: Array = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return product


def fair_product(sites: Sequence[tuple[float, Array, Array]], lam: float) -> Array:
    """(B̄ + ΔB)Ā with ΔB from least squares over stacked equations: ΔB·[Ā, √(λa)·I] ≈ [W − B̄Ā, 0]."""
    B, A = averages(sites)
    rank = len(A)
    penalty = np.sqrt(lam * np.sum(A**2) / rank) * np.eye(rank)
    target = np.vstack([(dense_sum(sites) - B @ A).T, np.zeros((rank, len(B)))])
    correction = np.linalg.lstsq(np.vstack([A.T, penalty]), target, rcond=None)[0].T
    product: Array = (B + correction) @ A
    return product


def relative(got: Array, expected: Array) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def cosine(one: Array, other: Array) -> float:
    return float(np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other))


# FlexLoRA


@pytest.mark.parametrize("dtype", list(RTOL), ids=str)
def test_flexlora_gives_the_best_product_of_rank_r_round_after_round(dtype: torch.dtype) -> None:
    strategy = FlexLoRA()
    state = strategy.init(initial(dtype))
    for number, absent in ((1, None), (2, 2), (3, None)):
        before, cohort = state.theta.clone(), cohort_of(state.theta, number, absent)
        state = closed(strategy, state, cohort)
        assert state.theta.layout == before.layout
        for layer in LAYERS:
            sites = site_factors(before, cohort, layer)
            best = nearest_of_rank(dense_sum(sites), RANK)
            assert relative(product_of(state.theta, layer), best) < RTOL[dtype]
            B, A = averages(sites)
            assert relative(B @ A, best) > 0.01


def test_flexlora_is_exact_where_the_sites_products_add_up_to_rank_r_and_the_plain_average_is_not() -> None:
    theta = initial(torch.float32)
    cohort = []
    for site, weight in enumerate(WEIGHTS):
        reached = {}
        for seed, (layer, (out, _)) in enumerate(LAYERS.items()):
            name_a, name_b = names_of(layer)
            # every Aᵢ mixes the same r rows, so the sum's row space has r dimensions
            reached[name_a] = drawn(100 * site + seed, RANK, RANK).float() @ theta[name_a]
            reached[name_b] = drawn(100 * site + seed + 50, out, RANK).float()
        cohort.append(update_to(theta, reached, weight))
    for layer in LAYERS:
        W = dense_sum(site_factors(theta, cohort, layer))
        assert relative(product_of(one_round(FlexLoRA(), theta, cohort), layer), W) < 1e-6
        assert relative(product_of(one_round(FedAvg(), theta, cohort), layer), W) > 0.1


def test_flexlora_leaves_a_as_it_is_while_every_b_is_zero() -> None:
    theta, deltas = initial(torch.float32), []
    for layer in LAYERS:
        theta[names_of(layer)[1]].zero_()
    for update in cohort_of(theta):
        for layer in LAYERS:
            update.delta[names_of(layer)[1]].zero_()
        deltas.append(update)
    after = one_round(FlexLoRA(), theta, deltas)
    for layer in LAYERS:
        name_a, name_b = names_of(layer)
        assert torch.equal(after[name_a], theta[name_a])
        assert not after[name_b].any()


def test_flexlora_keeps_a_direction_that_is_not_used_yet_able_to_learn() -> None:
    theta = initial(torch.float32)
    reached = {}
    for seed, (layer, (out, _)) in enumerate(LAYERS.items()):
        reached[names_of(layer)[1]] = (drawn(seed, out, 1) @ drawn(seed + 9, 1, RANK)).float()  # W has rank 1
    after = one_round(FlexLoRA(), theta, [update_to(theta, reached, 2.0)])
    for layer in LAYERS:
        name_a, name_b = names_of(layer)
        np.testing.assert_allclose(after[name_a].norm(dim=1).numpy(), np.ones(RANK), rtol=1e-6)
        assert after[name_b][:, 1:].abs().max() < 1e-5 * after[name_b][:, 0].norm()


@pytest.mark.parametrize(("out", "inner"), [(2, 7), (7, 2)])
def test_flexlora_is_exact_on_a_layer_with_fewer_outputs_or_inputs_than_its_rank(out: int, inner: int) -> None:
    theta = NamedTensors.of({"h.lora_A.weight": drawn(1, RANK, inner), "h.lora_B.weight": drawn(2, out, RANK)})
    cohort = cohort_of(theta)
    total = sum(WEIGHTS)
    W = np.sum(
        [
            u.weight
            / total
            * as_array(theta["h.lora_B.weight"] + u.delta["h.lora_B.weight"])
            @ as_array(theta["h.lora_A.weight"] + u.delta["h.lora_A.weight"])
            for u in cohort
        ],
        axis=0,
    )
    after = one_round(FlexLoRA(), theta, cohort)
    assert relative(as_array(after["h.lora_B.weight"] @ after["h.lora_A.weight"]), W) < 1e-12
    assert torch.equal(after["h.lora_A.weight"][2:], theta["h.lora_A.weight"][2:])


def test_flexlora_sees_the_sites_products_and_not_how_their_factors_share_them() -> None:
    theta = initial()
    cohort = cohort_of(theta)
    turned = []
    for site, update in enumerate(cohort):
        reached = {}
        for seed, layer in enumerate(LAYERS):
            name_a, name_b = names_of(layer)
            M = drawn(7 * site + seed, RANK, RANK) + 4 * torch.eye(RANK, dtype=torch.float64)
            reached[name_a] = -torch.linalg.inv(M) @ (theta[name_a] + update.delta[name_a])
            reached[name_b] = -(theta[name_b] + update.delta[name_b]) @ M
        turned.append(update_to(theta, reached, update.weight))
    for layer in LAYERS:
        one, other = (product_of(one_round(FlexLoRA(), theta, sites), layer) for sites in (cohort, turned))
        assert relative(other, one) < 1e-11
        one, other = (product_of(one_round(FedAvg(), theta, sites), layer) for sites in (cohort, turned))
        assert relative(other, one) > 0.1


# LoRA-FAIR


@pytest.mark.parametrize("dtype", list(RTOL), ids=str)
@pytest.mark.parametrize("lam", [0.0, 0.01, 0.5])
def test_lora_fair_solves_its_least_squares_round_after_round(dtype: torch.dtype, lam: float) -> None:
    strategy = LoRAFair(LoRAFair.Options(regularization=lam))
    state = strategy.init(initial(dtype))
    for number, absent in ((1, None), (2, 2), (3, None)):
        before, cohort = state.theta.clone(), cohort_of(state.theta, number, absent)
        state = closed(strategy, state, cohort)
        for layer in LAYERS:
            sites = site_factors(before, cohort, layer)
            B, A = averages(sites)
            W, got = dense_sum(sites), product_of(state.theta, layer)
            assert relative(got, fair_product(sites, lam)) < RTOL[dtype]
            assert relative(as_array(state.theta[names_of(layer)[0]]), A) < RTOL[dtype]
            assert np.linalg.norm(got - W) < np.linalg.norm(B @ A - W)


def test_lora_fair_by_default_holds_back_one_hundredth() -> None:
    theta = initial()
    cohort = cohort_of(theta)
    after = one_round(LoRAFair(), theta, cohort)
    for layer in LAYERS:
        sites = site_factors(theta, cohort, layer)
        assert relative(product_of(after, layer), fair_product(sites, 0.01)) < 1e-12
        assert relative(fair_product(sites, 0.0), fair_product(sites, 0.01)) > 1e-4


def test_lora_fair_without_regularization_has_the_largest_cosine_that_its_a_allows() -> None:
    theta = initial()
    cohort = cohort_of(theta)
    after = one_round(LoRAFair(LoRAFair.Options(regularization=0)), theta, cohort)
    for layer in LAYERS:
        sites = site_factors(theta, cohort, layer)
        W, (B, A) = dense_sum(sites), averages(sites)
        best = cosine(W, product_of(after, layer))
        q, _ = np.linalg.qr(A.T)
        assert best == pytest.approx(np.linalg.norm(W @ q) / np.linalg.norm(W), rel=1e-12)
        assert best > cosine(W, B @ A)
        solved = as_array(after[names_of(layer)[1]])
        for seed in range(20):
            assert cosine(W, (solved + 0.1 * as_array(drawn(seed, *solved.shape))) @ A) < best


def test_lora_fair_with_a_huge_regularization_is_the_plain_average() -> None:
    theta = initial()
    cohort = cohort_of(theta)
    held_back = one_round(LoRAFair(LoRAFair.Options(regularization=1e6)), theta, cohort)
    plain = one_round(FedAvg(), theta, cohort)
    for layer in LAYERS:
        assert relative(product_of(held_back, layer), product_of(plain, layer)) < 1e-5


def test_lora_fair_means_the_same_by_its_regularization_however_large_a_is_beside_b() -> None:
    theta = initial()
    cohort = cohort_of(theta)

    def scaled(tensors: NamedTensors) -> NamedTensors:
        made = tensors.clone()
        for layer in LAYERS:
            made[names_of(layer)[0]].mul_(100)
            made[names_of(layer)[1]].div_(100)
        return made

    strategy = LoRAFair(LoRAFair.Options(regularization=0.3))
    one = one_round(strategy, theta, cohort)
    other = one_round(strategy, scaled(theta), [update_of(scaled(u.delta), u.weight) for u in cohort])
    for layer in LAYERS:
        assert relative(product_of(other, layer), product_of(one, layer)) < 1e-12


def test_ridge_on_dependent_rows_is_the_smallest_solution() -> None:
    A = drawn(1, RANK, 9)
    A[2:] = A[:2]
    target = Factors(drawn(2, 6, 5), drawn(3, 5, 9))
    expected = as_array(target.B) @ as_array(target.A) @ np.linalg.pinv(as_array(A), rcond=1e-10)
    assert relative(ridge(target, A, 0.0).numpy(), expected) < 1e-12
    assert not ridge(target, torch.zeros_like(A), 0.0).any()


@pytest.mark.parametrize("kind", [FlexLoRA, LoRAFair])
def test_one_site_alone_is_followed_exactly(kind: type[PairsStrategy]) -> None:
    theta = initial()
    only = cohort_of(theta)[:1]
    after = one_round(kind(), theta, only)
    for layer in LAYERS:
        assert relative(product_of(after, layer), dense_sum(site_factors(theta, only, layer))) < 1e-12


# FLoRA and FedEx-LoRA


def residual_of(state: ServerState, layer: str) -> Array:
    left = state.residual.get(layer)
    if left is None:
        return np.zeros(LAYERS[layer])
    assert left.scale == 1.0
    product: Array = as_array(left.B) @ as_array(left.A)
    return product


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("dtype", list(RTOL), ids=str)
def test_base_and_adapter_together_are_the_average_of_the_sites_products_round_after_round(
    kind: type[PairsStrategy], dtype: torch.dtype
) -> None:
    strategy = kind()
    state = strategy.init(initial(dtype))
    base = {layer: np.zeros(size) for layer, size in LAYERS.items()}
    for number, absent in ((1, None), (2, 2), (3, None)):
        before, cohort = state.theta.clone(), cohort_of(state.theta, number, absent)
        state = closed(strategy, state, cohort)
        for layer in LAYERS:
            sites = site_factors(before, cohort, layer)
            meant = base[layer] + dense_sum(sites)
            base[layer] = base[layer] + residual_of(state, layer)
            assert relative(base[layer] + product_of(state.theta, layer), meant) < RTOL[dtype]
            B, A = averages(sites)
            assert relative(B @ A, dense_sum(sites)) > 0.05


@pytest.mark.parametrize("kind", EXACT)
def test_the_exact_ones_are_exact_to_a_millionth_and_the_plain_average_is_not(kind: type[PairsStrategy]) -> None:
    theta = initial(torch.float32)
    cohort = cohort_of(theta)
    strategy = kind()
    state = closed(strategy, strategy.init(theta.clone()), cohort)
    for layer in LAYERS:
        W = dense_sum(site_factors(theta, cohort, layer))
        assert relative(residual_of(state, layer) + product_of(state.theta, layer), W) < 1e-6
        assert relative(product_of(one_round(FedAvg(), theta, cohort), layer), W) > 0.1


def test_flora_begins_each_round_with_no_effect_and_another_a() -> None:
    theta = initial(torch.float32)
    seen = [theta]
    for _ in range(3):
        seen.append(one_round(FLoRA(), seen[-1], cohort_of(seen[-1])))
    for layer in LAYERS:
        name_a, name_b = names_of(layer)
        drawn_in_turn = [one[name_a] for one in seen]
        for one, other in pairwise(drawn_in_turn):
            assert relative(as_array(other), as_array(one)) > 0.5
            assert other.abs().max() <= 1 / np.sqrt(other.shape[1])
            assert other.abs().max() > 0.8 / np.sqrt(other.shape[1])
        assert not seen[-1][name_b].any()


def test_floras_next_a_depends_on_the_one_before_and_nothing_else() -> None:
    A = drawn(1, RANK, 31)
    assert torch.equal(drawn_after(A), drawn_after(A.clone()))
    nearly = A.clone()
    nearly[0, 0] += 1e-9
    assert relative(as_array(drawn_after(nearly)), as_array(drawn_after(A))) > 0.5


def test_flora_takes_sites_of_mixed_ranks_and_scales() -> None:
    out, inner = 23, 14
    ranks, scales = (1, 5, 2), (0.5, 2.0, 16 / 3)
    sites = [
        Factors(drawn(10 + r, out, r), drawn(20 + r, r, inner), scale) for r, scale in zip(ranks, scales, strict=True)
    ]
    weights = [0.5, 0.125, 0.375]
    after = Factors(torch.zeros(out, RANK), drawn(3, RANK, inner))
    left = FLoRA().left_over(sites, weights, after)
    meant = np.sum([p * s.scale * (as_array(s.B) @ as_array(s.A)) for p, s in zip(weights, sites, strict=True)], axis=0)
    assert left.rank == sum(ranks)
    assert relative(as_array(left.B) @ as_array(left.A), meant) < 1e-13


@pytest.mark.parametrize(("kind", "ranks"), [(FLoRA, (14, 9)), (FedExLoRA, (12, 9))])
def test_what_goes_into_the_base_is_no_larger_than_its_rank_or_its_layer(
    kind: type[PairsStrategy], ranks: tuple[int, int]
) -> None:
    theta, strategy = initial(), kind()
    state = closed(strategy, strategy.init(theta.clone()), cohort_of(theta))
    # of four sites of rank 4 in layers of 23 × 14 and 9 × 31: at most 16 and 12 ranks, cut to 14 and 9 by the layers
    assert [state.residual[layer].rank for layer in LAYERS] == list(ranks)
    assert all(left.B.dtype == torch.float64 for left in state.residual.values())


def test_fedex_leaves_nothing_to_the_base_where_one_site_answered_or_all_have_one_a() -> None:
    theta = initial()
    strategy = FedExLoRA()
    only = cohort_of(theta)[:1]
    state = closed(strategy, strategy.init(theta.clone()), only)
    assert state.residual == {}
    for layer in LAYERS:
        assert relative(product_of(state.theta, layer), dense_sum(site_factors(theta, only, layer))) < 1e-14

    cohort = cohort_of(theta)
    for update in cohort:
        for layer in LAYERS:
            update.delta[names_of(layer)[0]].zero_()
    state = closed(strategy, strategy.init(theta.clone()), cohort)
    for layer in LAYERS:
        assert np.linalg.norm(residual_of(state, layer)) < 1e-14 * np.linalg.norm(product_of(state.theta, layer))


def test_a_residual_is_of_the_round_that_left_it() -> None:
    theta, strategy = initial(), FedExLoRA()
    state = closed(strategy, strategy.init(theta), cohort_of(theta))
    assert set(state.residual) == set(LAYERS)
    assert closed(strategy, state, cohort_of(theta, 2)[:1]).residual == {}


@pytest.mark.parametrize("kind", EXACT)
def test_a_residual_too_large_for_float32_is_refused_by_the_name_of_its_module(kind: type[PairsStrategy]) -> None:
    theta = NamedTensors.of({"w.lora_A.weight": drawn(2, 4, 7).float(), "w.lora_B.weight": drawn(3, 5, 4).float()})
    cohort = []
    for site in range(3):
        delta = NamedTensors.zeros(theta.layout)
        for index, tensor in enumerate(delta.values()):
            tensor.copy_(drawn(10 * site + index, *tensor.shape) * 1e25)
        cohort.append(update_of(delta, 1.0))
    with pytest.raises(RoundError, match="'w'"):
        one_round(kind(), theta, cohort)


# all


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_of_no_pair_are_averaged_with_the_weights_and_integers_stay(
    kind: type[PairsStrategy], dtype: torch.dtype
) -> None:
    theta = initial(dtype)
    cohort = cohort_of(theta, absent=1)
    after, plain = one_round(kind(), theta, cohort), one_round(FedAvg(), theta, cohort)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(after["head"], plain["head"], rtol=tolerance, atol=tolerance)
    assert not torch.allclose(after["head"], theta["head"], rtol=0.05)
    assert torch.equal(after["ids"], theta["ids"])


@pytest.mark.parametrize("kind", ALL)
def test_updates_are_not_changed_and_may_be_reused_once_folded(kind: type[PairsStrategy]) -> None:
    theta = initial()
    cohort = cohort_of(theta)
    digests = [update.delta.digest() for update in cohort]
    expected = one_round(kind(), theta, cohort)
    assert [update.delta.digest() for update in cohort] == digests

    strategy = kind()
    state = strategy.init(theta.clone())
    fold = strategy.open(state)
    for update in cohort:
        fold.add(update)
        update.delta["head"].fill_(7)
        update.delta["q.lora_B.weight"].fill_(7)
    assert strategy.close(state, fold).theta.digest() == expected.digest()


def digest_of_a_large_round(kind: type[PairsStrategy]) -> str:
    theta = NamedTensors.of(
        {"pad": drawn(1, 5), "w.lora_A.weight": drawn(2, 16, 300).float(), "w.lora_B.weight": drawn(3, 500, 16).float()}
    )
    return one_round(kind(), theta, cohort_of(theta)).digest()


@pytest.mark.parametrize("kind", ALL)
def test_the_same_input_gives_the_same_bits_in_another_process_too(kind: type[PairsStrategy]) -> None:
    here = digest_of_a_large_round(kind)
    assert digest_of_a_large_round(kind) == here
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()}); import {__name__} as t; "
        f"print(t.digest_of_a_large_round(t.{kind.__name__}))"
    )
    root = Path(__file__).parents[2]
    there = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert there.stdout.strip() == here, there.stderr
    assert len(here) == hashlib.sha256().digest_size * 2


@pytest.mark.parametrize("kind", ALL)
def test_tensors_without_a_pair_are_refused_and_another_strategy_is_named(kind: type[PairsStrategy]) -> None:
    theta = NamedTensors.of({"model.norm.weight": drawn(1, 4), "model.q.lora_B.weight": drawn(2, 4, 2)})
    for refused in (lambda: kind().validate(theta.layout), lambda: kind().init(theta)):
        with pytest.raises(RecipeError, match=r"there are none among the trainables: model\.norm\.weight") as caught:
            refused()
        assert "fedavg" in caught.value.hint
    strategy = kind()
    state = ServerState(theta)
    with pytest.raises(RoundError, match=f"{kind.name} combines LoRA pairs") as at_round:
        closed(strategy, state, [update_of(NamedTensors.zeros(theta.layout), 1.0)])
    assert "fedavg" in at_round.value.hint


@pytest.mark.parametrize("kind", ALL)
def test_tensors_with_a_pair_are_accepted(kind: type[PairsStrategy]) -> None:
    kind().validate(Layout.of(initial()))


@pytest.mark.parametrize("kind", ALL)
def test_factors_too_large_for_their_product_are_refused_with_the_name_of_their_layer(
    kind: type[PairsStrategy],
) -> None:
    theta = NamedTensors.of({"w.lora_A.weight": drawn(2, 4, 7), "w.lora_B.weight": drawn(3, 5, 4)})
    delta = theta.clone()
    for tensor in delta.values():
        tensor.mul_(1e200)  # finite; the product is not
    with pytest.raises(RoundError, match=r"'w'|w\.lora_"):
        one_round(kind(), theta, [update_of(delta, 1.0), update_of(delta, 2.0)])


@pytest.mark.parametrize("kind", ALL)
def test_a_round_without_updates_is_a_defect(kind: type[PairsStrategy]) -> None:
    strategy = kind()
    state = strategy.init(initial())
    with pytest.raises(ValueError, match="no update"):
        strategy.close(state, strategy.open(state))


@pytest.mark.parametrize("kind", ALL)
def test_strategy_is_registered_under_its_name_with_its_source(kind: type[PairsStrategy]) -> None:
    assert registry.resolve("strategy", kind.name) is kind
    assert kind.needs == "individuals"
    assert kind.pairs
    assert re.search(r"(19|20)\d\d, arXiv:\d{4}\.\d{5}$", kind.source)


@pytest.mark.parametrize("bad", [{"regularization": -0.1}, {"regularization": float("nan")}, {"lambda": 0.1}])
def test_bad_options_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        LoRAFair.Options(**bad)
    with pytest.raises(ValidationError, match=next(iter(bad))):
        FlexLoRA.Options(**bad)
