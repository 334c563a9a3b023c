"""Who may do what, asked over real connections: each denial reaches the caller and the audit log, and no caller can
fill the log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commonweight.coordinator import guard
from commonweight.coordinator.denials import LONGEST_S, PER_ACTOR, WINDOW_S, Denials
from commonweight.coordinator.folder import enroll
from commonweight.coordinator.store import Store
from commonweight.errors import AccessError
from commonweight.identity.authority import Authority
from commonweight.identity.certificates import new_request, new_tls_key
from commonweight.identity.enrol import enrol
from commonweight.identity.folder import IdentityFolder
from commonweight.identity.keys import ENROL, SigningKey
from commonweight.identity.tls import TARGET_OPTIONS, channel_credentials, enrolment_channel_credentials
from commonweight.identity.tokens import Token
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.refusals import Refusal
from commonweight.wire.service import CODE_KEY, CONTROL, ENROLMENT, FEDERATION, channel_options, stub

from .federations import Coordinator, Hand, Site, chunks_of, frame_for, theta, wait_for

import grpc  # isort: skip

DENIED, INVALID = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT
#: what the project promises; every test here is far below it
REVOKED_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def site(coordinator: Coordinator) -> Site:
    return coordinator.site("north")


@pytest.fixture(scope="module")
def run(coordinator: Coordinator, lead: Hand, site: Site) -> str:
    """A run of `north` alone, which waits for it to train."""
    site.answers["train"] = lambda *_: None
    run = lead.submit(lead.job(sites=["north"]))
    site.task()
    return run


# --- roles


def request_of(method: str, run: str) -> Any:
    match method:
        case "Control/GetFile":
            return pb.FileRequest(run=run, name="report.html")
        case "Transfer/Push":
            return iter([b"0000chunk"])
        case "Federation/Attend":
            return iter([pb.SiteMessage(hello=pb.Hello(protocol_min=1, protocol_max=1))])
    service, _, name = method.partition("/")
    table = {"Federation": FEDERATION, "Control": CONTROL}.get(service)
    kind = pb.FetchRequest if table is None else table[name].request
    assert kind is not None
    return kind(run=run) if "run" in kind.DESCRIPTOR.fields_by_name else kind()


@pytest.mark.parametrize(
    ("who", "method"),
    [
        *[("site", f"Control/{name}") for name in CONTROL],
        *[(user, f"Federation/{name}") for user in ("lead", "admin", "auditor") for name in FEDERATION],
        ("auditor", "Control/Submit"),
        ("auditor", "Control/Cancel"),
        ("auditor", "Transfer/Push"),
        ("admin", "Control/Submit"),
        ("admin", "Transfer/Push"),
        ("lead", "Control/ReadAudit"),
    ],
)
def test_a_role_may_do_its_own_work_only(
    request: pytest.FixtureRequest, coordinator: Coordinator, run: str, who: str, method: str
) -> None:
    hand: Hand = request.getfixturevalue(who)
    if method == "Federation/Attend":
        with pytest.raises(grpc.RpcError) as caught:
            list(hand.stream(method, request_of(method, run)))
        code, message = caught.value.code(), caught.value.details()  # type: ignore[attr-defined]
    else:
        denial = hand.denied(method, request_of(method, run))
        code, message = denial.code, denial.message
    assert (code, message) == (DENIED, f"a {hand.identity.holder.role} may not call {method}")
    assert coordinator.audited("call denied", hand.name, message).subject == method


def test_a_call_without_a_certificate_does_not_reach_the_services(coordinator: Coordinator) -> None:
    authority = (coordinator.home / "authority" / "authority.pem").read_bytes()
    options = [*channel_options(), *TARGET_OPTIONS]
    credentials = enrolment_channel_credentials(authority)
    entries = len(coordinator.audit())
    with grpc.secure_channel(coordinator.settings.address, credentials, options=options) as channel:
        for _ in range(5):
            with pytest.raises(grpc.RpcError) as caught:
                stub(channel, CONTROL)["ListRuns"](pb.ListRunsRequest(), timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    assert len(coordinator.audit()) == entries


def test_another_authority_is_not_heard(coordinator: Coordinator, tmp_path: Path) -> None:
    """Nor is a certificate of the right authority that this coordinator has not issued."""
    other = Authority.create(tmp_path / "other", name="other")
    stranger = _issued(other, tmp_path / "stranger", "north", coordinator, trusted=coordinator.here.authority)
    with pytest.raises(AccessError):  # its own side sees that it does not fit
        channel_credentials(stranger)
    forged = _issued(coordinator.here.authority, tmp_path / "forged", "north", coordinator)
    denial = coordinator.hold(forged).denied("Federation/GetJob", pb.JobRequest(run="r"))
    assert denial.code is DENIED
    assert "not known" in denial.message
    coordinator.audited("call denied", "north", "not known")


def _issued(
    authority: Authority, folder: Path, name: str, coordinator: Coordinator, trusted: Authority | None = None
) -> Any:
    """An identity that no token has made."""
    asked = IdentityFolder.prepare(folder)
    pem = authority.issue(asked.csr, name=name, role="site", signing_key=asked.signing_key, hours=1.0)
    identity = IdentityFolder.complete(
        folder,
        name=name,
        role="site",
        certificate=pem,
        authority=authority.certificate_pem,
        address=coordinator.settings.address,
    )
    if trusted is None:
        return identity
    return type(identity)(
        identity.path,
        identity.holder,
        identity.address,
        identity.signing_key,
        identity.tls_key,
        identity.certificate,
        trusted.certificate_pem,
    )


# --- certificates that end


def test_a_revoked_site_is_cut_and_heard_no_more(coordinator: Coordinator) -> None:
    site = coordinator.site("revoked")
    began = time.monotonic()
    coordinator.store.set_state("revoked", "revoked", "its key was stolen", "ada")
    bye = site.stay.first("bye")
    site.stay.ended()
    assert not bye.come_back
    assert "revoked" in bye.reason
    denial = site.denied("Federation/GetJob", pb.JobRequest(run="r"))
    assert denial.code is DENIED
    again = site.attendance()
    again.ended()
    assert again.error is not None
    assert again.error.code is DENIED
    assert time.monotonic() - began < REVOKED_WITHIN_S
    coordinator.audited("call denied", "revoked", "revoked")
    assert "revoked" not in coordinator.here.presence.attending()


def test_a_revocation_by_another_process_is_noticed_without_a_notice(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`coordinator revoke` beside a coordinator on SQLite: nothing tells it, so that it must look."""
    assert 2 * guard._FRESH_S < REVOKED_WITHIN_S
    monkeypatch.setattr(guard, "_FRESH_S", 0.5)
    site = coordinator.site("unheard")
    with Store(coordinator.settings.database_url(coordinator.home)) as elsewhere:
        elsewhere.set_state("unheard", "revoked", "gone", "ada")
    assert not site.stay.first("bye").come_back
    assert site.denied("Federation/GetJob", pb.JobRequest(run="r")).code is DENIED


