"""Commands for a site's engineer: site join, run, status, policy, ledger, pending, approve, deny, export, audit,
accept-log, peers."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AccessError, PolicyError, RecipeError, StateError
from .folders import whole_or_nothing
from .jobs import require_free
from .network import (
    TokenArgument,
    check_joiner,
    enrol_into,
    moment,
    one_of,
    read_token,
    short,
    since_when,
    span,
    told,
    who,
)
from .start import QuietOption
from .terminal import JsonOption, begin, print_json, say, table

if TYPE_CHECKING:
    from ..site.policy import Decision, Policy
    from ..site.records import SiteRecords

_LOCK = ".lock"

SiteArgument = Annotated[Path, typer.Argument(help="The site's folder.", metavar="DIR")]
RunIdArgument = Annotated[str, typer.Argument(help="A run's id, the beginning of it, or its name.", metavar="RUN")]
RunOption = Annotated[
    str | None, typer.Option("--run", help="Only this run: its id, the beginning of it, or its name.", metavar="RUN")
]


def join(
    token: TokenArgument,
    directory: Annotated[Path, typer.Argument(help="Folder to make for this site.", metavar="DIR")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="This site's rows: a file or a folder of files.",
            metavar="PATH",
            show_default="DIR/rows.jsonl",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Join a federation as a site by a one-time token, and write settings to edit.

    Until the policy has been filled in, the site denies everything. In a folder that has joined before, a new token
    replaces the certificate, and the settings stay.
    """
    begin(json)
    from ..identity.tokens import Token
    from ..site.settings import POLICY_FILE, SETTINGS_FILE, load_settings, write_starter

    text = read_token(token)
    meant = Token.from_text(text)
    check_joiner(meant, role="site")
    again = (directory / SETTINGS_FILE).exists()
    if again and (named := load_settings(directory).name) != meant.name:
        raise AccessError(
            f"{directory} is the folder of site {named}, and the token is for {meant.name}",
            hint="choose another folder",
        )
    if again and data is not None:
        raise StateError(f"{directory / SETTINGS_FILE} is there already", hint="leave --data out, and edit it instead")
    if not again:  # before the token is used up
        write_starter(directory, meant.name, meant.address, data or directory / "rows.jsonl")
    try:
        identity = enrol_into(text, meant.name, directory / "identity")
    except BaseException:
        for name in () if again else (SETTINGS_FILE, POLICY_FILE):
            (directory / name).unlink(missing_ok=True)
        raise
    if json:
        facts = {"site": meant.name, "coordinator": identity.address}
        print_json({"folder": str(directory), **facts, "signing_key": identity.holder.signing_key.hex()})
        return
    say(f"joined {identity.address} as site {meant.name}; its keys are in {directory / 'identity'}")
    if again:
        say(f"its settings in {directory} stay as they are")
        return
    say("next:")
    say(f"  edit {directory / SETTINGS_FILE}: where this site's rows are, and how to read them")
    say(f"  edit {directory / POLICY_FILE}: what may happen here. Until then it denies everything")
    say(f"  commonweight site policy {directory}")
    say(f"  commonweight site run {directory}")


def run(directory: SiteArgument, quiet: QuietOption = False) -> None:
    """Take part: attend, and work on what the policy allows, until SIGTERM or Ctrl-C.

    It only dials out. Events go to standard error, and in full to log.jsonl in the site's folder.
    """
    import asyncio

    from ..identity.folder import IdentityFolder
    from ..site.agent import Agent
    from ..site.audit import SiteAudit
    from ..site.log import SiteLog
    from ..site.policy import PolicyFile
    from ..site.settings import POLICY_FILE, load_settings
    from ..site.workshop import RecipeWorkshop
    from ..wire.buffers import bound_memory

    bound_memory()
    settings = load_settings(directory)
    with alone(directory, "site"), _records(directory) as records:
        identity = IdentityFolder.open(directory / "identity")
        if identity.holder.name != settings.name:
            raise AccessError(
                f"site.yaml is of site {settings.name}, but the identity beside it is of {identity.holder.name}",
                hint="correct name in site.yaml",
            )
        policy = PolicyFile(directory / POLICY_FILE)
        if not quiet:
            say(f"site {settings.name}: {_policy_in_short(directory)}")
        log = SiteLog(directory / "log.jsonl", quiet=quiet)
        try:
            audit = SiteAudit(directory / "audit.jsonl", records)
            workshop = RecipeWorkshop(settings, directory)
            asyncio.run(Agent(settings, identity, workshop, policy, records, audit, log=log).run(signals=True))
        finally:
            log.close()


