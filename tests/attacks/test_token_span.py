"""Tokens of a text, read off the update that a site would send: from a plain one nearly all, from a masked or a noisy
one no more than chance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from commonweight.engines.bench import Bench, build_bench
from commonweight.leaks.updates import Steps, masked, private, token_span
from commonweight.model.adapters import attach_adapter
from commonweight.model.tensors import NamedTensors, l2_norm
from commonweight.privacy.noise import GaussianNoise
from commonweight.privacy.site_level import NoisyMean
from commonweight.privacy.token_span import distances, first_layers, recovered
from commonweight.recipe import Recipe
from commonweight.recipe.schema import AdapterSpec
from commonweight.result import Result
from tests.unit.tiny_models import base_of, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

Make = Callable[..., Recipe]
TEXTS = 6


def result_of(make_recipe: Make, *, r: int = 16, moved: bool = True, **sections: Any) -> tuple[Result, Bench]:
    """A run's model as it may be in a later round: B is no longer 0."""
    sections.setdefault("model", {"adapter": {"r": r, "alpha": 2 * r}})
    bench = build_bench(make_recipe(**sections))
    generator = torch.Generator().manual_seed(4)
    for name, tensor in bench.participant.trainables.values.items():
        if moved and "lora_B" in name:
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
    return Result(bench.recipe, bench.base, bench.model, bench.participant.language_model, None), bench


class Attack:
    """The share of a text's tokens that is found, over several texts."""

    def __init__(self, result: Result, bench: Bench) -> None:
        self.steps = Steps.of(result)
        self.texts = next(iter(bench.sites.values())).train
        self.candidates = np.arange(len(result.base.tokenizer))
        self.base = {n: p.detach().clone() for n, p in result.model.named_parameters() if "lora_" in n}
        first = first_layers(result.model, list(self.base), self.candidates)
        assert first is not None
        self.first = first

    def updates(self) -> Iterator[tuple[NamedTensors, set[int]]]:
        for text in range(TEXTS):
            one = self.texts.subset([text])
            yield self.steps.update(one, "sgd"), set(one.ids_of(0).tolist())

    def share(self, seen: Callable[[NamedTensors], NamedTensors]) -> tuple[float, float]:
        found, chance = [], []
        for number, (update, tokens) in enumerate(self.updates()):
            for shares, looked_at in ((found, seen(update)), (chance, self.steps.random(number, 0))):
                near = distances(looked_at, self.first, base=self.base)
                shares.append(recovered(near, self.candidates, tokens))
        return float(np.mean(found)), float(np.mean(chance))


@pytest.fixture
def attack(make_recipe: Make) -> Attack:
    return Attack(*result_of(make_recipe))


def test_the_layers_are_queries_keys_and_values_of_the_first_block(attack: Attack) -> None:
    assert [a.split(".layers.")[1].split(".lora_A")[0] for a, _ in attack.first.layers] == [
        "0.self_attn.q_proj",
        "0.self_attn.k_proj",
        "0.self_attn.v_proj",
    ]
    update, _ = next(attack.updates())
    assert all(a in update for a, _ in attack.first.layers)


def test_nine_of_ten_tokens_are_read_off_a_plain_update(attack: Attack) -> None:
    found, chance = attack.share(lambda update: update)
    assert found >= 0.9
    assert chance < 0.1


def test_a_masked_update_tells_no_more_than_chance(attack: Attack) -> None:
    found, chance = attack.share(lambda update: masked(update, 5))
    assert found < chance + 0.1


def test_a_clipped_and_noised_update_tells_no_more_than_chance(attack: Attack) -> None:
    """Scaled to a norm of 1, with noise of .1 on each element."""

    def noisy(update: NamedTensors) -> NamedTensors:
        for _, flat in update.floating():
            flat.div_(l2_norm(update))
        return private(update, NoisyMean(1.0, 0.1, 1, GaussianNoise(bytes(32))))

    found, chance = attack.share(noisy)
    assert found < chance + 0.1


def test_the_rows_of_an_update_are_combinations_of_the_tokens_inputs(attack: Attack) -> None:
    """Algebra: least squares on the inputs of the text's own tokens leaves nothing of A's gradient."""
    update, tokens = next(attack.updates())
    own = attack.first.inputs[torch.tensor(sorted(tokens))].T
    for a, _ in attack.first.layers:
        rows = update[a].double()
        rest = rows.T - own @ torch.linalg.lstsq(own, rows.T, driver="gelsd").solution
        assert float(rest.norm() / rows.norm()) < 1e-3


def test_before_round_1_only_b_moves_and_a_few_tokens_are_read_off_it(make_recipe: Make) -> None:
    """B = 0: A's gradient is 0, and B's rows span A·x, in r dimensions: enough for a text with fewer tokens."""
    result, bench = result_of(make_recipe, r=28, moved=False)
    attack = Attack(result, bench)
    update, tokens = next(attack.updates())
    assert len(tokens) < 28
    assert not any(bool(update[a].any()) for a, _ in attack.first.layers)
    found, chance = attack.share(lambda update: update)
    assert found > 0.7
    assert chance < 0.1


def test_an_update_without_the_first_layers_tells_nothing(attack: Attack) -> None:
    update, _ = next(attack.updates())
    others = {name: tensor for name, tensor in update.items() if ".layers.1." in name}
    assert distances(others, attack.first, base=attack.base).tolist() == [1.0] * len(attack.candidates)


def test_the_audits_table_has_a_row_for_each_thing_that_is_seen(make_recipe: Make) -> None:
    result, bench = result_of(make_recipe)
    before = {name: p.detach().clone() for name, p in result.model.named_parameters()}
    private_run = {"dp": "site", "clip": 0.5, "noise_multiplier": 0.3}
    found = token_span(result, next(iter(bench.sites.values())).train, private_run)
    shares = list(found["recovered"].values())
    assert len(shares) == 4
    assert shares[0] >= 0.9
    assert max(shares[2:]) < found["chance"] + 0.1
    assert found["dimensions"] == 48
    assert all(torch.equal(before[name], p) for name, p in result.model.named_parameters())


def test_other_adapters_and_models_with_positions_are_passed_over(make_recipe: Make) -> None:
    result, bench = result_of(make_recipe, model={"adapter": {"kind": "ia3"}})
    assert "ia3" in token_span(result, next(iter(bench.sites.values())).train, {})["why_not"]
    model = attach_adapter(base_of(tiny("conv1d")), AdapterSpec(r=2), seed=0)
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert first_layers(model, names, np.arange(61)) is None
