"""Commands for users of a federation: join, submit, status, watch, logs, cancel, fetch, sites, audit-log."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import StateError
from .folders import choose_output, whole_or_nothing
from .network import (
    DEFAULT_IDENTITY,
    IdentityOption,
    TokenArgument,
    WhichArgument,
    check_joiner,
    connected,
    enrol_into,
    head_of,
    moment,
    read_token,
    short,
    verified,
)
from .start import QuietOption, RecipeArgument
from .terminal import Interrupted, JsonOption, SetOption, begin, note, number, print_json, say, table

if TYPE_CHECKING:
    from ..lead.client import Client


_ENDED = ("finished", "failed", "cancelled")
_ROUNDS_SHOWN = 10


def join(token: TokenArgument, identity: IdentityOption = DEFAULT_IDENTITY, json: JsonOption = False) -> None:
    """Join a federation as a user (lead, admin, auditor) by a one-time token."""
    begin(json)
    from ..identity.tokens import Token

    text = read_token(token)
    meant = Token.from_text(text)
    check_joiner(meant)
    found = enrol_into(text, meant.name, identity.expanduser())
    holder = found.holder
    if json:
        print_json({"name": holder.name, "role": holder.role, "coordinator": found.address, "folder": str(found.path)})
        return
    say(f"joined {found.address} as {holder.role} {holder.name}; your keys are in {found.path}")
    say(f"your signing key, for sites' policies: {holder.signing_key.hex()}")


def submit(
    recipe: RecipeArgument,
    set_: SetOption = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            "--site", help="Ask this site, in this order. Repeatable.", metavar="NAME", show_default="every site"
        ),
    ] = None,
    purpose: Annotated[
        str, typer.Option("--purpose", help="What the data are used for, as sites' policies name it.", metavar="TEXT")
    ] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Then follow the run to its end.")] = False,
    identity: IdentityOption = DEFAULT_IDENTITY,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Submit a recipe to the federation's sites.

    Each site's own policy decides whether it takes part.
    """
    begin(json)
    from ..recipe.load import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    with connected(identity) as client:  # before the model is opened: it is said at once if nobody is there
        from ..lead.submit import networked, prepare

        loaded, left_out = networked(loaded)
        for what in left_out:
            note(what)
        enrolled = sum(one["state"] == "active" for one in client.sites())
        prepared = prepare(loaded, client.identity, sites=site or (), purpose=purpose, enrolled=enrolled)
        run = client.submit(prepared.signed, prepared.tensors, prepared.frame)
        if not watch:
            _say_submitted(client, run, prepared.model, loaded.name, json)
            return
        if not json:
            say(f"submitted {loaded.name} as run {short(run)}")
        _follow(client, run, quiet=quiet or json)
        _tell_end(client.run(run), json)


def _say_submitted(client: Client, run: str, model: str, name: str, json: bool) -> None:
    if json:
        print_json({"run": run, "name": name, "state": client.run(run)["state"], "model": model})
        return
    say(f"submitted {name} as run {short(run)}")
    say(f"base model, for sites' policies: {model}")
    say(f"follow it by: commonweight watch {short(run)}")


def status(
    run: Annotated[
        str | None,
        typer.Argument(help="A run's id, the beginning of it, or its name.", metavar="RUN", show_default="all runs"),
    ] = None,
    identity: IdentityOption = DEFAULT_IDENTITY,
    json: JsonOption = False,
) -> None:
    """List the federation's runs, or show one: its rounds, its sites, who attends."""
    begin(json)
    with connected(identity) as client:
        if run is not None:
            found = client.run(run)
            print_json(found) if json else _show_run(found)
            return
        runs = client.runs()
    if json:
        print_json({"runs": runs})
        return
    if not runs:
        say("no runs yet; `commonweight submit RECIPE` begins one")
        return
    rows = [
        (
            short(r["id"]),
            r["name"],
            r["state"],
            r["lead"],
            moment(r["submitted_at"]),
            moment(r["ended_at"]),
            r["error"] or "",
        )
        for r in runs
    ]
    table(("run", "name", "state", "lead", "submitted", "ended", "error"), rows)