def test_a_revoked_user_is_cut_in_the_middle_of_a_watch(coordinator: Coordinator, lead: Hand, run: str) -> None:
    watcher = coordinator.hand("wanda", "auditor")
    lines = watcher.stream("Control/Watch", pb.WatchRequest(run=run, follow=True))
    next(lines)
    coordinator.store.set_state("wanda", "revoked", "left", "ada")
    coordinator.store.add_events(run, ['{"event": "secret"}'])
    told: list[Any] = []
    with pytest.raises(grpc.RpcError) as caught:
        told.extend(lines)
    assert not any(b"secret" in line.line for line in told)
    assert caught.value.code() is DENIED  # type: ignore[attr-defined]


def test_an_upload_of_a_site_that_is_revoked_meanwhile_does_not_count(coordinator: Coordinator, lead: Hand) -> None:
    answers: dict[str, Callable[[Site, pb.Task], None]] = {"train": lambda *_: None}
    site, other = coordinator.site("half-way", **answers), coordinator.site("other-half", **answers)
    run = lead.submit(lead.job(sites=["half-way", "other-half"]))
    task = site.task()
    assert site.update(other.task()).code == Refusal.WRONG_TASK
    upload = site.open(site.manifest(task)).upload

    def chunks() -> Any:
        messages = _chunks(site)
        yield messages[0]
        wait_for(lambda: coordinator.here.receiver.receipt(upload).present)  # type: ignore[union-attr]
        coordinator.store.set_state("half-way", "revoked", "left", "ada")
        yield from messages[1:]

    denial = site.denied("Transfer/Push", chunks(), commonweight_upload=upload)
    assert denial.code is DENIED
    assert coordinator.store.upload(upload).state != "accepted"  # type: ignore[union-attr]
    # without it the round goes on, and so does the run
    assert other.update(other.task()).state == pb.UploadStatus.ACCEPTED
    ended = lead.wait(run)
    assert ended["history"][0]["failed"] == {"half-way": "its enrolment was revoked"}


