"""Secure sums over a network: each step is a task to every site that takes part, and its answer a message.

    keys ─► shares ─► training, whose updates come masked ─► consent ─► reveal ─► what takes the masks off

All that a sum is made of lies in the database: the sites' answers, and in the journal who was taken into each step. So
a coordinator that was killed asks for the same again, finds it answered, and goes on. An attempt that comes to nothing
is struck out as a whole; the next one has another number, and with it fresh keys, tasks and uploads.

Groups take each step together, and each comes to its sum, or to nothing, by itself.

Journal key: `secure/NNNN`: `attempt`, and by step the sites whose answers were taken (those of an open round).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ..codec.common import common_numbers
from ..errors import AccessError, QuorumError, UpdateRefused
from ..federation.groups import Groups
from ..federation.messages import SUM_STEPS, Completed, Dropped, SumTask
from ..federation.round import Phase, Unopened
from ..federation.secure_rounds import Terms, config_of
from ..identity.certificates import verify_certificate
from ..identity.keys import SUM, verify
from ..privacy.secure_aggregation.collector import Collector
from ..privacy.secure_aggregation.messages import Advert, Reveal, Session
from ..privacy.secure_aggregation.rows import RowCode
from ..strategies.update import Update
from .engine import NetworkEngine
from .masked_updates import OpenedSum
from .store import StoreJournal

#: who is away is looked for this often
_LOOK_S = 0.2

Answers = dict[str, dict[str, Any]]


@dataclass
class GroupSum:
    """The sum of one group in one attempt, or that of the whole cohort.

    Args:
        common: what each step's task says of it.
        error: why it has come to nothing; None: it has not.
    """

    place: int
    session: Session
    collector: Collector
    code: RowCode
    common: Mapping[str, Any]
    error: QuorumError | None = None

    def has_enough(self, answers: Answers) -> bool:
        return sum(site in answers for site in self.session.sites) >= self.session.needed

    def can_open(self, answers: Answers) -> bool:
        for site in self.session.sites:
            if site in answers and site not in self.collector.reveals:
                with suppress(UpdateRefused):
                    self.collector.reveal(_reveal(site, answers[site]))
        return self.has_enough(answers) and self.collector.can_open()


class NetworkSums:
    """The secure sums of one run, at its leader.

    Args:
        authority: the certificate that issues sites' certificates, PEM.
    """

    def __init__(self, engine: NetworkEngine, journal: StoreJournal, authority: bytes) -> None:
        self.engine, self.journal, self.authority = engine, journal, authority
        self.store, self.plan = engine.store, engine.plan
        self.spec = engine.plan.recipe.federation
        self._job = hashlib.sha256(self.store.run_row(engine.run_id).job).digest()
        self._seats: dict[str, dict[str, Any]] = {}
        #: what takes the masks off the round's sums, once they are open
        self.opened: list[OpenedSum] = []

    # --- before the sites train

    def begin(self, round: int, groups: Groups, terms: Terms) -> Mapping[str, str]:
        self._number, self._record, self._lost = round, self._recalled(round), dict[str, str]()
        self._needed, self._seats, self.opened = groups.needed, {}, []
        self._keys = {p.name: p.signing_key for p in self.store.principals("site")}
        told = terms.to_json()
        config = config_of(self._job, self.engine.base, told)
        attempt, plan = self._record["attempt"], self.plan
        numbers = common_numbers(plan.recipe, plan.layout, round)
        self._sums = []
        for place, sites in enumerate(groups.members):
            session = Session(self.engine.run_id, round, attempt, sites, config)
            collector = Collector(session, verify=self._verify)
            code = RowCode.of(plan.recipe, plan.layout, len(sites), terms.most, numbers)
            common = {"attempt": attempt, "sites": list(sites), "terms": told}
            self._sums.append(GroupSum(place, session, collector, code, common))
        self._sum_of = {site: one for one in self._sums for site in one.session.sites}
        self._share()
        return self._lost

    def _recalled(self, number: int) -> dict[str, Any]:
        """What the journal knows of a round's attempt. One whose round was abandoned is over, whoever noticed first."""
        record = self.journal.get(_name(number)) or {"attempt": 0}
        found = self.store.round_state(self.engine.run_id, number)
        if "shares" in record and found is not None and found[0].phase is Phase.ABANDONED:
            record = self._next(number, record)
        return record

    def _next(self, number: int, record: Mapping[str, Any]) -> dict[str, Any]:
        """Strike an attempt out."""
        of_attempt = {*SUM_STEPS, "train"}
        open_ones = [r.id for r in self.store.tasks(self.engine.run_id, number) if r.is_open and r.kind in of_attempt]
        self.store.withdraw(self.engine.led.lease, open_ones, "the secure sum is tried again, with fresh keys")
        following = {"attempt": record["attempt"] + 1}
        self.journal.put(_name(number), following)
        return following

    def _verify(self, site: str, message: bytes, signature: bytes) -> bool:
        return site in self._keys and verify(self._keys[site], SUM, message, signature)

    def _share(self) -> None:
        """Keys, and then shares, go round."""
        said, nothing = {}, dict[str, Any]()
        everyone = {site: nothing for one in self._sums for site in one.session.sites}
        for site, answer in self._step("keys", everyone, GroupSum.has_enough).items():
            try:
                self._check_certificate(site, answer["certificate"])
                self._sum_of[site].collector.advert(_advert(site, answer))
                said[site] = answer
            except (UpdateRefused, AccessError) as error:
                self._lost[site] = error.message
        asked = dict[str, Mapping[str, Any]]()
        for one in self._going():
            with self._alone(one):
                handed = {advert.site: said[advert.site] for advert in one.collector.close_adverts()}
                asked |= dict.fromkeys(handed, handed)
        for site, answer in self._step("shares", asked, GroupSum.has_enough).items():
            try:
                boxes = {peer: bytes.fromhex(box) for peer, box in answer["boxes"].items()}
                self._sum_of[site].collector.shares(site, boxes)
            except UpdateRefused as error:
                self._lost[site] = error.message
        for one in self._going():
            with self._alone(one):
                for site, sealed in one.collector.close_shares().items():
                    self._seats[site] = {**one.common, "boxes": {peer: box.hex() for peer, box in sealed.items()}}

    def _going(self) -> list[GroupSum]:
        """The sums that have not come to nothing; none, if they are too few for the round to be of use."""
        going = [one for one in self._sums if one.error is None]
        return going if len(going) >= self._needed else []

    @contextmanager
    def _alone(self, one: GroupSum) -> Iterator[None]:
        """If a sum comes to nothing the others may go on without it."""
        try:
            yield
        except QuorumError as error:
            one.error = error
            for site in one.session.sites:
                self._lost.setdefault(site, error.message)

    def _check_certificate(self, site: str, certificate: str) -> None:
        """Others will look at it too, and would refuse everybody's keys for the sake of a false one."""
        holder = verify_certificate(certificate.encode(), self.authority)
        if (holder.role, holder.name, holder.signing_key) != ("site", site, self._keys[site]):
            raise AccessError(f"the certificate that site {site!r} shows with its keys is not its own")

    def seat(self, site: str) -> Mapping[str, Any] | None:
        return self._seats.get(site)

    def num_bytes(self, site: str) -> int:
        return self.plan.update_layout(site).num_bytes

    def shown(self, update: Update) -> Update:
        return update  # its manifest says no more

    # --- after they have trained

    def open(self, round: int, survivors: Sequence[str]) -> Mapping[int, str]:
        for site in survivors:
            self._sum_of[site].collector.arrived(site)
        asked, alive = dict[str, Mapping[str, Any]](), dict[int, tuple[str, ...]]()
        for one in self._going():
            with self._alone(one):
                alive[one.place] = one.collector.close_rows()
                shown = {"survivors": list(alive[one.place])}
                asked |= dict.fromkeys(alive[one.place], shown)
        self._require()
        for site, answer in self._step("consent", asked, GroupSum.has_enough).items():
            with suppress(UpdateRefused):
                self._sum_of[site].collector.consent(site, bytes.fromhex(answer["signature"]))
        asked = {}
        for one in self._going():
            with self._alone(one):
                consents = one.collector.close_consents()
                signatures = {site: signature.hex() for site, signature in consents.items()}
                asked |= dict.fromkeys(alive[one.place], signatures)
        self._require()
        self._step("reveal", asked, GroupSum.can_open)
        opened = []
        for one in self._going():
            with self._alone(one):
                opened.append(OpenedSum(one.place, alive[one.place], one.code, one.collector.masks()))
        self._require()
        self.opened = opened
        return {one.place: one.error.message for one in self._sums if one.error is not None}

    def _require(self) -> None:
        """Raises QuorumError: too many sums have come to nothing."""
        if self._going():
            return
        errors = [one.error for one in self._sums if one.error is not None]
        if len(self._sums) == 1:
            raise errors[0]
        raise QuorumError(
            f"the sums of {len(self._sums) - len(errors)} of {len(self._sums)} groups can be opened, {self._needed} "
            f"are needed ({errors[0].message})",
            hint=errors[0].hint,
            retry=True,
        )

    def abandon(self, round: int) -> None:
        # in this order: a crash in between leaves an abandoned round, which `begin` notices
        if self.store.round_state(self.engine.run_id, round) is not None:
            self.store.apply(self.engine.run_id, round, Unopened(round), lease=self.engine.led.lease)
        self._next(round, self._record)

    def committed(self, round: int) -> None:
        self.journal.drop(_name(round))
        self._seats, self.opened = {}, []

    # --- one step

    def _step(
        self, step: str, asked: Mapping[str, Mapping[str, Any]], enough: Callable[[GroupSum, Answers], bool]
    ) -> Answers:
        """The answers that are taken into a step: those of all sites that are there. Sites that are away are waited for
        only as long as too few sums have enough others. Who was taken is in the journal when this returns.

        Args:
            asked: what each site is told.
        """
        chosen: list[str] | None = self._record.get(step)
        found, failed = Answers(), dict[str, str]()
        while asked:
            todo = [site for site in chosen or asked if site not in found and site not in failed]
            away = {}
            tasks = [self._task(step, site, asked[site]) for site in todo]
            for outcome in self.engine.run(tasks, deadline_s=self.spec.deadline_s):
                task = outcome.task
                assert isinstance(task, SumTask)
                if isinstance(outcome, Completed):
                    found[task.site] = dict(outcome.result)
                elif isinstance(outcome, Dropped) and outcome.late:
                    away[task.site] = outcome.reason
                else:
                    failed[task.site] = outcome.reason
            num_enough = sum(enough(one, found) for one in self._going())
            if num_enough >= self._needed or not away or self.spec.deadline_s is not None:
                break
            self._wait_for(away)
        lost = {**away, **failed} if asked else {}
        for site, reason in lost.items():
            self._lost.setdefault(site, reason)
            self.engine.events.emit("lost_to_the_sum", round=self._number, site=site, step=step, reason=reason)
        ordered = {site: found[site] for site in asked if site in found}
        if asked and chosen is None:
            self._record[step] = list(ordered)
            self.journal.put(_name(self._number), self._record)
        return ordered

    def _task(self, step: str, site: str, said: Mapping[str, Any]) -> SumTask:
        common = self._sum_of[site].common
        return SumTask(self._number, site, step, common["attempt"], tuple(common["sites"]), common["terms"], said)

    def _wait_for(self, away: Mapping[str, str]) -> None:
        """Until one of them is back."""
        self.engine.flush()
        while all(self.engine.presence.away_for(site) is not None for site in away):
            self.engine.led.check()
            time.sleep(_LOOK_S)


def _advert(site: str, answer: Mapping[str, str]) -> Advert:
    parts = ("channel", "pair", "commitment", "signature")
    return Advert(site, *(bytes.fromhex(answer[part]) for part in parts))


def _reveal(site: str, answer: Mapping[str, Mapping[str, str]]) -> Reveal:
    kinds = ({peer: bytes.fromhex(share) for peer, share in answer[kind].items()} for kind in ("own", "pair"))
    return Reveal(site, *kinds)


def _name(round: int) -> str:
    return f"secure/{round:04d}"
