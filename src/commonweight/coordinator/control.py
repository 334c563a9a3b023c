"""What leads, admins and auditors call: submit, look, follow, cancel, fetch."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from ..errors import AccessError, StateError
from ..identity.certificates import Holder, verify_certificate
from ..identity.keys import JOB, verify
from ..privacy.spending import unit_of
from ..wire.messages import parse_job
from ..wire.protocol_pb2 import (
    AuditRequest,
    EventLine,
    FilePiece,
    FileRequest,
    Job,
    JsonReply,
    LedgerRequest,
    ListRunsRequest,
    ListSitesRequest,
    RenewReply,
    RenewRequest,
    RunRequest,
    SignedJob,
    SubmitReply,
    UploadStatus,
    WatchRequest,
)
from ..wire.refusals import Refusal, Refused
from .context import Context
from .plans import RunPlan
from .store import Run

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_PIECE_BYTES = 1 << 20
_EVENTS_AT_ONCE = 500


class ControlService:
    """The service `Control`."""

    def __init__(self, context: Context) -> None:
        self.here = context

    # --- submitting

    async def Submit(self, request: SignedJob, holder: Holder, context: Any) -> SubmitReply:
        return await self.here.away(self._submit, request, holder)

    def _submit(self, signed: SignedJob, holder: Holder) -> SubmitReply:
        job = self._checked(signed, holder)
        plan = RunPlan.of(job, self.here.settings.strategies)
        plan.check_initial()
        frame = plan.initial
        self.here.receiver.check_size("the initial tensors", frame)
        store = self.here.store
        run = store.add_run(
            job.id,
            job.name,
            job.recipe,
            signed.job,
            signed.signature,
            signed.certificate,
            holder.name,
            {"initial": frame.digest},
        )
        if run.state != "receiving":  # submitted before, and arrived
            return SubmitReply(run=run.id, upload=UploadStatus(state=UploadStatus.ACCEPTED))
        upload = self.here.receiver.open_initial(run.id, frame, holder.name, self.here.files(run.id))
        return SubmitReply(run=run.id, upload=upload)

    def _checked(self, signed: SignedJob, holder: Holder) -> Job:
        """The job, if it is what its signature says and its signer is the caller."""
        signer = verify_certificate(signed.certificate, self.here.authority.certificate_pem)
        if (signer.name, signer.signing_key) != (holder.name, holder.signing_key):
            raise AccessError(f"the job is signed by {signer.name!r}, but {holder.name!r} submits it")
        if not verify(signer.signing_key, JOB, signed.job, signed.signature):
            raise Refused(Refusal.BAD_SIGNATURE, "the job's signature does not fit")
        job = parse_job(signed)
        if not _RUN_ID.fullmatch(job.id):
            raise Refused(Refusal.MALFORMED, "a job's id is 32 hex digits")
        if job.kind != "train":
            raise Refused(Refusal.MALFORMED, f"a job of kind {job.kind[:40]!r}; this coordinator knows: train")
        known = {principal.name for principal in self.here.store.principals("site")}
        unknown = [site for site in job.sites if site not in known]
        if unknown:
            raise StateError(
                f"no site is enrolled under the name {unknown[0]!r}",
                hint=f"enrolled: {', '.join(sorted(known)) or 'none'}",
            )
        return job

    # --- looking

    async def ListRuns(self, request: ListRunsRequest, holder: Holder, context: Any) -> JsonReply:
        runs = await self.here.away(self.here.store.runs)
        return _json({"runs": [_summary(run) for run in runs]})

    async def GetRun(self, request: RunRequest, holder: Holder, context: Any) -> JsonReply:
        return _json(await self.here.away(self._run, request.run))

    def _run(self, which: str) -> dict[str, Any]:
        run, store = self._find(which), self.here.store
        plan = self.here.plans.of(run.id)
        assert plan is not None
        commits = store.commits(run.id)
        last = max(commits, default=0)
        files = self.here.blobs.keys(f"runs/{run.id}/result") if run.has_ended else []
        attending, streams = self.here.presence.attending(), self.here.hub.streams
        return {
            **_summary(run),
            "recipe": run.recipe,
            "rounds": plan.recipe.federation.rounds,
            "round": last,
            "secure_sums": plan.recipe.privacy.secure_aggregation == "on",
            "protects": unit_of(plan.recipe.privacy),
            "base": commits[last]["state"]["base"] if commits else "",
            "leader": store.leader(run.id),
            "sites": [
                {
                    "site": m.site,
                    "state": m.state,
                    "reason": m.reason,
                    "attending": m.site in attending,
                    "doing": streams[m.site].doing if m.site in streams else "",
                }
                for m in store.members(run.id)
            ],
            "history": [
                {k: v for k, v in record.items() if k != "state"} | {"round": n} for n, record in commits.items() if n
            ],
            "files": sorted(key.rpartition("/")[2] for key in files),
            "must_match": dict(plan.job.must_match),
        }

    def _find(self, which: str) -> Run:
        """A run by its id, the beginning of it, or its name (the latest of that name)."""
        known = self.here.store.find_run(which)
        if known is not None:
            return known
        runs = self.here.store.runs()
        found = [run for run in runs if run.name == which][:1]
        if not found and len(which) >= 4:
            found = [run for run in runs if run.id.startswith(which)]
        if len(found) != 1:
            what = "several runs begin" if found else "there is no run that begins"
            raise StateError(f"{what} with {which!r}", hint="`commonweight status` lists the runs")
        return found[0]

    async def ListSites(self, request: ListSitesRequest, holder: Holder, context: Any) -> JsonReply:
        return _json(await self.here.away(self._sites))

    def _sites(self) -> dict[str, Any]:
        attending = self.here.presence.attending()
        return {
            "sites": [
                {
                    "site": p.name,
                    "state": p.state,
                    "reason": p.reason,
                    "enrolled_at": p.enrolled_at,
                    "attending": p.name in attending,
                }
                for p in self.here.store.principals("site")
            ]
        }

    async def Watch(self, request: WatchRequest, holder: Holder, context: Any) -> AsyncIterator[EventLine]:
        run = await self.here.away(self._find, request.run)
        after, store = request.after, self.here.store
        with store.bus.subscribe(f"events/{run.id}") as news, store.bus.subscribe(f"run/{run.id}") as changes:
            while True:
                ended = (await self.here.away(store.run_row, run.id)).has_ended
                events = await self.here.away(partial(store.events, run.id, after, _EVENTS_AT_ONCE))
                for sequence, line in events:
                    after = sequence
                    yield EventLine(sequence=sequence, line=line.encode())
                if not events and (ended or not request.follow):
                    return
                if not events:
                    await _first(news, changes)

    async def GetFile(self, request: FileRequest, holder: Holder, context: Any) -> AsyncIterator[FilePiece]:
        run = await self.here.away(self._find, request.run)
        prefix = f"runs/{run.id}/result"
        keys = await self.here.away(self.here.blobs.keys, prefix)
        key = f"{prefix}/{request.name}"
        if key not in keys:
            names = ", ".join(sorted(k.rpartition("/")[2] for k in keys)) or "none yet"
            raise StateError(f"run {run.name!r} has no file {request.name[:80]!r}", hint=f"its files: {names}")
        path = await self.here.away(self.here.blobs.open_local, key)
        with path.open("rb") as file:
            while piece := await self.here.away(file.read, _PIECE_BYTES):
                yield FilePiece(content=piece)

    async def ReadAudit(self, request: AuditRequest, holder: Holder, context: Any) -> AsyncIterator[EventLine]:
        after = request.after
        while entries := await self.here.away(self.here.store.audit_entries, after):
            for entry in entries:
                after = entry.sequence
                line = {**vars(entry), "hash": entry.hash.hex(), "details": dict(entry.details)}
                yield EventLine(sequence=entry.sequence, line=json.dumps(line).encode())

    async def ReadLedger(self, request: LedgerRequest, holder: Holder, context: Any) -> JsonReply:
        lines, budget = await self.here.away(self.here.store.spent), self.here.settings.privacy_budget
        return _json(
            {
                "lines": [line.to_json() for line in lines],
                "budget": None if budget is None else budget.model_dump(exclude_none=True),
            }
        )

    # --- changing

    async def Cancel(self, request: RunRequest, holder: Holder, context: Any) -> JsonReply:
        run = await self.here.away(self._find, request.run)
        if holder.role == "lead" and run.signer != holder.name:
            raise AccessError(f"run {run.name!r} is {run.signer}'s; a lead may cancel only runs of their own")
        await self.here.away(self.here.store.request_cancel, run.id, holder.name)
        run = await self.here.away(self.here.store.run_row, run.id)
        if run.has_ended:
            await self.here.away(self.here.receiver.forget_run, run.id)
        return _json(_summary(run))

    async def Renew(self, request: RenewRequest, holder: Holder, context: Any) -> RenewReply:
        return RenewReply(certificate=await self.here.away(self.here.renew, holder, request.csr))


async def _first(*subscriptions: Any) -> None:
    """Wait until one of them has something to tell, or a while."""
    tasks = [asyncio.create_task(subscription.wait_async(30.0)) for subscription in subscriptions]
    _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()


def _summary(run: Run) -> dict[str, Any]:
    return {
        "id": run.id,
        "name": run.name,
        "state": run.state,
        "error": run.error,
        "hint": run.hint,
        "lead": run.signer,
        "submitted_at": run.submitted_at,
        "ended_at": run.ended_at,
        "cancelled_by": run.cancelled_by,
    }


def _json(value: dict[str, Any]) -> JsonReply:
    return JsonReply(json=json.dumps(value).encode())
