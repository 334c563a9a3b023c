"""Secure sums over a network: each step is a task to every site that takes part, and its answer a message.

    keys ─► shares ─► training, whose updates come masked ─► consent ─► reveal ─► what takes the masks off

All that a sum is made of lies in the database: the sites' answers, and in the journal who was taken into each step. So
a coordinator that was killed asks for the same again, finds it answered, and goes on. An attempt that comes to nothing
is struck out as a whole; the next one has another number, and with it fresh keys, tasks and uploads.

Journal key: `secure/NNNN`: `attempt`, and by step the sites whose answers were taken (those of an open round).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..errors import AccessError, QuorumError, UpdateRefused
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
from .store import StoreJournal

#: who is away is looked for this often
_LOOK_S = 0.2

Answers = dict[str, dict[str, Any]]


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
        #: what takes the masks off the round's sum, once it is open
        self.masks: list[tuple[bytes, int]] = []

    # --- before the sites train

    def begin(self, round: int, cohort: Sequence[str], terms: Terms) -> Mapping[str, str]:
        self._number, self._record, self._lost = round, self._recalled(round), dict[str, str]()
        self._seats, self.masks, sites = {}, [], tuple(cohort)
        self.code = RowCode.of(self.plan.recipe, self.plan.layout, len(sites), terms.most)
        self._keys = {p.name: p.signing_key for p in self.store.principals("site")}
        told = terms.to_json()
        self._common = {"attempt": self._record["attempt"], "sites": list(sites), "terms": told}
        config = config_of(self._job, self.engine.base, told)
        self._session = Session(self.engine.run_id, round, self._record["attempt"], sites, config)
        self._collector = Collector(self._session, verify=self._verify)
        try:
            self._share()
        except QuorumError as error:
            reasons = dict.fromkeys(sites, error.message)
            return {**reasons, **self._lost}
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
        """Keys, and then shares, go round.

        Raises:
            QuorumError: too few sites answered.
        """
        session, collector = self._session, self._collector
        said = {}
        for site, answer in self._step("keys", session.sites, {}, self._enough).items():
            try:
                self._check_certificate(site, answer["certificate"])
                collector.advert(_advert(site, answer))
                said[site] = answer
            except (UpdateRefused, AccessError) as error:
                self._lost[site] = error.message
        adverts = collector.close_adverts()
        handed = {advert.site: said[advert.site] for advert in adverts}
        for site, answer in self._step("shares", [a.site for a in adverts], handed, self._enough).items():
            try:
                collector.shares(site, {peer: bytes.fromhex(box) for peer, box in answer["boxes"].items()})
            except UpdateRefused as error:
                self._lost[site] = error.message
        for site, boxes in collector.close_shares().items():
            self._seats[site] = {**self._common, "boxes": {peer: box.hex() for peer, box in boxes.items()}}

    def _check_certificate(self, site: str, certificate: str) -> None:
        """Others will look at it too, and would refuse everybody's keys for the sake of a false one."""
        holder = verify_certificate(certificate.encode(), self.authority)
        if (holder.role, holder.name, holder.signing_key) != ("site", site, self._keys[site]):
            raise AccessError(f"the certificate that site {site!r} shows with its keys is not its own")

    def _enough(self, answers: Answers) -> bool:
        return len(answers) >= self._session.needed

    def seat(self, site: str) -> Mapping[str, Any] | None:
        return self._seats.get(site)

    def shown(self, update: Update) -> Update:
        return update  # its manifest says no more

    # --- after they have trained

    def open(self, round: int, survivors: Sequence[str]) -> None:
        collector = self._collector
        for site in survivors:
            collector.arrived(site)
        alive = collector.close_rows()
        for site, answer in self._step("consent", alive, {"survivors": list(alive)}, self._enough).items():
            with suppress(UpdateRefused):
                collector.consent(site, bytes.fromhex(answer["signature"]))
        signatures = {site: signature.hex() for site, signature in collector.close_consents().items()}

        def can_open(answers: Answers) -> bool:
            for site in answers.keys() - collector.reveals.keys():
                with suppress(UpdateRefused):
                    collector.reveal(_reveal(site, answers[site]))
            return self._enough(answers) and collector.can_open()

        self._step("reveal", alive, signatures, can_open)
        self.masks = collector.masks()

    def abandon(self, round: int) -> None:
        # in this order: a crash in between leaves an abandoned round, which `begin` notices
        if self.store.round_state(self.engine.run_id, round) is not None:
            self.store.apply(self.engine.run_id, round, Unopened(round), lease=self.engine.led.lease)
        self._next(round, self._record)

    def committed(self, round: int) -> None:
        self.journal.drop(_name(round))
        self._seats, self.masks = {}, []

    # --- one step

    def _step(
        self, step: str, sites: Sequence[str], said: Mapping[str, Any], enough: Callable[[Answers], bool]
    ) -> Answers:
        """The answers that are taken into a step: those of all sites that are there. Sites that are away are waited for
        only as long as there are not enough others. Who was taken is in the journal when this returns.
        """
        chosen: list[str] | None = self._record.get(step)
        found, failed = Answers(), dict[str, str]()
        while True:
            todo = [site for site in chosen or sites if site not in found and site not in failed]
            away = {}
            for outcome in self.engine.run([self._task(step, s, said) for s in todo], deadline_s=self.spec.deadline_s):
                task = outcome.task
                assert isinstance(task, SumTask)
                if isinstance(outcome, Completed):
                    found[task.site] = dict(outcome.result)
                elif isinstance(outcome, Dropped) and outcome.late:
                    away[task.site] = outcome.reason
                else:
                    failed[task.site] = outcome.reason
            if enough(found) or not away or self.spec.deadline_s is not None:
                break
            self._wait_for(away)
        lost = {**away, **failed}
        for site, reason in lost.items():
            self._lost.setdefault(site, reason)
            self.engine.events.emit("lost_to_the_sum", round=self._number, site=site, step=step, reason=reason)
        ordered = {site: found[site] for site in sites if site in found}
        if chosen is None:
            self._record[step] = list(ordered)
            self.journal.put(_name(self._number), self._record)
        return ordered

    def _task(self, step: str, site: str, said: Mapping[str, Any]) -> SumTask:
        common = self._common
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
