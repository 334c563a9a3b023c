"""Commands for whoever runs a coordinator: coordinator init, serve, enroll, revoke, principals, audit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RecipeError, StateError
from .folders import whole_or_nothing
from .network import JOINING, audit_line, head_of, moment, verified, who
from .terminal import JsonOption, begin, note, print_json, say, table

if TYPE_CHECKING:
    from ..coordinator.settings import CoordinatorSettings
    from ..coordinator.store import Store

ENV = "COMMONWEIGHT_COORDINATOR"

FolderOption = Annotated[
    Path, typer.Option("--dir", "-d", envvar=ENV, help="The coordinator's folder.", metavar="DIR", show_default="here")
]


def init(
    directory: Annotated[Path, typer.Argument(help="Folder to make: new or empty.", metavar="DIR")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            help="A name or address by which sites reach it; the first one is written into tokens. Repeatable.",
            metavar="NAME",
            show_default="127.0.0.1",
        ),
    ] = None,
    listen: Annotated[
        str, typer.Option("--listen", help="Where it serves sites and users.", metavar="HOST:PORT")
    ] = "0.0.0.0:8443",
    enrolment: Annotated[
        str, typer.Option("--enrolment", help="Where it serves those who join.", metavar="HOST:PORT")
    ] = "0.0.0.0:8444",
    http: Annotated[
        str, typer.Option("--http", help="Where /metrics and /healthz are.", metavar="HOST:PORT")
    ] = "127.0.0.1:8480",
    database: Annotated[
        str, typer.Option("--database", help="A file in DIR (sqlite), or postgresql://….", metavar="URL")
    ] = "sqlite",
    blobs: Annotated[
        str, typer.Option("--blobs", help="A folder, seen from DIR, or s3://BUCKET/PREFIX.", metavar="URL")
    ] = "blobs",
    json: JsonOption = False,
) -> None:
    """Make a coordinator: its keys, its authority, its settings and its database."""
    begin(json)
    from ..coordinator import folder
    from ..coordinator.settings import checked_settings

    names = host or ["127.0.0.1"]
    settings = checked_settings(
        {
            "listen": listen,
            "listen_enrolment": enrolment,
            "listen_http": http,
            "address": _address(names[0], "--listen", listen),
            "address_enrolment": _address(names[0], "--enrolment", enrolment),
            "database": database,
            "blobs": blobs,
        },
        "the options",
    )
    with whole_or_nothing(directory):
        folder.init(directory, settings, list(dict.fromkeys([*names, "localhost", "127.0.0.1"])))
    fingerprint = folder.fingerprint(directory)
    if json:
        print_json({"folder": str(directory), "fingerprint": fingerprint, **settings.model_dump(mode="json")})
        return
    say(f"made a coordinator in {directory}")
    say(f"fingerprint of its authority: {fingerprint}")
    say(f"sites and users reach it at {settings.address}, to join at {settings.address_enrolment}")
    say("next:")
    say(f"  back up {directory}/master.key, authority/ and server/: nothing replaces them")
    say(f"  commonweight coordinator serve {directory}")
    say(f"  commonweight coordinator enroll NAME -d {directory}     a one-time token for a site, or --role lead")


def _address(host: str, option: str, listen: str) -> str:
    """Where others reach what listens on that port."""
    from ..coordinator.settings import port_of

    try:
        port = port_of(listen, option)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve(
    directory: Annotated[
        Path, typer.Argument(help="The coordinator's folder.", metavar="DIR", envvar=ENV, show_default="here")
    ] = Path(),
    ready_file: Annotated[
        Path | None,
        typer.Option(
            "--ready-file",
            help="Write the ports here, as JSON, once all are open; removed at the end.",
            metavar="PATH",
        ),
    ] = None,
) -> None:
    """Serve a coordinator until SIGTERM or Ctrl-C.

    Logs are JSON lines on standard error.
    """
    import json
    import os

    from ..coordinator import server
    from ..federation.folder import storage_errors, write_json

    def ready(settings: CoordinatorSettings, ports: dict[str, int]) -> None:
        if ready_file is not None:
            write_json(ready_file, {"pid": os.getpid(), **ports})
        say(
            f"{settings.name} is ready: services on port {ports['services']}, enrolment on "
            f"{ports['enrolment']}, http on {ports['http']}"
        )

    server.log_to_stderr()
    if ready_file is not None:
        with storage_errors(ready_file):
            ready_file.unlink(missing_ok=True)  # of a process that was killed: whoever waits must not read it
    try:
        server.serve(directory, ready=ready)
    finally:
        if ready_file is not None and _is_ours(ready_file, json.loads, os.getpid()):
            ready_file.unlink(missing_ok=True)


def _is_ours(path: Path, loads: Any, pid: int) -> bool:
    try:
        return bool(loads(path.read_text(encoding="utf-8"))["pid"] == pid)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def enroll(
    name: Annotated[str, typer.Argument(help="The name that the site or user will have.", metavar="NAME")],
    role: Annotated[
        str, typer.Option("--role", help="What it may do: site, relay, lead, admin or auditor.", metavar="ROLE")
    ] = "site",
    directory: FolderOption = Path(),
    replace: Annotated[
        bool,
        typer.Option("--replace", help="The token may take over a name that is enrolled or revoked: for lost keys."),
    ] = False,
    hours: Annotated[
        float | None,
        typer.Option("--hours", help="The token's life.", metavar="H", show_default="token_hours of coordinator.yaml"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Make a one-time token that lets a site or a user join.

    The token alone goes to standard output.
    """
    begin(json)
    from ..coordinator.folder import enroll as enroll_in
    from ..identity.roles import COORDINATOR, ROLES

    roles = [r for r in ROLES if r != COORDINATOR]
    if role not in roles:
        raise RecipeError(f"--role {role} is no role that can join", hint=f"the roles are: {', '.join(roles)}")
    with _store(directory) as (store, _):
        known = store.principal(name)
    token = enroll_in(directory, name, role, replace=replace, hours=hours, by=who())
    if known is not None and not replace:
        note(f"{name} has joined before, as {known.role}: this token works with the same keys and role only, for an")
        note("expired certificate; if the keys are lost, or were revoked, make one by --replace")
    if json:
        facts = {"name": name, "role": role, "expires_at": token.expires_at, "address": token.address}
        print_json({"token": token.to_text(), **facts})
        return
    print(token.to_text(), flush=True)
    command = f"commonweight {JOINING.get(role, 'join TOKEN')}"
    note(f"one-time token for {role} {name}, good until {moment(token.expires_at)}; whoever has it can join as {name}")
    note(f"hand it over by a way that you both trust; it is used by: {command}")