def _show_run(run: Mapping[str, Any]) -> None:
    say(f"run {run['id']} ({run['name']}), lead {run['lead']}: {run['state']}, round {run['round']} of {run['rounds']}")
    sums = "on" if run["secure_sums"] else "off: the coordinator sees each update"
    noise = "off (ε = ∞)" if run["protects"] == "none" else f"of each {run['protects'].removeprefix('group by ')}"
    say(f"secure sums {sums}; differential privacy {noise}")
    if run["error"]:
        say(f"error: {run['error']}")
    if run["hint"]:
        say(f"  {run['hint']}")
    if run["sites"]:
        print()
        table(("site", "state", "attends"), [(s["site"], s["state"], _yes(s["attending"])) for s in run["sites"]])
        for site in run["sites"]:
            if site["reason"]:
                say(f"{site['site']}: {site['reason']}")
    if run["history"]:
        print()
        if len(run["history"]) > _ROUNDS_SHOWN:
            say(f"the last {_ROUNDS_SHOWN} of {len(run['history'])} rounds")
        rounds = [_round(record) for record in run["history"][-_ROUNDS_SHOWN:]]
        table(("round", "answered", "left out", "late", "training loss"), rounds, right=(0, 4))


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _round(record: Mapping[str, Any]) -> tuple[str, ...]:
    answered = f"{len(record['answered'])} of {len(record['cohort'])}"
    failed, late = ", ".join(record["failed"]), ", ".join(record["late"])
    return str(record["round"]), answered, failed, late, number(record["train_loss"])


def watch(
    run: WhichArgument,
    identity: IdentityOption = DEFAULT_IDENTITY,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Follow a run to its end.

    Ctrl-C stops watching; the run goes on.
    """
    begin(json)
    with connected(identity) as client:
        id = str(client.run(run)["id"])
        _follow(client, id, quiet=quiet or json)
        _tell_end(client.run(id), json)


def _follow(client: Client, run: str, *, quiet: bool) -> None:
    """Show a run's events as they come, until it has ended."""
    from .progress import NetworkProgress

    with _going_on(run), NetworkProgress(quiet=quiet) as progress:
        for event in client.events(run, follow=True):
            fields = {key: value for key, value in event.items() if key not in ("t", "event")}
            progress.listen(event["event"], fields)


@contextmanager
def _going_on(run: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        hint = f"the run goes on; watch it again, or end it:\n    commonweight watch {short(run)}\n"
        raise Interrupted("interrupted", hint=hint + f"    commonweight cancel {short(run)}") from None


def _tell_end(run: Mapping[str, Any], json: bool) -> None:
    """How a run has ended: an error, unless it has finished."""
    from ..lead.fetch import check_end

    check_end(run)
    if json:
        print_json({"run": run["id"], "name": run["name"], "state": run["state"], "round": run["round"]})
    else:
        say(f"run {short(run['id'])} has finished; bring its result here by: commonweight fetch {short(run['id'])}")


def logs(
    run: WhichArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the run has ended.")] = False,
    identity: IdentityOption = DEFAULT_IDENTITY,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line, one for each event.")] = False,
) -> None:
    """Print a run's events: one line each."""
    begin(json)
    with connected(identity) as client:
        id = str(client.run(run)["id"])
        with _going_on(id):
            for event in client.events(id, follow=follow):
                print_json(event) if json else say(_event(event))


def _event(event: Mapping[str, Any]) -> str:
    fields = ", ".join(f"{key} {_plain(value)}" for key, value in event.items() if key not in ("t", "event"))
    return (
        f"{datetime.fromtimestamp(event['t'], UTC):%Y-%m-%d %H:%M:%S} {event['event']}{': ' if fields else ''}{fields}"
    )


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value.replace("\n", " ") if isinstance(value, str) else json_module.dumps(value)


def cancel(run: WhichArgument, identity: IdentityOption = DEFAULT_IDENTITY, json: JsonOption = False) -> None:
    """End a run before its time.

    What was committed stays, and can be fetched.
    """
    begin(json)
    with connected(identity) as client:
        found = client.cancel(run)
    if json:
        print_json({"run": found["id"], "name": found["name"], "state": found["state"]})
    else:
        now = f"has ended already: it is {found['state']}" if found["state"] in _ENDED else "is being cancelled"
        say(f"run {short(found['id'])} ({found['name']}) {now}")


def fetch(
    run: WhichArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder to write: new or empty. Default: runs/NAME, numbered if taken.",
            metavar="DIR",
        ),
    ] = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="The tensors alone (theta.safetensors): the base model is not opened.")
    ] = False,
    identity: IdentityOption = DEFAULT_IDENTITY,
    json: JsonOption = False,
) -> None:
    """Bring a run's result here: adapter, report and figures, as `run` leaves them."""
    begin(json)
    from ..lead.fetch import fetch as fetch_into

    with connected(identity) as client:
        found = client.run(run)
        folder = choose_output(output, found["name"], resume=False)
        require_free(folder)
        with whole_or_nothing(folder):
            found = fetch_into(client, found["id"], folder, adapter=not tensors)
    if json:
        facts = {key: found[key] for key in ("name", "state", "round", "rounds")}
        print_json({"run": found["id"], "folder": str(folder), **facts})
        return
    _show_fetched(found, folder, tensors)