def _chunks(site: Site) -> list[bytes]:
    return chunks_of(theta(), frame_for(theta(), "delta"))


def test_an_expired_certificate_ends_an_attendance(tmp_path: Path) -> None:
    with Coordinator(tmp_path, certificate_hours=5 / 3600) as coordinator:
        site = coordinator.site("brief")
        bye = site.stay.first("bye")
        assert not bye.come_back
        assert "expired" in bye.reason
        denial = site.denied("Federation/GetJob", pb.JobRequest(run="r"))
        assert denial.code in (DENIED, grpc.StatusCode.UNAVAILABLE)  # told on the old connection, not let in on a new
        with pytest.raises(AccessError, match="expired"):
            channel_credentials(site.identity)
        if denial.code is DENIED:
            coordinator.audited("call denied", "?", "expired")


def test_a_renewed_certificate_is_of_the_same_holder(coordinator: Coordinator, site: Site) -> None:
    reply = site.call("Federation/Renew", pb.RenewRequest(csr=site.identity.request()))
    renewed = site.identity.write_certificate(reply.certificate)
    assert (renewed.holder.name, renewed.holder.role) == ("north", "site")
    assert renewed.holder.serial != site.identity.holder.serial
    assert coordinator.hold(renewed).denied("Federation/GetJob", pb.JobRequest(run="none")).code is INVALID
    # each renewal is an entry in the audit log: not as often as one likes
    before = len(coordinator.audit("certificate issued"))
    for _ in range(3):
        denial = site.denied("Federation/Renew", pb.RenewRequest(csr=site.identity.request()))
        assert (denial.code, denial.details["retry"]) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    assert len(coordinator.audit("certificate issued")) == before
    denial = site.denied("Federation/Renew", pb.RenewRequest(csr=b"no request"))
    assert denial.code is DENIED
    coordinator.audited("call denied", "north", "request")


# --- tokens


def asked(coordinator: Coordinator, folder: Path, **changes: Any) -> pb.EnrolReply:
    """A request for enrolment as it goes over the wire."""
    request = IdentityFolder.prepare(folder)
    values = {
        "protocol": 1,
        "csr": request.csr,
        "signing_key": request.signing_key,
        "possession": request.possession,
    }
    authority = (coordinator.home / "authority" / "authority.pem").read_bytes()
    options = [*channel_options(), *TARGET_OPTIONS]
    credentials = enrolment_channel_credentials(authority)
    with grpc.secure_channel(coordinator.settings.address_enrolment, credentials, options=options) as channel:
        reply: pb.EnrolReply = stub(channel, ENROLMENT)["Enrol"](pb.EnrolRequest(**{**values, **changes}), timeout=20)
        return reply


