"""The commands of a networked federation where no network is needed: folders, tokens, policies, logs, and mistakes."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from commonweight.cli.main import app
from commonweight.cli.network import since_when, span
from commonweight.coordinator.settings import load_settings
from commonweight.errors import RecipeError
from commonweight.identity.tokens import Token
from commonweight.site.audit import SiteAudit
from commonweight.site.policy import policy_text
from commonweight.site.records import SiteRecords
from commonweight.site.settings import write_starter
from tests.unit.command_line import Answer, call
from tests.unit.site_policies import PLAIN, make_policy

RUN, OTHER = "ab" * 16, "cd" * 16
HEAD = (7, b"\x07" * 32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator `fed`; a site `north` that was asked for two runs, approved one and sent something; its tokens."""
    folder = tmp_path_factory.mktemp("made")
    answer = call("coordinator", "init", folder / "fed", "--host", "fed.example.org", "--host", "10.0.0.7")
    assert answer.code == 0, answer.err
    for name, role in (("north", "site"), ("lena", "lead")):
        token = call("coordinator", "enroll", name, "--role", role, "-d", folder / "fed")
        (folder / f"{name}.token").write_text(token.out)
    site = folder / "north"
    write_starter(site, "north", "fed.example.org:8443", site / "rows.jsonl")
    records = SiteRecords(site / "state.sqlite")
    audit = SiteAudit(site / "audit.jsonl", records)
    for run, name in ((RUN, "triage"), (OTHER, "letters")):
        records.add_job("d" * 64, replace(PLAIN, run=run, name=name))
        records.ask(run, f"run {run} ({name})")
    records.set_job(RUN, "joined")
    for kind, num_bytes in (("facts", 100), ("update", 1000), ("scores", 50)):
        records.spend(make_policy(), run=RUN, round=1, what=kind, num_bytes=num_bytes)
        audit.append(kind, run=RUN, round=1, num_bytes=num_bytes, chunks=1, digest="e" * 64, to="fed.example.org:8443")
    audit.append("refused", run=OTHER, reason="signers: none are allowed")
    records.keep_head(*HEAD, b"signature")
    records.close()
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which commands run."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COMMONWEIGHT_IDENTITY", str(tmp_path / "nobody"))
    monkeypatch.delenv("COMMONWEIGHT_COORDINATOR", raising=False)
    return tmp_path / "here"


# --- coordinator


def test_init_makes_a_coordinator(here: Path) -> None:
    settings = load_settings(here / "fed")
    assert (settings.address, settings.address_enrolment) == ("fed.example.org:8443", "fed.example.org:8444")
    assert (here / "fed" / "master.key").stat().st_mode & 0o077 == 0
    assert (here / "fed").stat().st_mode & 0o077 == 0
    hosts = (here / "fed" / "server" / "hosts").read_text().split()
    assert hosts == ["fed.example.org", "10.0.0.7", "localhost", "127.0.0.1"]
    answer = call("coordinator", "init", "second", "--listen", "[::]:0", "--json")
    assert re.fullmatch("[0-9a-f]{64}", answer.json["fingerprint"])
    assert answer.json["listen"] == "[::]:0"
    assert call("coordinator", "enroll", "north", "-d", "second").code == 2, "port 0 cannot be written into a token"