@contextmanager
def alone(directory: Path, what: str) -> Iterator[None]:
    """Only one agent works in a site's folder, or a relay's."""
    with (directory / _LOCK).open("a") as lock:
        if not _lock(lock):
            raise StateError(f"another process runs the {what} in {directory}", hint="stop it first")
        yield


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_running(directory: Path) -> bool:
    if not (directory / _LOCK).exists():
        return False
    with (directory / _LOCK).open("a") as lock:
        return not _lock(lock)


@contextmanager
def _records(directory: Path) -> Iterator[SiteRecords]:
    """The site's records, of a folder that is a site's."""
    from ..site.records import SiteRecords
    from ..site.settings import SETTINGS_FILE

    if not (directory / SETTINGS_FILE).exists():
        raise StateError(
            f"{directory} is no site's folder: {SETTINGS_FILE} is missing",
            hint="a token makes one: commonweight site join TOKEN DIR",
        )
    records = SiteRecords(directory / "state.sqlite")
    try:
        yield records
    finally:
        records.close()


# --- looking


def status(directory: SiteArgument, json: JsonOption = False) -> None:
    """Show how a site stands: policy, runs, approvals, what has left, alarms."""
    begin(json)
    from ..identity.folder import IdentityFolder
    from ..site.policy import size
    from ..site.settings import load_settings

    settings = load_settings(directory)
    identity = IdentityFolder.open(directory / "identity")
    with _records(directory) as records:
        facts = _facts(directory, records)
    facts |= {
        "site": settings.name,
        "coordinator": settings.address,
        "certificate_ends": identity.holder.not_after,
        "running": _is_running(directory),
    }
    if json:
        print_json(facts)
        return
    say(f"site {settings.name}, coordinator {settings.address}; {'running' if facts['running'] else 'not running'}")
    left = identity.holder.not_after - time.time()
    say(f"certificate  {f'good for {span(left)}; it renews itself' if left > 0 else 'expired: ask for a new token'}")
    say(f"policy       {facts['policy']}")
    say(f"has left     {size(facts['bytes'])} in all; `commonweight site audit {directory}` lists it")
    if facts["head"]:
        say(f"coordinator's audit log, as last shown: {facts['head']}")
    for alarm in facts["alarms"]:
        say(f"ALARM {moment(alarm['t'])}: {alarm['text']}")
    if facts["runs"]:
        print()
        rows = [(short(r["run"]), r["name"], r["lead"], r["state"], moment(r["t"])) for r in facts["runs"]]
        table(("run", "name", "lead", "state", "since"), rows)
        for r in facts["runs"]:
            if r["reason"]:
                say(f"{short(r['run'])}: {r['reason']}")
    if facts["pending"]:
        say(f"\n{len(facts['pending'])} waiting for approval: commonweight site pending {directory}")


def _facts(directory: Path, records: SiteRecords) -> dict[str, Any]:
    head = records.last_head()
    jobs = [
        {"run": job.run, "name": job.facts.name, "lead": job.facts.signer}
        | {"state": job.state, "reason": job.reason, "t": job.t}
        for job in records.jobs()
    ]
    return {
        "policy": _policy_in_short(directory),
        "bytes": sum(sent.bytes for sent in records.sent()),
        "runs": jobs,
        "pending": [question.run for question in records.pending()],
        "head": None if head is None else f"{head.sequence}:{head.hash.hex()}",
        "alarms": [{"t": t, "text": text} for t, text in records.alarms()],
    }


