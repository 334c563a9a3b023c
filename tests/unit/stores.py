"""What the tests of the coordinator's store share: a clock that is set by hand, and a run with things to do in it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from commonweight.coordinator.store import Lease, Store, StoreJournal, TaskRow, Upload
from commonweight.coordinator.tables import metadata
from commonweight.federation.round import Round, Verdict
from commonweight.federation.version import Version

LEASE_S = 10.0


@dataclass
class Clock:
    """A clock that stands still unless it is moved."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def add_run(store: Store, run: str = "r1", state: str = "running", **changes: Any) -> None:
    """A run, brought to a state."""
    values = {
        "name": "small",
        "recipe_text": "name: small\n",
        "job": b"job of " + run.encode(),
        "signature": b"s" * 64,
        "certificate": b"PEM",
        "signer": "lena",
        "upload": {"frame": "f0"},
    }
    store.add_run(run, **{**values, **changes})
    for step in ("waiting", "running"):
        if state in (step, "running"):
            store.set_run_state(run, step)


def lead(store: Store, run: str = "r1", owner: str = "A") -> Lease:
    lease = store.claim(run, owner, LEASE_S)
    assert lease is not None
    return lease


def task(site: str, round: int = 1, run: str = "r1", kind: str = "train", **changes: Any) -> TaskRow:
    return TaskRow(f"{run}-{round}-{site}-{kind}", run, round, site, kind, b"{}", "base", **changes)


def upload(site: str, round: int = 1, run: str = "r1", manifest: bytes = b"first", **changes: Any) -> Upload:
    digest = hashlib.sha256(manifest).hexdigest()
    name = f"{run}-{round}-{site}-{digest[:8]}"
    of = f"{run}-{round}-{site}-train"
    return Upload(name, run, round, site, of, digest, manifest, b"s" * 64, b"wrapped", f"blobs/{name}", **changes)


def open_round(store: Store, lease: Lease, number: int = 1, **changes: Any) -> None:
    """A round of the sites a, b and c, of whom two must answer, and their tasks."""
    values = {"cohort": ("a", "b", "c"), "needed": 2}
    round = Round(number, **{**values, **changes})
    store.open_round(lease, round, f"base{number}")
    store.add_tasks(lease, [task(site, number, lease.run) for site in round.cohort])


def open_version(store: Store, lease: Lease, number: int = 1, sites: str = "abc", **changes: Any) -> None:
    """A version that takes in two updates, at most one version stale, of six; and tasks from the one before."""
    values = {"buffer": 2, "max_staleness": 1, "last": 6}
    store.open_round(lease, Version.first(number, **{**values, **changes}), f"base{number}")
    store.add_tasks(lease, [task(site, number, lease.run) for site in sites])


def answer(store: Store, site: str, number: int = 1, run: str = "r1", manifest: bytes = b"first") -> Verdict:
    return store.accept_upload(store.open_upload(upload(site, number, run, manifest)).id)


def close_round(store: Store, number: int = 1, run: str = "r1") -> None:
    for site in "abc":
        assert answer(store, site, number, run).accepted


def commit(store: Store, lease: Lease, number: int) -> None:
    StoreJournal(store, lease).commit(number, {"answered": ["a", "b", "c"], "state": {"frame": f"f{number}"}})


def everything(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table."""
    return store.database.read(
        lambda connection: {
            table.name: sorted(map(tuple, connection.execute(sa.select(table))), key=repr)
            for table in metadata.sorted_tables
        }
    )
