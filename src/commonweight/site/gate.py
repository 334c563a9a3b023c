"""What stands between a coordinator's wishes and a site: signatures, the policy, the site's records and its audit log.

Every task passes `decide` before anything is touched for it, and every byte passes `leaving` before it is sent. All of
it blocks (it reads and writes files): the agent calls it beside the event loop.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import AccessError, PolicyError, SiteError
from ..federation.folder import replacing, write_json
from ..federation.messages import SUM_STEPS, ChainTask, EvaluateTask, SampleTask, SumTask, Task, TrainTask
from ..federation.private_rounds import spends_of, unit_count
from ..federation.tally import Sites
from ..identity.certificates import Holder, verify_certificate
from ..identity.folder import IdentityFolder
from ..identity.jobs import verify_job
from ..identity.keys import AUDIT, verify
from ..model.tensors import Layout
from ..privacy.spending import UNPROTECTED, Spend
from ..recipe.load import check_codecs
from ..recipe.problems import validate
from ..recipe.schema import FederationSpec, Recipe
from ..recipe.source import read_source
from ..wire import protocol_pb2 as pb
from ..wire.decode import decode
from ..wire.frames import parse_header
from ..wire.refusals import Refused
from .audit import SiteAudit
from .log import Log
from .policy import (
    Decision,
    JobFacts,
    Policy,
    PolicyFile,
    allows_relay,
    decide_task,
    shared,
    shared_chain,
    shared_groups,
)
from .records import SiteRecords, TaskRecord

#: what leaves in answer to a task of each kind; an update leaves by another way (transfer.py)
ANSWERS = {"join": "facts", "evaluate": "scores", "chain": "scores", "sample": "samples"}
ANSWERS |= dict.fromkeys(SUM_STEPS, "masks")
KINDS = ("train", *ANSWERS)
#: how a task ended, as its reply says it
STATES = {"done": pb.TaskReply.DONE, "refused": pb.TaskReply.REFUSED, "failed": pb.TaskReply.FAILED}


class Alarm(AccessError):
    """A coordinator did what an honest one does not. The site takes no more tasks."""


@dataclass(frozen=True)
class KnownJob:
    """A job whose signature was verified.

    Args:
        job: what was signed.
        facts: what the policy wants to know of it.
        digest: SHA-256 of what was signed.
        layout, chunk_bytes: of the run's tensors, and how they are cut.
    """

    job: pb.Job
    digest: bytes
    facts: JobFacts
    recipe: Recipe
    layout: Layout
    chunk_bytes: int

    @property
    def federation(self) -> FederationSpec:
        """How the recipe wants updates combined."""
        return self.recipe.federation

    @property
    def secure(self) -> bool:
        """Whether the job promises that updates are seen in sums alone, or this site's noise counts on it."""
        return self.recipe.privacy.summed or self.recipe.privacy.mechanism.at_sites