def _show_fetched(run: Mapping[str, Any], folder: Path, tensors: bool) -> None:
    from ..evaluate.report import read_metrics
    from .progress import print_result

    if (folder / "metrics.json").exists() and not tensors:
        print_result(read_metrics(folder), folder)
        return
    what = "theta.safetensors" if tensors else "adapter"
    say(f"wrote {folder / what}: after round {run['round']} of {run['rounds']}; the run is {run['state']}")


def require_free(folder: Path) -> None:
    """Raises StateError: the folder is there and not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StateError(f"{folder} is not empty", hint="choose another folder by -o")


def sites(identity: IdentityOption = DEFAULT_IDENTITY, json: JsonOption = False) -> None:
    """List the federation's sites, and which of them attend."""
    begin(json)
    with connected(identity) as client:
        found = client.sites()
    if json:
        print_json({"sites": found})
        return
    if not found:
        say("no site has joined yet")
        return
    rows = [(s["site"], s["state"], _yes(s["attending"]), moment(s["enrolled_at"]), s["reason"]) for s in found]
    table(("site", "state", "attends", "joined", "reason"), rows)


def audit_log(
    verify: Annotated[bool, typer.Option("--verify", help="Check that no entry was changed or taken out.")] = False,
    head: Annotated[
        str | None,
        typer.Option("--head", help="Also check it against a head that a site kept.", metavar="SEQUENCE:HASH"),
    ] = None,
    last: Annotated[
        int, typer.Option("--last", help="Show so many of the latest entries; 0: all.", min=0, metavar="N")
    ] = 50,
    identity: IdentityOption = DEFAULT_IDENTITY,
    json: JsonOption = False,
) -> None:
    """Show the coordinator's audit log from afar, for admins and auditors."""
    begin(json)
    from .coordinator import show_audit

    kept = head_of(head) if head is not None else None
    with connected(identity) as client:
        entries = list(client.audit())
    checked = None
    if verify or kept is not None:
        from ..coordinator.audit import AuditEntry

        checked = verified([AuditEntry.from_json(entry) for entry in entries], kept)
    show_audit(entries, checked, last, json)


#: name and command, in the order of the help
COMMANDS: dict[str, Callable[..., None]] = {
    "join": join,
    "submit": submit,
    "status": status,
    "watch": watch,
    "logs": logs,
    "cancel": cancel,
    "fetch": fetch,
    "sites": sites,
    "audit-log": audit_log,
}
