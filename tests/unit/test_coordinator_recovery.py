"""What a coordinator does first: nobody else serves its folder, and what a killed process left is taken up or goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from commonweight.coordinator import server
from commonweight.coordinator.server import alone
from commonweight.coordinator.store import LeaseLost, Store
from commonweight.errors import StateError, StorageError

from .stores import LEASE_S, Clock, add_run, answer, lead, open_round, upload


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(f"sqlite:///{tmp_path / 'state.sqlite'}", clock=Clock()) as opened:
        yield opened


def test_a_lease_that_is_ended_is_free_at_once_and_fences_its_owner_off(store: Store) -> None:
    add_run(store)
    before = lead(store)
    assert store.claimable() == []
    assert store.claim("r1", "B", LEASE_S) is None
    store.end_leases()
    assert store.claimable() == ["r1"]
    with pytest.raises(LeaseLost):
        store.renew(before, LEASE_S)
    after = store.claim("r1", "B", LEASE_S)
    assert after is not None
    assert after.epoch > before.epoch


def test_leftovers_are_the_data_of_runs_that_have_ended(store: Store) -> None:
    for run in ("r1", "r2"):
        add_run(store, run)
        open_round(store, lead(store, run))
        assert answer(store, "a", run=run).accepted
    store.open_upload(upload("b", run="r2"))
    assert store.leftovers() == []
    store.set_run_state("r2", "cancelled")
    left = store.leftovers()
    assert {(found.run, found.site) for found in left} == {("r2", "a"), ("r2", "b")}
    for found in left:
        store.forget_upload(found.id)
    assert store.leftovers() == []


def test_one_process_serves_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_ENDING_S", 0.0)
    with alone(tmp_path), pytest.raises(StateError, match="another process serves"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_a_folder_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"), alone(tmp_path / "nowhere"):
        pass