class Gate:
    """Decides, and writes down, for one site.

    Args:
        folder: the site's folder.
        identity: of the moment (it changes when a certificate is renewed).
        to: the coordinator's address, for the audit log.
    """

    def __init__(
        self,
        folder: Path,
        identity: Callable[[], IdentityFolder],
        policy_file: PolicyFile,
        records: SiteRecords,
        audit: SiteAudit,
        log: Log,
        *,
        to: str,
    ) -> None:
        self.folder, self.records, self.audit, self.log, self.to = folder, records, audit, log, to
        self._identity, self._policy_file = identity, policy_file
        self._jobs: dict[str, KnownJob] = {}
        self._coordinators: dict[bytes, bytes] = {}

    # ---- jobs

    def known(self, run: str) -> KnownJob | None:
        """A run's job, if this site has it; read from disk it is verified once more."""
        if run not in self._jobs:
            with suppress(OSError, AccessError, Refused):
                known = self._verified(run, decode(pb.SignedJob, self._job_file(run).read_bytes()))
                self._jobs[run] = self._priced(known, run)
        return self._jobs.get(run)

    def admit(self, run: str, signed: pb.SignedJob) -> KnownJob:
        """Verify a job that has arrived, and keep it.

        Raises:
            AccessError: its signature, its signer's certificate or role is not good, or it is another run's.
            Alarm: the run came with another job before.
            RecipeError: its recipe is wrong.
            Refused: the job cannot be read.
        """
        known = self._verified(run, signed)
        with self._alarming():
            self.records.add_job(hashlib.sha256(signed.job).hexdigest(), known.facts)
        with replacing(self._job_file(run)) as temporary:
            temporary.write_bytes(signed.SerializeToString(deterministic=True))
        self._jobs[run] = known
        return known

    def _verified(self, run: str, signed: pb.SignedJob) -> KnownJob:
        job, holder = verify_job(signed, run, self._identity().authority)
        plan = parse_header(job.initial).plan
        recipe = validate(Recipe, read_source(job.recipe, "the job's recipe"))
        check_codecs(recipe, network=True)  # the code of others is not loaded for a job alone
        facts = _facts(job, recipe, holder, self._identity().holder.name)
        digest = hashlib.sha256(signed.job).digest()
        return KnownJob(job, digest, facts, recipe, plan.layout, plan.chunk_bytes)

    def joined(self, run: str, facts: Mapping[str, Any]) -> None:
        """The site takes part; of privacy of its examples or groups it is known from now on what a round costs.

        Args:
            facts: what the site's workshop says of itself (`steps`, and a count of `unit_count`).
        """
        known = self.known(run)
        if known is not None and known.recipe.privacy.noisy_steps:
            sites = Sites(("",), {"": facts["steps"]}, {}, units={"": facts[unit_count(known.recipe)]})
            write_json(self._spend_file(run), asdict(spends_of(known.recipe, sites.names, sites)[""]))
            self._jobs[run] = self._priced(known, run)
        self.records.set_job(run, "joined")

    def _priced(self, known: KnownJob, run: str) -> KnownJob:
        """With what a round really costs, if that was written down."""
        try:
            spend = Spend.from_json(json.loads(self._spend_file(run).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return known
        return replace(known, facts=replace(known.facts, spend=spend))

    def goes_on(self, run: str) -> bool:
        """Whether this site knows of a run, and not yet of its end."""
        record = self.records.job(run)
        return record is not None and record.state != "ended"

    def ended(self, run: str, keep: int) -> list[str]:
        """A run that this site knew has ended. Folders of ended runs go, but for the `keep` latest; returns whose."""
        self._jobs.pop(run, None)
        self.records.set_job(run, "ended")
        self.records.erase_sums(run)
        gone = self.records.runs_to_forget(keep)
        for old in gone:
            shutil.rmtree(self.folder / "runs" / old, ignore_errors=True)
            self.records.forget_run(old)
        return gone

    # ---- tasks

    def before(self, task: str) -> TaskRecord | None:
        """A task that has ended here already, perhaps in an earlier process."""
        record = self.records.task(task)
        return record if record is not None and record.state != "taken" else None

    def decide(self, known: KnownJob, task: pb.Task) -> Decision:
        """What the policy says to a task; a person is asked if one must be.

        Raises:
            PolicyError: there is no policy.
        """
        spent = self.records.spent(task.run, task.round)
        cohort = _cohort(task) if task.kind == "train" else None
        decision = decide_task(self.policy(), known.facts, task.kind, task.round, cohort, spent)
        if decision.needs_approval:
            self.records.ask(task.run, known.facts.summary())
        return decision

    def take(self, task: pb.Task) -> None:
        """Write down that a task is taken on.

        Raises:
            Alarm: its round was begun from other tensors before.
        """
        with self._alarming():
            if task.kind == "train":
                self.records.take_round(task.run, task.round, task.base)
        self._take(task)

    def _take(self, task: pb.Task) -> None:
        self.records.take_task(
            task.id,
            run=task.run,
            round=task.round,
            kind=task.kind,
            base=task.base,
            body=task.body,
            deadline_t=time.time() + task.seconds_left if task.seconds_left else 0.0,
        )

    def end(self, task: pb.Task, state: str, *, reason: str = "", result: bytes = b"") -> None:
        """Write down how a task ended; refusals go to the audit log too."""
        self._take(task)  # one that was refused at the door was never taken
        self.records.end_task(task.id, state, reason=reason, result=result)
        if state == "refused":
            self.audit.append("refused", run=task.run, round=task.round, task=task.id, kind=task.kind, reason=reason)
            if task.kind == "join" and self.records.job(task.run) is not None:
                self.records.set_job(task.run, "refused", reason)

    # ---- what leaves

    def policy(self) -> Policy:
        """The policy of the moment.

        Raises:
            PolicyError: it cannot be used.
        """
        try:
            return self._policy_file.current()
        except PolicyError as error:
            self.log("policy.unusable", reason=error.message, hint=error.hint)
            raise

    def shareable(self, kind: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """An answer, reduced to what the policy lets leave.

        Raises:
            PolicyError: nothing of it may.
        """
        policy = self.policy()
        if kind == "join":
            groups = {"groups": shared_groups(result["groups"], policy)} if "groups" in result else {}
            return {**result, **groups}
        if kind == "evaluate":
            return shared(result, policy)
        return shared_chain(result, policy) if kind == "chain" else dict(result)

    def relay_for(self, known: KnownJob, task: pb.Task) -> str:
        """The relay to which the update for a task may go; "": to the coordinator.

        The signed job must name it for this site, and the policy must list it: a coordinator alone cannot send an
        update elsewhere.
        """
        if not task.relay:
            return ""
        fields = {"run": task.run, "round": task.round, "relay": task.relay}
        if known.federation.relay_of.get(self._identity().holder.name) != task.relay:
            self.log("relay.passed_by", **fields, reason="the signed job does not name it for this site")
            return ""
        if not allows_relay(self.policy(), task.relay):
            self.log("relay.passed_by", **fields, reason="relays in this site's policy does not list it")
            return ""
        return task.relay

    def leaving(
        self,
        run: str,
        round: int,
        what: str,
        *,
        num_bytes: int,
        chunks: int,
        digest: str,
        task: str,
        to: str = "",
    ) -> None:
        """Count and write down what is about to be sent. It may be sent when this has returned, and only then.

        Args:
            to: who gets it; by default the coordinator.

        Raises:
            PolicyError: it may not leave.
        """
        known = self.known(run)
        spend = UNPROTECTED if known is None else known.facts.spend
        self.records.spend(
            self.policy(), run=run, round=round, what=what, num_bytes=num_bytes, chunks=chunks, spend=spend
        )
        self.audit.append(
            what, run=run, round=round, num_bytes=num_bytes, chunks=chunks, digest=digest, to=to or self.to, task=task
        )

    def note(self, what: str, **fields: Any) -> None:
        """A line in the audit log about something that happened."""
        self.audit.append(what, **fields)

    # ---- the coordinator's own audit log

    def keep_head(self, head: pb.AuditHead, certificate: bytes) -> None:
        """Verify a head of the coordinator's audit log, and keep it.

        Args:
            certificate: of the coordinator that sent it, PEM.

        Raises:
            Alarm: the signature is not the coordinator's, or the log was cut or changed since an earlier head.
        """
        with self._alarming():
            key = self._coordinator_key(certificate)
            if not verify(key, AUDIT, head.sequence.to_bytes(8, "big") + head.hash, head.signature):
                raise AccessError(
                    f"the head of the coordinator's audit log (entry {head.sequence}) is not signed by the coordinator",
                    hint="do not go on: tell the federation's auditor, and keep this site's folder as it is",
                )
            self.records.keep_head(head.sequence, head.hash, head.signature)

    def last_head(self) -> pb.AuditHead | None:
        """The furthest head that this site was shown."""
        head = self.records.last_head()
        if head is None:
            return None
        return pb.AuditHead(sequence=head.sequence, hash=head.hash, signature=head.signature)

    def _coordinator_key(self, certificate: bytes) -> bytes:
        if certificate not in self._coordinators:
            if not certificate:
                raise AccessError("the coordinator signs its audit log, but did not show its certificate")
            holder = verify_certificate(certificate, self._identity().authority)
            if holder.role != "coordinator":
                raise AccessError(f"the audit log is shown by a {holder.role} ({holder.name}), not by a coordinator")
            self._coordinators = {certificate: holder.signing_key}
        return self._coordinators[certificate]

    @contextmanager
    def _alarming(self) -> Iterator[None]:
        """What is an access error in here is more than that."""
        try:
            yield
        except AccessError as error:
            raise Alarm(error.message, hint=error.hint) from error

    def _job_file(self, run: str) -> Path:
        return self.folder / "runs" / run / "job.signed"

    def _spend_file(self, run: str) -> Path:
        return self.folder / "runs" / run / "spend.json"


def _facts(job: pb.Job, recipe: Recipe, holder: Holder, site: str) -> JobFacts:
    return JobFacts.of(
        recipe,
        run=job.id,
        kind=job.kind,
        purpose=job.purpose,
        signer=holder.name,
        signer_key=holder.signing_key.hex(),
        signer_role=holder.role,
        must_match=job.must_match,
        initial=job.initial,
        num_sites=len(job.sites),
        site=site,
    )


_BODIES: dict[str, type[TrainTask | EvaluateTask | ChainTask | SampleTask | SumTask]] = {
    "train": TrainTask,
    "evaluate": EvaluateTask,
    "chain": ChainTask,
    "sample": SampleTask,
    **dict.fromkeys(SUM_STEPS, SumTask),
}


def _cohort(task: pb.Task) -> int | None:
    """How many sites the coordinator says it has invited to the round; None if it does not say."""
    try:
        size = json.loads(task.body).get("cohort")
    except (ValueError, AttributeError, RecursionError):
        return None  # no task at all; it fails where it is read
    return size if isinstance(size, int) and size > 0 else None


def task_of(task: pb.Task, fields: Mapping[str, Any]) -> Task:
    """A task's body as the task that it describes.

    Args:
        fields: the body, parsed.

    Raises:
        SiteError: it has other fields than a task of its kind.
    """
    values: dict[str, Any] = {
        key: tuple(tuple(e) if isinstance(e, list) else e for e in value) if isinstance(value, list) else value
        for key, value in fields.items()
    }
    try:
        return _BODIES[task.kind](**values)
    except (TypeError, KeyError) as error:
        raise SiteError(
            f"the task {task.id} is no task of kind {task.kind!r} that this version knows",
            hint="install the same version of commonweight as the coordinator's",
        ) from error