def _policy_in_short(directory: Path) -> str:
    from ..site.policy import load_policy

    try:
        closed = _closed(load_policy(directory))
    except PolicyError as error:
        return f"denies everything: {told(error)}"
    if closed:
        return f"denies every job: {'; '.join(closed)}"
    return f"in force; `commonweight site policy {directory}` shows it"


def _closed(policy: Policy) -> list[str]:
    """Why a policy that can be read allows no job at all; nothing if it may allow one."""
    lists = ("models", "signers", "kinds", "purposes", "strategies", "objectives")
    closed = [f"{name} is empty" for name in lists if not getattr(policy, name)]
    limits = ("max_rounds", "max_bytes_per_round", "max_bytes_total")
    return closed + [f"{name} is 0" for name in limits if not getattr(policy, name)]


def policy(directory: SiteArgument, run: RunOption = None, json: JsonOption = False) -> None:
    """Say what the site's policy allows, or why it denies everything.

    With --run: what it says, as it stands now, of a run that this site was asked to join.
    """
    begin(json)
    from ..site.policy import decide, load_policy

    found = load_policy(directory)
    if run is None:
        closed = _closed(found)
        if json:
            print_json({"digest": found.digest, "closed": closed, "policy": found.model_dump(mode="json")})
        else:
            _show_policy(found, closed)
        return
    with _records(directory) as records:
        job = records.job(_run_of(records, run))
        assert job is not None
        decision = decide(found, job.facts, records.spent(job.run))
    if json:
        print_json({"run": job.run, "allowed": decision.allowed, "needs_approval": decision.needs_approval}
                   | {"reasons": decision.reasons, "withheld": list(decision.withheld)})  # fmt: skip
        return
    say(job.facts.summary() + "\n")
    _show_decision(decision, directory, job.run)


def _show_policy(policy: Policy, closed: Sequence[str]) -> None:
    rows = list(_policy_rows(policy, ""))
    table(("field", "value", "meaning"), rows)
    print()
    if closed:
        say(f"As it stands it denies every job: {'; '.join(closed)}.")
    else:
        say(f"In force, digest {policy.digest[:12]}. A change of the file takes effect at the next task.")


