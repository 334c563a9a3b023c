"""The coordinator of an asynchronous run is killed at its steps: each update that was acknowledged counts in exactly
one version, and the model is, bit for bit, what the journal's order of acceptance gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from commonweight.model.tensors import NamedTensors
from commonweight.registry import resolve

from .nursery import Death
from .world import World, noise_update

_VERSIONS = 4
_STRATEGIES: dict[str, dict[str, Any]] = {
    "fedbuff": {"name": "fedbuff", "buffer": 2, "max_staleness": 2},
    "fedasync": {"name": "fedasync"},
}
_STEPS = {
    "coordinator.store:Store.open_round": ("after 1", "before 2"),
    "coordinator.store:Store.add_tasks": ("before 2", "after 3"),
    "coordinator.receive:Blobs.put": ("after 4",),
    "coordinator.store:Store.accept_upload": ("before 2", "after 1", "after 2", "after 3"),
    "coordinator.stored_model:StoredModel.close": ("before 1", "after 2"),
    "coordinator.store:Store.commit": ("before 2", "after 2", "after 3"),
    "coordinator.conduct:NetworkShelf.forget": ("before 2",),
}
_DEATHS = [
    Death(place, when, int(nth))
    for place, moments in _STEPS.items()
    for when, nth in (moment.split() for moment in moments)
]


@pytest.mark.parametrize("strategy", list(_STRATEGIES))
@pytest.mark.parametrize("death", _DEATHS, ids=str)
def test_the_run_goes_on(death: Death, strategy: str, make_world: Callable[..., World]) -> None:
    world = make_world()
    sites = world.begin_all(deaths=[death])
    run = world.submit_through(world.propose(sites, rounds=_VERSIONS, strategy=_STRATEGIES[strategy]))
    dying = world.main
    world.finish(run)
    assert dying.poll() is not None
    check(world, run, strategy)


def check(world: World, run: str, strategy: str) -> None:
    history = {number: record for number, record in world.store.commits(run).items() if number}
    assert sorted(history) == list(range(1, _VERSIONS + 1))
    counted = [(u["version"] + 1, u["site"]) for record in history.values() for u in record["updates"]]
    accepted = [
        (e.details["round"], e.actor) for e in world.audit() if (e.action, e.subject) == ("update accepted", run)
    ]
    assert Counter(accepted) == Counter(counted)
    assert max(Counter(counted).values()) == 1
    for record in history.values():
        assert len(set(record["answered"])) == len(record["updates"])
    saved = {event["digest"] for event in world.all_events(run) if event["event"] == "adapter_saved"}
    assert saved == {expected(world.theta, history, strategy).digest()}
    world.check_tidy(run)


def expected(theta: NamedTensors, history: dict[int, dict[str, Any]], strategy: str) -> NamedTensors:
    kind = resolve("strategy", strategy)
    options = {key: value for key, value in _STRATEGIES[strategy].items() if key != "name"}
    method = kind(kind.Options(**options))
    state, versions = method.init(theta.clone()), [theta.clone()]
    for number, record in sorted(history.items()):
        fold = method.open(state)
        for update in record["updates"]:
            staleness = number - 1 - update["version"]
            assert 0 <= update["staleness"] == staleness <= method.max_staleness
            kept = method.kept(versions[update["version"]], noise_update(theta, update["site"], update["version"] + 1))
            fold.add(replace(kept, weight=method.discount(staleness)))
        state = method.close(state, fold)
        versions.append(state.theta.clone())
    return versions[-1]