def revoke(
    name: Annotated[str, typer.Argument(help="Who is to be shut out.", metavar="NAME")],
    reason: Annotated[str, typer.Option("--reason", help="Why, for the audit log.", metavar="TEXT")],
    directory: FolderOption = Path(),
    json: JsonOption = False,
) -> None:
    """Shut a site or a user out: their certificates no longer count.

    Connections that are open end too.
    """
    begin(json)
    with _store(directory) as (store, settings):
        known = store.principal(name)
        if known is None:
            names = ", ".join(principal.name for principal in store.principals()) or "nobody"
            raise StateError(f"nobody called {name!r} has joined", hint=f"those who have: {names}")
        store.set_state(name, "revoked", reason, who())
    if json:
        print_json({"name": name, "role": known.role, "state": "revoked", "reason": reason})
        return
    say(f"revoked {known.role} {name}; every replica acts on it within {5 + settings.heartbeat_s:.0f} s")


def principals(directory: FolderOption = Path(), json: JsonOption = False) -> None:
    """List the sites and users that have joined."""
    begin(json)
    with _store(directory) as (store, _):
        found = store.principals()
    if json:
        print_json({"principals": [{**vars(p), "signing_key": p.signing_key.hex()} for p in found]})
        return
    if not found:
        say("nobody has joined yet; `commonweight coordinator enroll NAME` makes a token")
        return
    rows = [(p.name, p.role, p.state, moment(p.enrolled_at), p.signing_key.hex(), p.reason) for p in found]
    table(("name", "role", "state", "joined", "signing key", "reason"), rows)


def audit(
    directory: FolderOption = Path(),
    verify: Annotated[bool, typer.Option("--verify", help="Check that no entry was changed or taken out.")] = False,
    head: Annotated[
        str | None,
        typer.Option("--head", help="Also check it against a head that a site kept.", metavar="SEQUENCE:HASH"),
    ] = None,
    last: Annotated[
        int, typer.Option("--last", help="Show so many of the latest entries; 0: all.", min=0, metavar="N")
    ] = 50,
    json: JsonOption = False,
) -> None:
    """Show the audit log: who did what, in entries chained by their hashes."""
    begin(json)
    kept = head_of(head) if head is not None else None
    with _store(directory) as (store, _):
        entries = list(_entries(store))
    show_audit([entry.to_json() for entry in entries], verified(entries, kept) if verify or kept else None, last, json)


def show_audit(entries: list[dict[str, Any]], checked: tuple[int, str] | None, last: int, json: bool) -> None:
    """Print an audit log's latest entries, and what checking it came to."""
    shown = entries[-last:] if last else entries
    if json:
        found = None if checked is None else f"{checked[0]}:{checked[1]}"
        print_json({"entries": shown, "verified": found})
        return
    table(("entry", "time", "who", "what", "whom", "details"), [audit_line(entry) for entry in shown], right=(0,))
    if len(shown) < len(entries):
        say(f"\nthe last {len(shown)} of {len(entries)} entries; --last 0 shows all")
    if checked is not None:
        say(f"\nwhole and unchanged: {checked[0]} entries, head {checked[0]}:{checked[1]}")


def _entries(store: Store) -> Iterator[Any]:
    after = 0
    while found := store.audit_entries(after):
        yield from found
        after = found[-1].sequence


@contextmanager
def _store(directory: Path) -> Iterator[tuple[Store, CoordinatorSettings]]:
    """The coordinator's database, whether it serves or not."""
    from ..coordinator.settings import load_settings
    from ..coordinator.store import Store

    settings = load_settings(directory)
    with Store(settings.database_url(directory)) as store:
        yield store, settings


#: in the order of the help
COMMANDS = (init, serve, enroll, revoke, principals, audit)