def _policy_rows(section: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    from ..recipe.schema import Section
    from ..site.policy import size

    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _policy_rows(value, f"{prefix}{name}.")
            continue
        yield f"{prefix}{name}", size(value) if "bytes" in name else _value(value), field.description or ""


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "nothing"
    return (
        {True: "yes", False: "no", None: "no bound"}.get(value, str(value))
        if not isinstance(value, int | float) or isinstance(value, bool)
        else str(value)
    )


def _show_decision(decision: Decision, directory: Path, run: str) -> None:
    for reason in decision.reasons:
        say(f"  denied: {reason}")
    for what in decision.withheld:
        say(f"  withheld: {what}")
    if decision.needs_approval:
        say(f"the policy allows it once a person approves: commonweight site approve {directory} {short(run)}")
    elif decision.allowed:
        say("the policy allows it")


def ledger(
    directory: SiteArgument,
    delta: Annotated[
        float | None,
        typer.Option("--delta", help="Add up at this δ. Default: the policy's, else 1e-5.", metavar="DELTA"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what this site's updates have spent of its privacy.

    All runs together, and what the policy's budget leaves.
    """
    begin(json)
    from ..federation.ledger import Line
    from ..site.policy import load_policy
    from ..site.settings import load_settings
    from .privacy import Book, show_ledger

    settings = load_settings(directory)
    with _records(directory) as records:
        names = {job.run: f"{job.facts.name} ({short(job.run)})" for job in records.jobs()}
        lines = [Line(names.get(run, run), settings.name, spend) for run, spend in records.spends()]
    budget = None
    with suppress(PolicyError):  # what was spent is shown under whatever policy
        budget = load_policy(directory).privacy.budget
    show_ledger(Book(str(directory), lines, budget, budget.delta if budget else 1e-5), delta, json)


def pending(directory: SiteArgument, json: JsonOption = False) -> None:
    """Show the runs that wait for a person's approval, and what each asks for."""
    begin(json)
    with _records(directory) as records:
        found = records.pending()
    if json:
        print_json({"pending": [{"run": q.run, "summary": q.summary, "asked_t": q.asked_t} for q in found]})
        return
    if not found:
        say("nothing waits for approval")
    for question in found:
        say(f"asked {moment(question.asked_t)}\n{question.summary}")
        say(f"  commonweight site approve {directory} {short(question.run)}")
        say(f"  commonweight site deny {directory} {short(question.run)}\n")


def approve(directory: SiteArgument, run: RunIdArgument, json: JsonOption = False) -> None:
    """Let this site take part in a run.

    It begins within a heartbeat.
    """
    _decide(directory, run, True, json)


def deny(directory: SiteArgument, run: RunIdArgument, json: JsonOption = False) -> None:
    """Refuse a run, also one that was approved and goes on."""
    _decide(directory, run, False, json)


def _decide(directory: Path, which: str, approved: bool, json: bool) -> None:
    begin(json)
    from ..site.audit import SiteAudit

    word, by = "approved" if approved else "denied", who()
    with _records(directory) as records:
        names = {question.run: _name_of(records, question.run) for question in records.questions()}
        run = one_of(which, names, what="runs that asked for approval")
        SiteAudit(directory / "audit.jsonl", records).append(word, run=run, by=by)
        records.decide(run, approved, by)
    if json:
        print_json({"run": run, "name": names[run], "state": word, "by": by})
    else:
        say(f"{word} run {short(run)} ({names[run]})")


def accept_log(
    directory: SiteArgument,
    reason: Annotated[
        str, typer.Option("--reason", help="Why it is another, for this site's audit log.", metavar="TEXT")
    ],
    json: JsonOption = False,
) -> None:
    """Go on after an alarm about the coordinator's audit log: it may begin anew.

    For a coordinator that was restored from a backup, once you have heard so from people, not from the machine.
    """
    begin(json)
    from ..site.audit import SiteAudit

    with _records(directory) as records:
        head = records.last_head()
        known = "none" if head is None else f"{head.sequence}:{head.hash.hex()}"
        SiteAudit(directory / "audit.jsonl", records).append("log accepted", by=who(), reason=reason, head=known)
        records.forget_heads()
    if json:
        print_json({"head": None if head is None else known, "reason": reason})
    else:
        say(f"the head that was kept of the coordinator's audit log ({known}) no longer counts; start the site again")


def peers(
    directory: SiteArgument,
    forget: Annotated[
        str | None,
        typer.Option("--forget", help="Forget this site's key: the next that it shows is kept.", metavar="NAME"),
    ] = None,
    reason: Annotated[
        str, typer.Option("--reason", help="Why it has another key, for this site's audit log.", metavar="TEXT")
    ] = "",
    json: JsonOption = False,
) -> None:
    """Show the keys of the sites with which this one's updates are summed.

    Compare them with what those sites say of themselves.
    """
    begin(json)
    from ..identity.folder import IdentityFolder
    from ..site.audit import SiteAudit

    with _records(directory) as records:
        if forget is not None:
            if not reason.strip():
                raise RecipeError("--forget needs --reason", hint="say why that site has another key")
            known = records.peers().get(forget)
            records.forget_peer(forget)
            SiteAudit(directory / "audit.jsonl", records).append(
                "peer forgotten", by=who(), reason=reason, peer=forget, key=known.hex() if known else ""
            )
        found = {name: key.hex() for name, key in records.peers().items()}
    own = IdentityFolder.open(directory / "identity").holder
    if json:
        print_json({"peers": found, "forgotten": forget, "own": own.signing_key.hex()})
        return
    if forget is not None:
        say(f"the key of {forget} no longer counts: the next that it shows is kept")
        return
    say(f"this site's own key: {own.signing_key.hex()}")
    if not found:
        say("no secure sum yet: no other site's key is known here")
        return
    table(("site", "signing key"), list(found.items()))


def _name_of(records: SiteRecords, run: str) -> str:
    job = records.job(run)
    return job.facts.name if job is not None else ""


def _run_of(records: SiteRecords, which: str) -> str:
    return one_of(
        which, {job.run: job.facts.name for job in records.jobs()}, what="runs that this site was asked to join"
    )


# --- what is its own


def export(
    directory: SiteArgument,
    run: RunIdArgument,
    output: Annotated[Path, typer.Argument(help="Folder to write: new or empty.", metavar="OUTPUT")],
    json: JsonOption = False,
) -> None:
    """Write this site's own model of a run, as an adapter for other programs.

    Of a run whose sites have models or parts of their own: what the site used when it was last evaluated.
    """
    begin(json)
    from ..evaluate.text import size
    from ..federation.folder import storage_errors
    from ..site.run_files import RunFiles

    with _records(directory) as records:
        found = _run_of(records, run)
        name = _name_of(records, found)
    source = RunFiles(directory, found).personal
    if not source.is_dir():
        raise StateError(
            f"there is no model of this site's own of run {short(found)} ({name})",
            hint="there is one once the site has been evaluated in a run with personal parts or models, until "
            "keep.runs in site.yaml lets it go",
        )
    require_free(output)
    with whole_or_nothing(output), storage_errors(output):
        shutil.copytree(source, output, dirs_exist_ok=True)
    written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    if json:
        print_json({"run": found, "folder": str(output), "bytes": written})
    else:
        say(f"wrote this site's model of run {short(found)} ({name}; {size(written)}) to {output}")


# --- what has left


def audit(
    directory: SiteArgument,
    run: RunOption = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since", help="Only from then on: 2026-03-01, 2026-03-01T12:30, or 90m, 36h, 7d ago.", metavar="WHEN"
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also what did not leave: refusals, approvals, alarms.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check that no line was changed or taken out.")] = False,
    json: JsonOption = False,
) -> None:
    """Show exactly what has left this site: when, for which run, how much, its digest."""
    begin(json)
    from ..site.audit import LEFT, SiteAudit

    start = since_when(since) if since is not None else None
    with _records(directory) as records:
        log = SiteAudit(directory / "audit.jsonl", records)
        checked = log.verify() if verify else None
        names = {job.run: job.facts.name for job in records.jobs()}
        which = _run_of(records, run) if run is not None else None
        rows = [row for row in log.rows(which, start) if everything or row["what"] in LEFT]
        counted = sum(sent.bytes for sent in records.sent(which))
    totals = _totals(rows, LEFT)
    if json:
        found = None if checked is None else f"{checked[0]}:{checked[1]}"
        print_json({"rows": rows, "totals": totals, "counted": counted, "verified": found})
        return
    if rows:
        table(
            ("time", "run", "round", "what", "bytes", "chunks", "digest or reason", "to"),
            [_row(row) for row in rows],
            right=(2, 4, 5),
        )
        print()
    _show_totals(totals, names)
    if checked is not None:
        say(f"whole and unchanged: {checked[0]} lines, head {checked[0]}:{checked[1]}")


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    said = row["digest"] or row.get("reason") or (f"by {row['by']}" if "by" in row else "")
    amount = (f"{row['bytes']:,}", str(row["chunks"])) if row["digest"] or row["bytes"] else ("", "")
    return moment(row["t"]), short(row["run"]), str(row["round"]), row["what"], *amount, said, row["to"]


def _totals(rows: Iterable[dict[str, Any]], left: Sequence[str]) -> dict[str, dict[str, int]]:
    """Bytes by run and kind, of the lines shown."""
    totals: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["what"] in left:
            of_run = totals.setdefault(row["run"], {})
            of_run[row["what"]] = of_run.get(row["what"], 0) + row["bytes"]
    return totals


def _show_totals(totals: dict[str, dict[str, int]], names: dict[str, str]) -> None:
    from ..site.policy import size

    if not totals:
        say("nothing has left")
        return
    for run, kinds in totals.items():
        parts = ", ".join(f"{what} {size(num_bytes)}" for what, num_bytes in kinds.items())
        say(f"run {short(run)} ({names.get(run, '?')}): {parts}")
    say(f"in all {size(sum(sum(kinds.values()) for kinds in totals.values()))}")


#: in the order of the help
COMMANDS = (join, run, status, policy, ledger, pending, approve, deny, export, audit, accept_log, peers)