def test_a_token_stands_alone_on_standard_output(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = Token.from_text((here / "lena.token").read_text())
    assert (token.name, token.role, token.address) == ("lena", "lead", "fed.example.org:8443")
    monkeypatch.setenv("COMMONWEIGHT_COORDINATOR", "fed")
    answer = call("coordinator", "enroll", "west", "--hours", 2)
    assert answer.out.count("\n") == 1
    assert "commonweight site join TOKEN DIR" in answer.err
    assert 0 < Token.from_text(answer.out).expires_at - time.time() <= 7200
    found = call("coordinator", "enroll", "otto", "--role", "auditor", "--json").json
    assert Token.from_text(found["token"]).role == found["role"] == "auditor"


def test_principals_and_the_audit_log(here: Path) -> None:
    assert call("coordinator", "principals", "-d", "fed").out.startswith("nobody has joined yet")
    assert call("coordinator", "principals", "-d", "fed", "--json").json == {"principals": []}
    shown = call("coordinator", "audit", "-d", "fed", "--verify", "--last", 1)
    assert shown.code == 0, shown.err
    assert "token made" in shown.out
    assert "the last 1 of 2 entries" in shown.out
    found = call("coordinator", "audit", "-d", "fed", "--verify", "--json").json
    assert [entry["subject"] for entry in found["entries"]] == ["north", "lena"]
    assert call("coordinator", "audit", "-d", "fed", "--head", found["verified"]).code == 0
    changed = call("coordinator", "audit", "-d", "fed", "--head", "2:" + "0" * 64)
    assert (changed.code, "the log was rewritten" in changed.err) == (6, True)


# --- site


def test_status(here: Path) -> None:
    (here / "north" / "identity").mkdir()
    answer = call("site", "status", "north")
    assert answer.code == 8, "it has not joined"
    # what does not need an identity
    assert "denies every job: models is empty" in call("site", "policy", "north").out


def test_policy(here: Path) -> None:
    starter = call("site", "policy", "north")
    assert starter.code == 0
    assert starter.out.endswith(
        "As it stands it denies every job: models is empty; signers is empty; purposes is empty.\n"
    )
    shown = {
        "models": "nothing",
        "max_rounds": "50",
        "max_bytes_per_round": "67,108,864 bytes (64 MiB)",
        "privacy.max_epsilon": "no bound",
        "remote_code": "no",
    }
    for field, value in shown.items():
        assert re.search(rf"^{re.escape(field)} +{re.escape(value)} ", starter.out, re.M), field
    (here / "north" / "policy.yaml").write_text(policy_text(make_policy(approval="every-run")))
    assert "In force, digest " in call("site", "policy", "north").out
    found = call("site", "policy", "north", "--json").json
    assert (found["closed"], found["policy"]["signers"]) == ([], ["lena"])
    of_run = call("site", "policy", "north", "--run", "triage")
    assert f"the policy allows it once a person approves: commonweight site approve north {RUN[:8]}" in of_run.out
    (here / "north" / "policy.yaml").write_text(policy_text(make_policy(signers=["max"])))
    found = call("site", "policy", "north", "--run", RUN[:6], "--json").json
    assert not found["allowed"]
    assert "signers: max" in found["reasons"][0]


def test_approving_and_denying(here: Path) -> None:
    shown = call("site", "pending", "north")
    assert f"run {RUN} (triage)" in shown.out
    assert f"commonweight site deny north {OTHER[:8]}" in shown.out
    assert call("site", "approve", "north", "triage").out == f"approved run {RUN[:8]} (triage)\n"
    assert call("site", "deny", "north", OTHER[:5], "--json").json["state"] == "denied"
    assert call("site", "pending", "north").out == "nothing waits for approval\n"
    assert call("site", "deny", "north", RUN).code == 0, "a decision can be taken back"
    records = SiteRecords(here / "north" / "state.sqlite")
    assert {q.run: q.state for q in records.questions()} == {RUN: "denied", OTHER: "denied"}
    records.close()
    rows = call("site", "audit", "north", "--all", "--json").json["rows"]
    assert [(row["what"], row["run"]) for row in rows[-3:]] == [("approved", RUN), ("denied", OTHER), ("denied", RUN)]
    assert rows[-1]["by"]


def test_what_a_site_has_spent(here: Path) -> None:
    shown = call("site", "ledger", "north")
    assert shown.code == 0, shown.err
    assert re.search(r"^triage \(24ffa222\) +none +none +1 +– +– +∞$".replace("24ffa222", RUN[:8]), shown.out, re.M)
    policy = make_policy(privacy__budget={"unit": "site", "epsilon": 8.0, "delta": 1e-6})
    (here / "north" / "policy.yaml").write_text(policy_text(policy))
    found = call("site", "ledger", "north", "--json").json
    assert found["budget"] == {"unit": "site", "epsilon": 8.0, "delta": 1e-6}
    assert found["sites"] == [{"site": "north", "unit": "site", "epsilon": None, "left": 0.0}]
    denied = call("site", "policy", "north", "--run", OTHER)
    assert "denied: privacy.budget: in all the job's rounds: the budget is ε = 8 at δ = 1e-06" in denied.out


def test_audit(here: Path) -> None:
    shown = call("site", "audit", "north", "--verify")
    assert shown.code == 0, shown.err
    for kind, num_bytes in (("facts", "100"), ("update", "1,000"), ("scores", "50")):
        assert re.search(rf" {RUN[:8]} +1 +{kind} +{num_bytes} +1 +{'e' * 64}  fed.example.org:8443$", shown.out, re.M)
    assert f"run {RUN[:8]} (triage): facts 100 bytes, update 1,000 bytes, scores 50 bytes\n" in shown.out
    assert "in all 1,150 bytes (1.12 KiB)\nwhole and unchanged: 4 lines, head 4:" in shown.out
    assert "refused" not in shown.out
    found = call("site", "audit", "north", "--json").json
    assert (found["totals"], found["counted"]) == ({RUN: {"facts": 100, "update": 1000, "scores": 50}}, 1150)
    assert "signers: none are allowed" in call("site", "audit", "north", "--all").out
    assert call("site", "audit", "north", "--run", "letters").out == "nothing has left\n"
    assert len(call("site", "audit", "north", "--since", "1h", "--json").json["rows"]) == 3
    assert call("site", "audit", "north", "--since", "2999-01-01", "--json").json["rows"] == []
    log = here / "north" / "audit.jsonl"
    log.write_text(log.read_text().replace('"bytes": 1000', '"bytes": 10'))
    changed = call("site", "audit", "north", "--verify")
    assert (changed.code, "line 2 of" in changed.err) == (6, True)


def test_going_on_after_an_alarm(here: Path) -> None:
    head = f"{HEAD[0]}:{HEAD[1].hex()}"
    assert call("site", "accept-log", "north", "--reason", "restored", "--json").json["head"] == head
    records = SiteRecords(here / "north" / "state.sqlite")
    records.keep_head(1, b"\x01" * 32, b"signature")  # the log begins anew
    records.close()
    last = call("site", "audit", "north", "--all", "--verify", "--json").json["rows"][-1]
    assert (last["what"], last["head"], last["reason"]) == ("log accepted", head, "restored")


# --- times


def test_moments() -> None:
    assert since_when("2026-03-01") == since_when("2026-03-01T00:00+00:00") == 1772323200.0
    assert since_when("2026-03-01T12:30") - since_when("2026-03-01") == 45000.0
    assert [since_when(text, now=lambda: 1e6) for text in ("30m", "2h", "1d")] == [1e6 - 1800, 1e6 - 7200, 1e6 - 86400]
    for text in ("", "yesterday", "1", "h", "-2h", "2026-13-01"):
        with pytest.raises(RecipeError, match="is no time"):
            since_when(text)
    assert [span(s) for s in (-3, 45, 200, 9000, 200000)] == ["0 s", "45 s", "3.33 min", "2.5 h", "2.31 days"]


# --- mistakes


@dataclass(frozen=True)
class Case:
    """A command, what must come of it, and what its message must say.

    Args:
        command: arguments, separated by blanks.
        prepare: makes the mistake, in the folder where the command runs.
    """

    command: str
    code: int
    words: tuple[str, ...]
    stdin: str = ""
    prepare: Callable[[Path], object] | None = None

    def __str__(self) -> str:
        return self.command


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


BAD = [
    # coordinator
    Case("coordinator init fed", 6, ("fed is a coordinator's already",)),
    Case("coordinator init north", 6, ("north is not empty",)),
    Case("coordinator init new --listen 8443", 2, ("--listen '8443' is not host:port",)),
    Case("coordinator init new --http 0.0.0.0:99999", 2, ("listen_http", "'0.0.0.0:99999' is not host:port")),
    Case("coordinator init new --enrolment ::1:8444", 2, ("'::1:8444' is not host:port",)),
    Case("coordinator init new --host bad/name", 8, ("bad/name",)),
    Case("coordinator init new --database mysql://x/y", 2, ("mysql",)),
    Case("coordinator serve nowhere", 6, ("nowhere holds no coordinator", "commonweight coordinator init nowhere")),
    Case(
        "coordinator serve fed",
        2,
        ("fed/coordinator.yaml", "lisen"),
        prepare=write("fed/coordinator.yaml", "lisen: x\n"),
    ),
    Case("coordinator serve fed", 2, ("is no YAML",), prepare=write("fed/coordinator.yaml", "a: [\n")),
    Case("coordinator serve fed --ready-file nowhere/at/all", 7, ("nowhere",), prepare=write("nowhere", "")),
    Case("coordinator enroll north -d nowhere", 6, ("nowhere holds no coordinator",)),
    Case("coordinator enroll", 2, ("missing argument", "NAME")),
    Case("coordinator enroll North -d fed", 8, ("'North' cannot be a name",)),
    Case(
        "coordinator enroll north --role boss -d fed",
        2,
        ("--role boss is no role", "site, relay, lead, admin, auditor"),
    ),
    Case("coordinator enroll north --role coordinator -d fed", 2, ("--role coordinator is no role",)),
    Case("coordinator enroll north --hours 0 -d fed", 8, ("0 hours",)),
    Case("coordinator enroll north --hours soon -d fed", 2, ("--hours",)),
    Case("coordinator revoke max --reason x -d fed", 6, ("nobody called 'max' has joined", "those who have: nobody")),
    Case("coordinator revoke north -d fed", 2, ("missing option", "--reason")),
    Case("coordinator audit -d fed --head 12", 2, ("--head 12 is no head", "commonweight site status DIR")),
    Case("coordinator audit -d fed --head -1:00", 2, ("--head -1:00 is no head",)),
    Case("coordinator audit -d fed --head 99:" + "0" * 64, 6, ("ends at entry 2, but entry 99 was seen",)),
    Case("coordinator audit -d fed --last -1", 2, ("--last",)),
    Case("coordinator principals", 6, (". holds no coordinator",)),
    Case("coordinator explode", 2, ("no such command", "explode")),
    # tokens
    Case("join nonsense", 8, ("this is no token of commonweight",)),
    Case("join -", 2, ("there is no token: standard input is empty",)),
    Case("join @nothing", 7, ("the token's file nothing cannot be read",)),
    Case("join @empty", 2, ("there is no token: @empty is empty",), prepare=write("empty", " \n")),
    Case("join @north.token", 8, ("this token lets north in as site", "commonweight site join TOKEN DIR")),
    Case("site join @lena.token new", 8, ("this token lets lena in as lead", "commonweight join TOKEN")),
    Case("site join cw1.abc new", 8, ("the token is cut",)),
    Case("site join - new", 8, ("cw1",), stdin="hello"),
    Case("site join @north.token north --data x", 6, ("north/site.yaml is there already",)),
    Case("site join @west.token north", 8, ("north is the folder of site north, and the token is for west",)),
    # a site's folder
    Case("site run nowhere", 2, ("there is no nowhere/site.yaml", "commonweight site join")),
    Case("site run north", 8, ("north/identity holds no identity",)),
    Case(
        "site run north", 2, ("unknown key `thread` at site.yaml:1",), prepare=write("north/site.yaml", "thread: 1\n")
    ),
    Case("site status nowhere", 2, ("there is no nowhere/site.yaml",)),
    Case("site export north none out", 6, ("no run is called, or begins, 'none'", "abababab (triage)")),
    Case("site export north abababab out", 6, ("there is no model of this site's own", "keep.runs")),
    Case("site policy nowhere", 10, ("this site has no policy", "denies everything")),
    Case("site policy north", 10, ("denies everything", "modles"), prepare=write("north/policy.yaml", "modles: []\n")),
    Case("site policy north", 10, ("denies everything",), prepare=remove("north/policy.yaml")),
    Case("site policy north --run none", 6, ("no run is called, or begins, 'none'", "abababab (triage)")),
    Case("site ledger nowhere", 2, ("there is no nowhere/site.yaml",)),
    Case("site ledger north --delta 2", 2, ("--delta 2", "δ is between 0 and 1")),
    Case("site pending nowhere", 6, ("nowhere is no site's folder",)),
    Case("site approve north zzzz", 6, ("no run is called, or begins, 'zzzz'",)),
    Case("site deny north ab", 6, ("no run is called, or begins, 'ab'",)),
    Case("site audit nowhere", 6, ("nowhere is no site's folder",)),
    Case("site audit north --since yesterday", 2, ("--since yesterday is no time", "36h")),
    Case("site audit north --run nope", 6, ("no run is called, or begins, 'nope'",)),
    Case("site pending north", 6, ("damaged",), prepare=write("north/state.sqlite", "x" * 5000)),
    Case("site peers nowhere", 6, ("nowhere is no site's folder",)),
    Case("site peers north --forget south", 2, ("--forget needs --reason",)),
    Case("site peers north --forget south --reason x", 6, ("no key of a site south is known here",)),
    Case("site accept-log nowhere --reason x", 6, ("nowhere is no site's folder",)),
    Case("site accept-log north", 2, ("missing option", "--reason")),
    # users without an identity
    *(
        Case(command, 8, ("you have no identity in", "commonweight join TOKEN"))
        for command in (
            *("submit demo", "status", "status x", "watch x", "logs x", "cancel x", "fetch x", "sites", "audit-log"),
            "sites --identity elsewhere",
        )
    ),
    Case("sites --identity north", 8, ("north holds no identity",)),
    Case("submit nothing.yaml", 2, ("nothing.yaml",)),
    Case("submit demo --set federation.rounds=0", 2, ("federation.rounds",)),
    Case("fetch x --head 1", 2, ("no such option",)),
    Case("audit-log --head x", 2, ("--head x is no head",)),
    # sandbox
    Case("sandbox demo --sites 0", 2, ("--sites",)),
    Case("sandbox demo --sites 9", 2, ("--sites 9, but the recipe's data fall to 6 sites", "data.sites.largest=N")),
    Case("sandbox demo -o north", 6, ("north is not empty",)),
    Case("sandbox nothing.yaml", 2, ("nothing.yaml",)),
]


@pytest.mark.parametrize("case", BAD, ids=str)
def test_a_mistake_is_explained(case: Case, here: Path) -> None:
    token = call("coordinator", "enroll", "west", "-d", "fed") if "west" in case.command else None
    if token is not None:
        (here / "west.token").write_text(token.out)
    if case.prepare is not None:
        case.prepare(here)
    answer = call(*case.command.split(), stdin=case.stdin)
    assert answer.code == case.code, answer.err
    assert answer.err.startswith("error: ")
    assert "Traceback" not in answer.err
    assert "should not" not in answer.err
    for word in case.words:
        assert word in answer.err
    assert not (here / "new").exists(), "nothing is left behind"


def test_a_mistake_is_told_to_programs_too(here: Path) -> None:
    answer: Answer = call("site", "policy", "nowhere", "--json")
    assert answer.json["error"]["kind"] == "PolicyError"
    assert json.loads(answer.out) == answer.json


def test_every_command_is_met_here_or_over_the_wire() -> None:
    """So that a new one is not forgotten: each is a word of a case above."""
    import typer

    top = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    groups = [f"{group} {one}" for group in ("coordinator", "site") for one in top[group].commands]
    users = ["join", "submit", "status", "watch", "logs", "cancel", "fetch", "sites", "audit-log", "sandbox"]
    for command in (*groups, *users):
        assert any(case.command.startswith(command) for case in BAD), command