def refused(coordinator: Coordinator, folder: Path, **changes: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        asked(coordinator, folder, **changes)
    assert caught.value.code() is DENIED  # type: ignore[attr-defined]
    return str(caught.value.details())  # type: ignore[attr-defined]


def test_a_token_works_once(coordinator: Coordinator, tmp_path: Path) -> None:
    token = enroll(coordinator.home, "once", "site")
    enrol(token.to_text(), tmp_path / "first")
    assert "used already" in refused(coordinator, tmp_path / "second", secret=token.secret)
    coordinator.audited("enrolment refused", "?", "'once' was used already")


def test_a_token_expires(coordinator: Coordinator, tmp_path: Path) -> None:
    token = enroll(coordinator.home, "late", "site", hours=0.0001)
    wait_for(lambda: time.time() > token.expires_at)
    with pytest.raises(AccessError, match="expired"):
        enrol(token.to_text(), tmp_path / "honest")
    assert "expired" in refused(coordinator, tmp_path / "hostile", secret=token.secret)
    coordinator.audited("enrolment refused", "?", "'late' has expired")


def test_a_token_gives_its_own_role_whatever_is_asked_for(coordinator: Coordinator, tmp_path: Path) -> None:
    token = enroll(coordinator.home, "humble", "auditor")
    wished = Token.from_text(token.to_text()).model_copy(update={"role": "lead"})
    with pytest.raises(AccessError):
        enrol(wished.to_text(), tmp_path / "wished")
    assert {p.name: p.role for p in coordinator.store.principals()}["humble"] == "auditor"


def test_a_name_is_not_taken_over(coordinator: Coordinator, site: Site, tmp_path: Path) -> None:
    token = Token.make(
        name="north",
        role="site",
        address=coordinator.settings.address,
        enrolment=coordinator.settings.address_enrolment,
        authority_pem=coordinator.here.authority.certificate_pem,
    )
    coordinator.store.add_token(token.secret_hash, "north", "site", token.expires_at, "local")
    assert "enrolled already" in refused(coordinator, tmp_path / "thief", secret=token.secret)
    assert site.denied("Federation/GetJob", pb.JobRequest(run="none")).code is INVALID  # it is still let in


def test_a_replaced_identity_is_heard_no_more(coordinator: Coordinator, tmp_path: Path) -> None:
    old = coordinator.site("twice")
    enrol(enroll(coordinator.home, "twice", "site", replace=True).to_text(), tmp_path / "new")
    assert not old.stay.first("bye").come_back
    assert old.denied("Federation/GetJob", pb.JobRequest(run="r")).code is DENIED


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("slip-1", {"protocol": 7}, "versions 1 to 1"),
        ("slip-2", {"possession": b"forged"}, "not signed by the signing key"),
        ("slip-3", {"signing_key": b"short"}, "not signed by the signing key"),
        ("slip-4", {"csr": b"junk"}, "not signed by the signing key"),
        ("slip-5", {"secret": "no such secret"}, "not known"),
        ("slip-6", {"secret": ""}, "not known"),
    ],
)
def test_a_slip_does_not_use_a_token_up(
    coordinator: Coordinator, tmp_path: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    token = enroll(coordinator.home, name, "site")
    assert reason in refused(coordinator, tmp_path / "slip", **{"secret": token.secret, **changes})
    assert enrol(token.to_text(), tmp_path / "honest").holder.name == name


def test_a_request_that_no_certificate_follows_from_does_not_use_a_token_up(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    """The signature by the signing key is good, the request for a certificate is not."""
    token, key = enroll(coordinator.home, "unsigned", "site"), SigningKey.generate()
    csr = bytearray(new_request(new_tls_key()))
    csr[-1] ^= 1
    changes = {"csr": bytes(csr), "signing_key": key.public, "possession": key.sign(ENROL, bytes(csr))}
    assert "request" in refused(coordinator, tmp_path / "slip", secret=token.secret, **changes)
    assert enrol(token.to_text(), tmp_path / "honest").holder.name == "unsigned"


def test_a_stranger_cannot_send_much(coordinator: Coordinator, tmp_path: Path) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        asked(coordinator, tmp_path, secret="x" * 100_000)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]


def test_a_stranger_cannot_fill_the_audit_log(tmp_path: Path) -> None:
    """The same attempt is written once, and different ones up to a bound; the rest is counted."""
    with Coordinator(tmp_path) as coordinator:
        for _ in range(10):
            refused(coordinator, tmp_path / "stranger", secret="guess")
        assert len(coordinator.audit()) == 1
        for number in range(2 * PER_ACTOR):
            refused(coordinator, tmp_path / "stranger", protocol=100 + number)
        assert len(coordinator.audit()) == PER_ACTOR


# --- acting as somebody else


def test_a_manifest_in_another_sites_name(coordinator: Coordinator, site: Site, run: str) -> None:
    other = coordinator.site("impostor")
    status = other.open(other.manifest(site.task(), site="north"))
    assert (status.state, status.code) == (pb.UploadStatus.REFUSED, Refusal.WRONG_SITE)
    coordinator.audited("update refused", "impostor", "wrong-site")
    status = other.open(other.manifest(site.task()))
    assert status.code == Refusal.WRONG_TASK
    coordinator.audited("update refused", "impostor", "wrong-task")
    # with north's signature, which the impostor has overheard
    status = other.open(site.manifest(site.task()))
    assert status.code == Refusal.BAD_SIGNATURE
    coordinator.audited("update refused", "impostor", "bad-signature")
    assert coordinator.store.task(site.task().id).is_open  # type: ignore[union-attr]


def test_a_reply_to_another_sites_task(coordinator: Coordinator, site: Site, run: str) -> None:
    other = coordinator.site("busybody")
    other.reply(site.task(), pb.TaskReply.FAILED, reason="on its behalf")
    bye = other.stay.first("bye")
    assert "busybody" in bye.reason
    coordinator.audited("reply refused", "busybody", "wrong-site")
    assert coordinator.store.task(site.task().id).is_open  # type: ignore[union-attr]


def test_pushing_into_another_sites_upload(coordinator: Coordinator, lead: Hand, site: Site, run: str) -> None:
    upload = site.open(site.manifest(site.task())).upload
    other = coordinator.site("pusher")
    denial = other.denied("Transfer/Push", iter(_chunks(other)), commonweight_upload=upload)
    assert denial.code is DENIED
    coordinator.audited("call denied", "pusher", "is not one of")
    initial = lead.call("Control/Submit", lead.sign(lead.job(sites=["north"]))).upload
    denial = other.denied("Transfer/Push", iter(_chunks(other)), commonweight_upload=initial.upload)
    assert denial.code is DENIED
    assert len(site.open(site.manifest(site.task())).missing) == len(_chunks(site))


def test_a_site_that_a_job_does_not_name(coordinator: Coordinator, lead: Hand, site: Site, run: str) -> None:
    other = coordinator.site("curious")
    for method, request in (
        ("Federation/GetJob", pb.JobRequest(run=run)),
        ("Transfer/Fetch", pb.FetchRequest(run=run, frame=site.task().base)),
    ):
        denial = other.denied(method, request)
        assert denial.code is DENIED
        assert "is not for site 'curious'" in denial.message
        assert coordinator.audited("call denied", "curious", "is not for site").subject in ("Federation/GetJob", method)
    assert {e.subject for e in coordinator.audit("call denied") if e.actor == "curious"} == {
        "Federation/GetJob",
        "Transfer/Fetch",
    }
    assert not other.tasks


def test_a_lead_cancels_only_its_own_runs(coordinator: Coordinator, lead: Hand, admin: Hand, site: Site) -> None:
    run = lead.call("Control/Submit", lead.sign(lead.job(sites=["north"]))).run
    rival = coordinator.hand("rita", "lead")
    denial = rival.denied("Control/Cancel", pb.RunRequest(run=run))
    assert denial.code is DENIED
    coordinator.audited("call denied", "rita", "is lena's")
    assert lead.run(run)["state"] == "receiving"
    assert admin.json("Control/Cancel", pb.RunRequest(run=run))["state"] == "cancelled"


def test_a_job_is_submitted_by_its_signer(coordinator: Coordinator, lead: Hand, site: Site) -> None:
    rival = coordinator.hand("rob", "lead")
    signed = lead.sign(lead.job(sites=["north"]))
    denial = rival.denied("Control/Submit", signed)
    assert denial.code is DENIED
    assert "signed by 'lena'" in denial.message
    coordinator.audited("call denied", "rob", "signed by 'lena'")

    tampered = pb.SignedJob(job=signed.job, signature=signed.signature, certificate=rival.identity.certificate)
    denial = rival.denied("Control/Submit", tampered)
    assert (denial.code, denial.metadata[CODE_KEY]) == (INVALID, Refusal.BAD_SIGNATURE)
    coordinator.audited("call denied", "rob", "bad-signature")

    job = pb.Job.FromString(signed.job)
    job.purpose = "something else"
    tampered = pb.SignedJob(job=job.SerializeToString(), signature=signed.signature, certificate=signed.certificate)
    denial = lead.denied("Control/Submit", tampered)
    assert denial.metadata[CODE_KEY] == Refusal.BAD_SIGNATURE
    assert not [r for r in coordinator.store.runs() if r.signer == "rob" or r.id == job.id]


def test_a_job_signed_by_a_site_or_by_no_one_of_the_federation(
    coordinator: Coordinator, lead: Hand, site: Site, tmp_path: Path
) -> None:
    signed = lead.sign(lead.job(sites=["north"]))
    other = Authority.create(tmp_path / "other", name="other")
    request = new_request(new_tls_key())
    key = lead.identity.signing_key.public
    forged = other.issue(request, name="lena", role="lead", signing_key=key, hours=1.0)
    denial = lead.denied("Control/Submit", pb.SignedJob(job=signed.job, signature=signed.signature, certificate=forged))
    assert denial.code is DENIED
    assert site.denied("Control/Submit", signed).code is DENIED


# --- the counting itself


class Log:
    """A store that only audits."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, dict[str, Any]]] = []

    def audit(self, action: str, *, actor: str, subject: str = "", **details: Any) -> None:
        self.entries.append((action, actor, details))


def test_denials_are_written_once_and_counted_after() -> None:
    log, now = Log(), [0.0]
    denials = Denials(log, clock=lambda: now[0])  # type: ignore[arg-type]
    assert denials.note("denied", actor="a", reason="x")
    assert not any(denials.note("denied", actor="a", reason="x") for _ in range(99))
    assert denials.note("denied", actor="b", reason="x")
    denials.flush()
    assert len(log.entries) == 2
    now[0] += WINDOW_S
    denials.flush()
    assert log.entries[2:] == [("denied", "a", {"reason": "x", "repeated": 99})]
    # as long as it goes on it is written ever more rarely
    written, seconds = [], int(3 * LONGEST_S)
    for _ in range(seconds):
        now[0] += 1.0
        denials.note("denied", actor="a", reason="x")
        denials.flush()
        written.append(len(log.entries))
    assert written[-1] - 3 <= 9
    assert sum(e[2].get("repeated", 1) for e in log.entries if e[1] == "a") <= 100 + seconds
    # once it has stopped for long enough, the next is news
    now[0] += 3 * LONGEST_S
    denials.flush()
    now[0] += LONGEST_S
    denials.flush()
    assert denials.note("denied", actor="a", reason="x")


def test_many_different_denials_of_one_actor_are_counted_together() -> None:
    log, now = Log(), [0.0]
    denials = Denials(log, clock=lambda: now[0])  # type: ignore[arg-type]
    for number in range(1000):
        denials.note("denied", actor="?", reason=f"{number}")
    assert denials.note("denied", actor="other", reason="0")
    assert len(log.entries) == PER_ACTOR + 1
    now[0] += WINDOW_S
    denials.flush()
    assert log.entries[-1] == ("more was denied", "?", {"repeated": 1000 - PER_ACTOR})
    assert json.dumps(log.entries)
