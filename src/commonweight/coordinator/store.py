"""The coordinator's durable state: one door to its database. What is not in it has not happened.

Every method is one short transaction: it has happened as a whole when the method returns, and not at all when it
raises. A passing fault (the database is locked, restarts, is gone for a while) is waited for, up to `patience_s`; after
that comes a StorageError with `retry`, and the same Store works again once the database is back. Methods may be called
from any thread, and block: call them from an event loop through a thread.

    access.py    add_token redeem_token principals principal set_state add_certificate revoked_serials is_allowed
    audit.py     audit audit_entries audit_head
    runs.py      add_run set_run_state request_cancel run_row find_run runs put_member members
    leases.py    claim renew release end_leases claimable leader
    journal.py   bind commit last_round commits put_result result          StoreJournal(store, lease): the same by name
                 drop_result
    rounds.py    open_round round_state deciding apply
    tasks.py     add_tasks open_tasks tasks task_states open_training bases_in_use task reply withdraw give_up
    uploads.py   open_upload upload find_upload has_offered accept_upload refuse_upload accepted_uploads spent_uploads
                 leftovers forget_upload
    spends.py    charge check_budget spent                                 StoreLedger(store, lease, budget)
    events.py    add_events events attend seen left attending
    bus.py       store.bus.subscribe(prefix): tasks/<site> run/<id> ended/<id> events/<id> runs sites access

Rounds come and go as `federation.round.Round`. Methods that take a Lease raise LeaseLost, and change nothing, once it
has run out or another replica leads the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from .access import AccessPart, Principal
from .audit import AuditEntry, AuditPart, verify_chain, verify_head
from .bus import Bus, Subscription
from .database import Database
from .events import EventsPart, PresencePart
from .journal import JournalPart, StoreJournal
from .leases import Lease, LeaseLost, LeasesPart
from .rounds import RoundsPart
from .runs import ENDED, Member, Run, RunsPart
from .spends import SpendsPart, StoreLedger
from .tasks import TaskRow, TasksPart
from .uploads import Upload, UploadsPart

__all__ = [
    "ENDED",
    "AuditEntry",
    "Bus",
    "Lease",
    "LeaseLost",
    "Member",
    "Principal",
    "Run",
    "Store",
    "StoreJournal",
    "StoreLedger",
    "Subscription",
    "TaskRow",
    "Upload",
    "verify_chain",
    "verify_head",
]


class Store(
    AccessPart,
    AuditPart,
    RunsPart,
    LeasesPart,
    JournalPart,
    RoundsPart,
    TasksPart,
    UploadsPart,
    SpendsPart,
    EventsPart,
    PresencePart,
):
    """Opens the coordinator's database, making it or bringing it up to date if need be.

    Args:
        url: `sqlite:///PATH` (one coordinator process; others may look in) or `postgresql://…` (any number).
        clock: seconds since the epoch.
        patience_s: for how long a passing fault is waited for.

    Raises:
        RecipeError: the address is no database's that can be used.
        StateError: the database is damaged, or of a newer version.
        StorageError: it cannot be reached, opened or written.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time, patience_s: float = 5.0) -> None:
        self.database = Database(url, clock=clock, patience_s=patience_s)
        self.database.open()

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds since the epoch."""
        return self.database.clock

    @property
    def bus(self) -> Bus:
        return self.database.bus

    def close(self) -> None:
        self.database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
