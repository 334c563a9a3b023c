"""What users and operators type, against a coordinator that serves. Their mistakes: tests/unit/test_network_cli.py."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from commonweight.identity.folder import IdentityFolder
from tests.unit.command_line import Answer, call

from .federations import Coordinator, Hand


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_(hand: Hand, *arguments: object) -> Answer:
    """A command by somebody's identity."""
    return call(*arguments, "--identity", hand.identity.path)


def token(coordinator: Coordinator, name: str, *options: object) -> str:
    answer = call("coordinator", "enroll", name, "-d", coordinator.home, *options)
    assert answer.code == 0, answer.err
    return answer.out


def test_joining_as_a_user(coordinator: Coordinator, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMONWEIGHT_IDENTITY", str(here / "me"))
    first = token(coordinator, "mia", "--role", "lead")
    joined = call("join", "-", stdin=first)
    assert joined.code == 0, joined.err
    mia = IdentityFolder.open(here / "me")
    assert f"your signing key, for sites' policies: {mia.holder.signing_key.hex()}\n" in joined.out
    assert call("sites", "--json").code == 0

    assert call("join", first).code == 0, "the same keys may ask again, should the answer have been lost"
    monkeypatch.setenv("COMMONWEIGHT_IDENTITY", str(here / "another"))
    used = call("join", first)
    assert (used.code, "was used already" in used.err) == (8, True)
    monkeypatch.setenv("COMMONWEIGHT_IDENTITY", str(here / "me"))
    assert call("sites", "--json").code == 0, "what was there stays"

    again = call("join", token(coordinator, "mia", "--role", "lead"), "--json")
    assert again.code == 0, again.err
    renewed = IdentityFolder.open(here / "me")
    assert renewed.holder.signing_key == mia.holder.signing_key
    assert renewed.holder.serial != mia.holder.serial
    assert not (here / "me" / "tls.pem.before").exists()

    other = call("join", token(coordinator, "kim", "--role", "lead"))
    assert (other.code, "is the identity of mia" in other.err) == (8, True)


def test_joining_as_a_site(coordinator: Coordinator, here: Path) -> None:
    (here / "token").write_text(token(coordinator, "clinic"))
    joined = call("site", "join", "@token", "clinic", "--data", "rows.jsonl")
    assert joined.code == 0, joined.err
    assert "Until then it denies everything" in joined.out
    assert str(here / "rows.jsonl") in (here / "clinic" / "site.yaml").read_text()
    found = call("site", "status", "clinic", "--json").json
    assert (found["site"], found["coordinator"], found["running"]) == ("clinic", coordinator.settings.address, False)
    assert "policy       denies every job: models is empty" in call("site", "status", "clinic").out
    (here / "clinic" / "policy.yaml").write_text("mine")
    (here / "token").write_text(token(coordinator, "clinic"))
    again = call("site", "join", "@token", "clinic")
    assert again.code == 0, again.err
    assert "its settings in clinic stay as they are" in again.out
    assert (here / "clinic" / "policy.yaml").read_text() == "mine"

    shutil.rmtree(here / "clinic")
    (here / "token").write_text(token(coordinator, "clinic"))
    lost = call("site", "join", "@token", "clinic")
    assert lost.code == 8, "other keys"
    assert not (here / "clinic" / "site.yaml").exists()
    (here / "token").write_text(token(coordinator, "clinic", "--replace"))
    assert call("site", "join", "@token", "clinic").code == 0


def test_following_a_run(coordinator: Coordinator, lead: Hand, here: Path) -> None:
    coordinator.site("north")
    coordinator.site("south", join=lambda site, task: site.reply(task, 3, reason="no, says the policy"))
    run = lead.submit(lead.job(name="followed", sites=["north", "south"], rounds=2, quorum=0.5))
    watched = as_(lead, "watch", run[:10])
    assert watched.code == 0, watched.err
    for line in (
        "site south does not take part: no, says the policy",
        "sites taking part: 1; 1,088 trainable parameters",
        f"run {run[:8]} has finished; bring its result here by: commonweight fetch {run[:8]}",
    ):
        assert f"{line}\n" in watched.out
    assert as_(lead, "watch", run, "--json").json == {"run": run, "name": "followed", "state": "finished", "round": 2}
    assert as_(lead, "watch", "followed", "-q").out.count("\n") == 1

    listed = as_(lead, "status")
    assert re.search(rf"^{run[:8]} +followed +finished +lena +\d{{4}}-", listed.out, re.M)
    assert run in [found["id"] for found in as_(lead, "status", "--json").json["runs"]]
    one = as_(lead, "status", "followed").out
    assert f"run {run} (followed), lead lena: finished, round 2 of 2\n" in one
    assert "\nsecure sums off: the coordinator sees each update; differential privacy off (ε = ∞)\n" in one
    assert re.search(r"^north +joined +yes$", one, re.M)
    assert "\nsouth: no, says the policy\n" in one
    assert re.search(r"^ +2 +1 of 1 +1\.000$", one, re.M)
    shown = as_(lead, "status", run, "--json").json
    assert (shown["round"], shown["secure_sums"], shown["protects"]) == (2, False, "none")

    logged = as_(lead, "logs", run).out.splitlines()
    assert re.search(r"run_started: name \"?followed", logged[0])
    lines = [json.loads(line) for line in as_(lead, "logs", run, "--json", "--follow").out.splitlines()]
    assert len(lines) == len(logged)
    assert lines[-1]["event"] == "run_finished"

    fetched = as_(lead, "fetch", run, "--tensors", "-o", "got")
    assert fetched.out == "wrote got/theta.safetensors: after round 2 of 2; the run is finished\n", fetched.err
    assert {path.name for path in (here / "got").iterdir()} >= {"theta.safetensors", "recipe.yaml", "metrics.json"}
    taken = as_(lead, "fetch", run, "--tensors", "-o", "got")
    assert (taken.code, "got is not empty" in taken.err) == (6, True)
    found = as_(lead, "fetch", "followed", "--tensors", "--json").json
    assert (found["folder"], found["state"]) == ("runs/followed", "finished")


def test_a_run_that_does_not_finish(coordinator: Coordinator, lead: Hand, admin: Hand) -> None:
    coordinator.site("east", join=lambda site, task: site.reply(task, 3, reason="never"))
    failed = lead.submit(lead.job(name="failing", sites=["east"]))
    watched = as_(lead, "watch", failed)
    assert watched.code == 5
    assert f"run {failed[:8]} (failing) failed: 0 of 1 sites joined" in watched.err
    early = as_(lead, "fetch", failed, "--tensors")
    assert (early.code, "has no committed round yet" in early.err) == (6, True)
    assert not Path("runs").exists()

    coordinator.site("idle", train=lambda site, task: None)
    run = lead.submit(lead.job(name="idling", sites=["idle"]))
    said = as_(admin, "cancel", "idling")
    assert said.out == f"run {run[:8]} (idling) is being cancelled\n", said.err
    watched = as_(lead, "watch", run)
    assert (watched.code, "was cancelled by ada" in watched.err) == (5, True)
    assert as_(lead, "cancel", run).out == f"run {run[:8]} (idling) has ended already: it is cancelled\n"
    unknown = as_(lead, "watch", "nothing")
    assert (unknown.code, "commonweight status" in unknown.err) == (6, True)


def test_sites_and_who_may_do_what(coordinator: Coordinator, lead: Hand, auditor: Hand) -> None:
    coordinator.site("seen")
    coordinator.guest("shut-out")
    revoked = call("coordinator", "revoke", "shut-out", "--reason", "its machine was stolen", "-d", coordinator.home)
    assert revoked.out.startswith("revoked site shut-out; every replica acts on it within "), revoked.err
    listed = as_(auditor, "sites").out
    assert re.search(r"^seen +active +yes +\d{4}-", listed, re.M)
    assert re.search(r"^shut-out +revoked +no .* its machine was stolen$", listed, re.M)
    known = call("coordinator", "principals", "-d", coordinator.home)
    assert re.search(rf"^lena +lead +active .* {lead.identity.holder.signing_key.hex()}$", known.out, re.M)

    log = as_(auditor, "audit-log", "--verify", "--last", 3)
    assert log.code == 0, log.err
    assert "whole and unchanged: " in log.out
    found = as_(auditor, "audit-log", "--verify", "--json", "--last", 0).json
    assert found["entries"][-1]["sequence"] == len(found["entries"]) == int(found["verified"].partition(":")[0])
    assert as_(auditor, "audit-log", "--head", found["verified"]).code == 0
    changed = as_(auditor, "audit-log", "--head", f"{len(found['entries'])}:{'00' * 32}")
    assert (changed.code, "the log was rewritten" in changed.err) == (6, True)
    refused = as_(lead, "audit-log")
    assert (refused.code, "a lead may not call Control/ReadAudit" in refused.err) == (8, True)


def test_nobody_at_the_address(lead: Hand, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commonweight.lead.client._REACH_S", 0.2)
    shutil.copytree(lead.identity.path, here / "lost")
    about = json.loads((here / "lost" / "identity.json").read_text())
    (here / "lost" / "identity.json").write_text(json.dumps({**about, "address": "127.0.0.1:1"}))
    answer = call("sites", "--identity", "lost", "--json")
    assert answer.code == 9
    assert answer.json["error"]["kind"] == "UnreachableError"
    assert answer.json["error"]["retry"]
    assert "the coordinator at 127.0.0.1:1 cannot be reached" in answer.err
