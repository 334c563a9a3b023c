"""A hostile site within secure sums: a plain secure mean goes where it wants, a robust rule across groups does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commonweight.federation.folder import RunFolder
from commonweight.federation.global_model import MemoryModel
from commonweight.federation.groups import Groups
from commonweight.federation.secure_rounds import Terms
from commonweight.federation.simulated_sums import SimulatedSums
from commonweight.model.tensors import NamedTensors
from commonweight.privacy.secure_aggregation.rows import Most
from commonweight.recipe import Recipe
from commonweight.registry import resolve
from commonweight.strategies.individuals import rows_of, vector_of
from commonweight.strategies.update import Update

SITES = tuple(f"site-{index:02d}" for index in range(20))
SIZE, HOSTILE = 4, "site-07"
Forge = Callable[[Tensor], Tensor]


def theta() -> NamedTensors:
    return NamedTensors.of({"a.lora_A": torch.zeros(3, 41), "a.lora_B": torch.zeros(29, 3)})


def honest_updates() -> list[Update]:
    """A common direction and each site's own, of about the same length."""
    draw = torch.Generator().manual_seed(0)
    layout = theta().layout
    common = torch.randn(layout.numels[torch.float32], generator=draw) * 0.01
    updates = []
    for place, site in enumerate(SITES):
        own = torch.randn(common.shape, generator=draw) * 0.01
        delta = NamedTensors(layout, {torch.float32: common + own})
        updates.append(Update(site, 1, {"delta": delta}, 1.0, 8 + place, 64, 2))
    return updates


def forged(updates: Sequence[Update], forge: Forge) -> list[Update]:
    for update in updates:
        if update.site == HOSTILE:
            values = update.delta.flats[torch.float32]
            values.copy_(forge(values))
    return list(updates)


def after(strategy: dict[str, Any], updates: Sequence[Update], folder: Path) -> Tensor:
    """What a secure round makes of a model at zero."""
    name, options = strategy["name"], {key: value for key, value in strategy.items() if key != "name"}
    grouped = {} if name == "fedavg" else {"secure_group_size": SIZE}
    privacy = {"secure_aggregation": "on", **grouped}
    recipe = Recipe.model_validate({"name": "x", "privacy": privacy, "federation": {"strategy": strategy}})
    kind = resolve("strategy", name)
    rule, layout = kind(kind.Options(**options), num_sites=len(SITES)), theta().layout
    sums = SimulatedSums(recipe, layout)
    model = MemoryModel(rule, theta(), RunFolder(folder, resume=False), lambda theta, path: None, secure=sums)
    model.first()
    sums.begin(1, Groups.of(recipe, SITES, 1, least=rule.least_updates), Terms(0.1, {}, Most(40, 400)))
    model.open()
    for update in updates:
        model.fold(update)
    sums.open(1, SITES)
    model.close(1)
    return vector_of(model.state.theta)


RULES: list[dict[str, Any]] = [
    {"name": "trimmed-mean", "f": 1, "mixing": "nearest"},
    {"name": "median", "f": 1},
    {"name": "geometric-median", "f": 1},
    {"name": "multi-krum", "f": 1},
    {"name": "centered-clipping", "f": 1},
]
ATTACKS: dict[str, Forge] = {
    "times ten": lambda values: 10 * values,
    "sign flip, ten times": lambda values: -10 * values,
    "as far as the ring lets it": lambda values: torch.full_like(values, 8.0),
}


@pytest.mark.parametrize("attack", list(ATTACKS))
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["name"]))
def test_one_bad_group_is_bounded(rule: dict[str, Any], attack: str, tmp_path: Path) -> None:
    """Within the spread of the honest groups' means of what the honest sites alone have learnt."""
    honest = honest_updates()
    rows = rows_of(honest)
    weights = torch.tensor([float(update.num_examples) for update in honest])
    others = torch.tensor([update.site != HOSTILE for update in honest])
    mean = (weights[others] @ rows[others]) / weights[others].sum()
    spread = (rows[others] - mean).norm(dim=1).mean() / SIZE**0.5
    updates = forged(honest, ATTACKS[attack])
    plain = (after({"name": "fedavg"}, updates, tmp_path / "plain") - mean).norm()
    robust = (after(rule, updates, tmp_path / "robust") - mean).norm()
    assert robust < spread
    assert plain > 1.5 * robust
    if attack == "as far as the ring lets it":
        assert plain > 20 * spread


def test_without_a_hostile_site_the_rule_costs_less_than_the_groups_spread(tmp_path: Path) -> None:
    honest = honest_updates()
    plain = after({"name": "fedavg"}, honest, tmp_path / "plain")
    robust = after(RULES[0], honest, tmp_path / "robust")
    rows = rows_of(honest)
    assert (robust - plain).norm() < 0.5 * (rows - plain).norm(dim=1).mean() / SIZE**0.5


def test_a_hostile_site_in_every_group_is_not_withstood(tmp_path: Path) -> None:
    """f counts groups: five hostile sites of twenty, one in each, are too many for f = 1."""
    recipe = Recipe.model_validate({"name": "x", "privacy": {"secure_aggregation": "on", "secure_group_size": SIZE}})
    honest = honest_updates()
    groups = Groups.of(recipe, SITES, 1).members
    mean = rows_of(honest).mean(0)
    for group in groups:
        (update,) = (update for update in honest if update.site == group[0])
        update.delta.flats[torch.float32].mul_(-10)
    found = after(RULES[0], honest, tmp_path / "robust")
    assert float(found @ mean) < 0
