"""The coordinator is killed at every step of a private round: it is paid for once, and has the noise that was drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from commonweight.coordinator.vault import Vault
from commonweight.privacy.noise import GaussianNoise
from commonweight.privacy.site_level import NoisyMean
from commonweight.strategies.fedavg import FedAvg

from .nursery import Death
from .world import World, noise_update

PRIVACY = {"dp": "site", "clip": 1.0, "delta": 1e-5, "noise_multiplier": 0.5, "secure_aggregation": "off"}
#: in the order in which the only round comes to them
STEPS = (
    Death("coordinator.store:Store.charge", "before"),
    Death("coordinator.store:Store.charge", "after"),
    Death("federation.private_rounds:PrivateRounds.mean", "after"),
    Death("coordinator.stored_model:StoredModel.close", "after"),
    Death("coordinator.store:Store.commit", "before", 2),
    Death("coordinator.store:Store.commit", "after", 2),
    Death("coordinator.store:Store.drop_result", "before"),
    Death("coordinator.store:Store.drop_result", "after"),
)


@pytest.mark.parametrize("death", STEPS, ids=str)
def test_a_private_round_goes_on(death: Death, make_world: Callable[..., World]) -> None:
    world = make_world()
    sites = world.begin_all(deaths=[death])
    run = world.start_run(sites, rounds=1, privacy=PRIVACY, weighting="uniform")
    world.main.wait()
    kept = world.store.result(run, "noise/0001")
    drawn = STEPS.index(death) >= 2
    assert (kept is not None) == (drawn and death != STEPS[-1])
    world.begin()
    world.finish(run)

    lines = world.store.spent()
    assert {(line.site, line.spend.unit, line.spend.count) for line in lines} == {(site, "site", 1) for site in sites}
    record = world.store.commits(run)[1]
    assert record["answered"] == sites
    assert world.store.result(run, "noise/0001") is None
    if kept is not None:
        vault = Vault.open(world.coordinator_folder / "master.key")
        key = vault.unwrap(bytes.fromhex(kept["key"]), f"{run}/noise/0001")
        saved = [event["digest"] for event in world.all_events(run) if event["event"] == "adapter_saved"]
        assert set(saved) == {expected_digest(world, sites, key)}


def expected_digest(world: World, sites: list[str], key: bytes) -> str:
    """Of the model after the round, with the noise of this key, made in memory."""
    strategy = FedAvg()
    strategy.private = NoisyMean(1.0, 0.5, len(sites), GaussianNoise(key))
    state = strategy.init(world.theta.clone())
    fold = strategy.open(state)
    for site in sites:
        fold.add(replace(noise_update(world.theta, site, 1), weight=1.0))
    return strategy.close(state, fold).theta.digest()
