"""Which replica leads a run: a lease for a while, with an epoch that fences off whoever had it before.

Every method that takes a lease first makes sure, in its own transaction and under a lock on the run's lease, that the
lease still holds. A replica that was stopped for a while and goes on where it was therefore changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sqlalchemy as sa

from ..errors import StateError
from .database import Part, Writing, reading, writing
from .tables import leases, runs


class LeaseLost(StateError):
    """The lease ran out, or another replica leads the run by now. What was to be done was not done."""


@dataclass(frozen=True)
class Lease:
    """The right to lead a run.

    Args:
        owner: the replica.
        epoch: grows with every claim; never two leaders have the same.
        until: seconds since the epoch, as it was when this was given; `renew` prolongs it.
    """

    run: str
    owner: str
    epoch: int
    until: float


_LED = ("waiting", "running")
_HELD = (
    sa.select(leases.c.until)
    .where(
        leases.c.run == sa.bindparam("run"),
        leases.c.owner == sa.bindparam("owner"),
        leases.c.epoch == sa.bindparam("epoch"),
        leases.c.until > sa.bindparam("now"),
    )
    .with_for_update(key_share=True)
)


def hold(tx: Writing, lease: Lease) -> None:
    """Make sure that a lease holds, and keep it so until the end of the transaction.

    Raises:
        LeaseLost: it does not.
    """
    values = {"run": lease.run, "owner": lease.owner, "epoch": lease.epoch, "now": tx.now}
    if tx.execute(_HELD, values).first() is None:
        raise _lost(lease)


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(
        f"{lease.owner} no longer leads run {lease.run!r}: its lease (epoch {lease.epoch}) ran out or is another's",
        hint="claim the run again",
        retry=True,
    )


class LeasesPart(Part):
    """Leases in the store."""

    @writing
    def claim(self, tx: Writing, run: str, owner: str, lease_s: float) -> Lease | None:
        """Lead a run that is waiting or running, for `lease_s` seconds, if nobody else does. Whoever claims a run that
        it leads already gets a new epoch too. None: another's lease holds, or there is nothing to lead."""
        led = sa.exists().where(runs.c.id == run, runs.c.state.in_(_LED))
        free = (leases.c.owner == "") | (leases.c.owner == owner) | (leases.c.until <= tx.now)
        take = (
            leases.update()
            .where(leases.c.run == run, free, led)
            .values(epoch=leases.c.epoch + 1, owner=owner, until=tx.now + lease_s)
            .returning(leases.c.epoch)
        )
        epoch = tx.execute(take).scalar_one_or_none()
        return None if epoch is None else Lease(run, owner, epoch, tx.now + lease_s)

    @writing
    def renew(self, tx: Writing, lease: Lease, lease_s: float) -> Lease:
        """The lease holds for `lease_s` seconds from now.

        Raises:
            LeaseLost: it had run out, even if nobody has taken it, or another leads.
        """
        hold(tx, lease)
        until = tx.now + lease_s
        tx.execute(leases.update().where(leases.c.run == lease.run).values(until=until))
        return replace(lease, until=until)

    @writing
    def release(self, tx: Writing, lease: Lease) -> None:
        """Give a run up, so that another may lead it at once.

        Raises:
            LeaseLost: it was lost already.
        """
        hold(tx, lease)
        tx.execute(leases.update().where(leases.c.run == lease.run).values(owner="", until=0.0))
        tx.publish(f"run/{lease.run}", "runs")

    @writing
    def end_leases(self, tx: Writing) -> None:
        """Nobody leads any more: for a database that one process uses alone, when that process begins."""
        tx.execute(leases.update().where(leases.c.owner != "").values(owner="", until=0.0))

    @reading
    def claimable(self, connection: sa.Connection) -> list[str]:
        """Runs that wait for a leader, oldest first."""
        query = (
            sa.select(runs.c.id)
            .join(leases)
            .where(
                runs.c.state.in_(_LED),
                (leases.c.owner == "") | (leases.c.until <= self.database.clock()),
            )
            .order_by(runs.c.submitted_at, runs.c.id)
        )
        return list(connection.execute(query).scalars())

    @reading
    def leader(self, connection: sa.Connection, run: str) -> str | None:
        """The replica that leads a run now."""
        query = sa.select(leases.c.owner).where(leases.c.run == run, leases.c.until > self.database.clock())
        return connection.execute(query).scalar_one_or_none() or None
