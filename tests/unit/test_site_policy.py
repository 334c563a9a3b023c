"""A site's settings and policy: what they are read from, what they deny, and in which words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from commonweight import registry
from commonweight.errors import DataError, PolicyError, RecipeError, StateError
from commonweight.evaluate.metrics import Scores
from commonweight.model.tensors import NamedTensors
from commonweight.privacy.spending import Spend
from commonweight.recipe import Recipe
from commonweight.recipe.fields import dotted, section_of, walk
from commonweight.recipe.schema import DEMO_DATA, DataSpec, SitesSpec
from commonweight.site.policy import (
    Decision,
    JobFacts,
    Policy,
    PolicyFile,
    Spent,
    decide,
    decide_sending,
    decide_task,
    load_policy,
    policy_text,
    shared,
    shared_chain,
    shared_groups,
)
from commonweight.site.settings import load_settings, write_starter
from commonweight.wire.frames import Channel, frame_of, plan_for
from commonweight.wire.refusals import Refused

from .site_policies import KEY, MODEL, OPEN, PLAIN, make_facts, make_policy

NOTHING = Spent()
OWN_LOSS = "hospital.loss:Careful"


# ---- policy.yaml


def write_policy(folder: Path, text: str) -> Path:
    path = folder / "policy.yaml"
    path.write_text(text)
    return path


def open_text(**fields: Any) -> str:
    return policy_text(make_policy(**fields))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    policy = make_policy(privacy__max_epsilon=8.0, models=["any"])
    write_policy(tmp_path, policy_text(policy))
    assert load_policy(tmp_path) == policy


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("", "policy.yaml is empty", id="empty"),
        pytest.param("# nothing\n", "policy.yaml is empty", id="only a comment"),
        pytest.param("- models", "holds a list, not a mapping", id="list"),
        pytest.param("models: [", "is not YAML", id="not YAML"),
        pytest.param("a: &x 1\nb: *x\n", "alias", id="alias"),
        pytest.param("models: !!python/object:os.system []\n", "tag", id="tag"),
        pytest.param(open_text() + "models: [any]\n", "`models` is given twice", id="key twice"),
        pytest.param(open_text() + "max_runs: 3\n", "unknown key `max_runs`", id="unknown key"),
        pytest.param(open_text().replace("samples: true", "samples: true\n  texts: false"), "`share.texts`", id="deep"),
        pytest.param(open_text().replace("max_rounds: 10", "max_rounds: '10'"), '`max_rounds` is "10"', id="text"),
        pytest.param(open_text().replace("max_rounds: 10", "max_rounds: true"), "`max_rounds` is true", id="bool"),
        pytest.param(open_text().replace("min_cohort: 3", "min_cohort: 0"), "`min_cohort` is 0", id="no cohort"),
        pytest.param(open_text().replace("max_rounds: 10", "max_rounds: -1"), "`max_rounds` is -1", id="negative"),
        pytest.param(open_text().replace("max_epsilon: null", "max_epsilon: .nan"), "max_epsilon", id="nan"),
        pytest.param(open_text().replace("max_epsilon: null", "max_epsilon: .inf"), "max_epsilon", id="inf"),
        pytest.param(open_text().replace("remote_code: false", "remote_code: true"), "must be `false`", id="code"),
        pytest.param(open_text().replace(MODEL, "abc"), "neither a digest", id="short digest"),
        pytest.param(open_text().replace(MODEL, MODEL.upper()), "neither a digest", id="capital digest"),
        pytest.param(open_text().replace("- lena", "- Lena"), "neither a name", id="capital name"),
        pytest.param(open_text().replace("- lena", "- any\n- lena"), "stands alone", id="any and more"),
        pytest.param(open_text().replace("- triage", "- ' '"), "blank", id="blank purpose"),
        pytest.param(open_text(strategies=["built-in"]).replace("strategies:\n- built-in", "strategies: [any]"), "any"),
        pytest.param(open_text().replace("2000", "2 megabytes"), "no number of bytes", id="unit"),
        pytest.param(open_text().replace("scores: rows", "scores: all"), "`share.scores`", id="choice"),
        pytest.param("privacy: 3\n", "`privacy` is 3", id="section"),
        pytest.param(open_text().replace("approval: none", "approval: null"), "`approval` is null", id="null"),
    ],
)
def test_a_bad_policy_denies_everything(tmp_path: Path, text: str, says: str) -> None:
    write_policy(tmp_path, text)
    with pytest.raises(PolicyError) as caught:
        load_policy(tmp_path)
    assert says in f"{caught.value.message}\n{caught.value.hint}"
    assert "denies everything" in caught.value.message
    assert str(tmp_path) not in caught.value.message  # the reason is told to others


@pytest.mark.parametrize("field", [dotted(loc) for loc, _ in walk(Policy)])
def test_no_field_may_be_left_out(tmp_path: Path, field: str) -> None:
    values = yaml.safe_load(open_text())
    *section, key = field.split(".")
    inside = values[section[0]] if section else values
    del inside[key]
    write_policy(tmp_path, yaml.safe_dump(values))
    with pytest.raises(PolicyError, match=f"`{field}` is missing"):
        load_policy(tmp_path)


def test_no_policy_denies_everything(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"has no policy; .*denies everything"):
        load_policy(tmp_path)


def test_a_folder_in_its_place_or_binary_denies_everything(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").mkdir()
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(tmp_path)
    (tmp_path / "policy.yaml").rmdir()
    (tmp_path / "policy.yaml").write_bytes(b"models: [\xff\xfe]\n")
    with pytest.raises(PolicyError, match="not UTF-8"):
        load_policy(tmp_path)
    (tmp_path / "policy.yaml").write_bytes(b"#" * (1 << 20) + b"##")
    with pytest.raises(PolicyError, match="larger than 1 MiB"):
        load_policy(tmp_path)


def test_a_policy_that_everyone_may_write_denies_everything(tmp_path: Path) -> None:
    path = write_policy(tmp_path, open_text())
    path.chmod(0o646)
    with pytest.raises(PolicyError, match="written by every user") as caught:
        load_policy(tmp_path)
    assert "chmod o-w" in caught.value.hint


def test_a_changed_file_counts_at_once_even_with_the_same_size_and_time(tmp_path: Path) -> None:
    path = write_policy(tmp_path, open_text(max_rounds=20))
    file = PolicyFile(path)
    first, times = file.current(), path.stat()
    assert file.current() is first
    path.write_text(open_text(max_rounds=10))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.current().max_rounds == 10


def test_a_file_that_has_become_bad_no_longer_counts(tmp_path: Path) -> None:
    path = write_policy(tmp_path, open_text())
    file = PolicyFile(path)
    file.current()
    path.write_text("models: [any]\n")
    for _ in range(2):
        with pytest.raises(PolicyError):
            file.current()
    path.unlink()
    with pytest.raises(PolicyError):
        file.current()
    path.write_text(open_text())
    assert file.current() == make_policy()


def test_sizes_are_read_in_units(tmp_path: Path) -> None:
    for text, num_bytes in {"64 MiB": 64 << 20, "1.5kB": 1500, "0 B": 0, "2TB": 2 * 10**12}.items():
        write_policy(tmp_path, open_text().replace("max_bytes_per_round: 2000", f"max_bytes_per_round: {text}"))
        assert load_policy(tmp_path).max_bytes_per_round == num_bytes


def test_the_digest_is_of_what_is_meant(tmp_path: Path) -> None:
    write_policy(tmp_path, "# a comment\n" + open_text().replace("max_bytes_total: 10000", "max_bytes_total: 10 kB"))
    assert load_policy(tmp_path).digest == make_policy().digest
    turned = make_policy(kinds=["evaluate", "train"])
    assert turned.digest == make_policy().digest
    changes = [{}, *(change for change, *_ in DENIALS.values() if change)]
    meanings = {policy_text(make_policy(**change)) for change in changes}
    assert len({make_policy(**change).digest for change in changes}) == len(meanings)


# ---- decisions: each field denies something

TASK = ("train", 1, 5)
#: what denies: changes of the policy, of the job, of the task (kind, round, cohort), of what has happened; the words
DENIALS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, int, int | None], Spent, str]] = {
    "models": (
        {"models": ["c" * 64]},
        {},
        TASK,
        NOTHING,
        f"models: {'c' * 64}; the job is for the base weights {MODEL}",
    ),
    "models, empty": ({"models": []}, {}, TASK, NOTHING, "models: none are allowed"),
    "models, not stated": ({"models": ["any"]}, {"model": ""}, TASK, NOTHING, "must state the digest"),
    "signers": ({"signers": ["max"]}, {}, TASK, NOTHING, f"signers: max; the job is signed by 'lena' (key {KEY})"),
    "signers, empty": ({"signers": []}, {}, TASK, NOTHING, "signers: none are allowed"),
    "signers, other key": ({"signers": ["d" * 64]}, {}, TASK, NOTHING, "signers:"),
    "signer's role": ({"signers": ["any"]}, {"signer_role": "site"}, TASK, NOTHING, "this one by a site"),
    "kinds, of the job": ({"kinds": ["evaluate"]}, {}, ("join", 0, None), NOTHING, "the job is of kind 'train'"),
    "kinds, of the task": ({"kinds": ["train"]}, {}, ("evaluate", 1, None), NOTHING, "'evaluate' needs evaluate"),
    "kinds, chain": ({"kinds": ["train"]}, {}, ("chain", 0, None), NOTHING, "'chain' needs evaluate"),
    "kinds, unknown": ({}, {}, ("upload-rows", 1, None), NOTHING, "asked: 'upload-rows'"),
    "purposes": ({"purposes": ["care"]}, {}, TASK, NOTHING, "purposes: care; the job's purpose is 'triage'"),
    "purposes, not stated": ({}, {"purpose": ""}, TASK, NOTHING, "'not stated'"),
    "strategies": ({"strategies": ["fedadam"]}, {}, TASK, NOTHING, "strategies: fedadam; the job names the strategy"),
    "strategies, own": ({}, {"strategy": "mine:Mean"}, TASK, NOTHING, "'mine:Mean', which is not among them"),
    "objectives": ({"objectives": []}, {}, TASK, NOTHING, "objectives: none are allowed; the job names the objective"),
    "objectives, own": ({}, {"objective": OWN_LOSS}, TASK, NOTHING, f"{OWN_LOSS!r}, which is not among them"),
    "min_cohort": ({"min_cohort": 4}, {}, TASK, NOTHING, "min_cohort is 4: so many sites' updates must be combined"),
    "min_cohort, of a group": (
        {"min_cohort": 4},
        {"min_cohort": 9, "secure_group_size": 3},
        TASK,
        NOTHING,
        "the job shows sums of groups of 3 (its privacy.secure_group_size)",
    ),
    "min_cohort, of the round": ({}, {}, ("train", 1, 2), NOTHING, "min_cohort is 3; 2 sites are invited"),
    "max_rounds": ({"max_rounds": 9}, {}, TASK, NOTHING, "max_rounds is 9; the job has 10 rounds"),
    "max_rounds, of the task": (
        {"max_rounds": 4},
        {"rounds": 4},
        ("train", 5, 5),
        NOTHING,
        "max_rounds is 4; the task is for round 5",
    ),
    "max_rounds, taken part": (
        {"max_rounds": 4},
        {"rounds": 4},
        TASK,
        Spent(rounds=4),
        "this site took part in 4 rounds of the run already",
    ),
    "rounds of the job": ({}, {}, ("train", 11, 5), NOTHING, "the job has rounds 1 to 10; the task is for round 11"),
    "round 0": ({}, {}, ("train", 0, 5), NOTHING, "the task is for round 0"),
    "max_bytes_per_round": (
        {"max_bytes_per_round": 999},
        {},
        TASK,
        NOTHING,
        "max_bytes_per_round is 999 bytes; asked: 1,000 bytes in a round",
    ),
    "max_bytes_per_round, passed": (
        {"max_bytes_per_round": 1500},
        {},
        ("evaluate", 1, None),
        Spent(bytes_round=1600, bytes_run=1600, bytes_total=1600),
        "max_bytes_per_round is 1,500 bytes (1.46 KiB), 1,600 bytes (1.56 KiB) have left already",
    ),
    "max_bytes_total": (
        {"max_bytes_total": 9_999},
        {},
        TASK,
        NOTHING,
        "max_bytes_total is 9,999 bytes (9.76 KiB); asked: 10,000 bytes (9.77 KiB) in all its rounds",
    ),
    "max_bytes_total, other runs": ({}, {}, TASK, Spent(bytes_total=1), "1 bytes have left already"),
    "max_bytes_total, this run": (
        {},
        {},
        ("train", 10, 5),
        Spent(bytes_run=9_500, bytes_total=9_500),
        "asked: 1,000 bytes in this round",
    ),
    "privacy.dp_required": ({"privacy__dp_required": True}, {}, TASK, NOTHING, "no differential privacy"),
    "privacy.max_epsilon": (
        {"privacy__max_epsilon": 4.0},
        {"dp": "example", "epsilon": 8.0},
        TASK,
        NOTHING,
        "privacy.max_epsilon is 4; the job states 8",
    ),
    "privacy.max_epsilon, none": ({"privacy__max_epsilon": 4.0}, {}, TASK, NOTHING, "the job states none (ε = ∞)"),
    "privacy.max_epsilon, nan": (
        {"privacy__max_epsilon": 4.0},
        {"epsilon": float("nan")},
        TASK,
        NOTHING,
        "the job states nan",
    ),
    "privacy.budget": (
        {"privacy__budget": {"unit": "site", "epsilon": 9.0, "delta": 1e-5}},
        {"spend": Spend("site", "gaussian", 4.0), "rounds": 4},
        TASK,
        Spent(spends_others=(Spend("site", "gaussian", 4.0, count=80),)),
        "privacy.budget: in all the job's rounds: the budget is ε = 9 at δ = 1e-05 for each site over all runs; ",
    ),
    "privacy.budget, this round": (
        {"privacy__budget": {"unit": "site", "epsilon": 12.5, "delta": 1e-5}},
        {"spend": Spend("site", "gaussian", 4.0), "rounds": 4},
        TASK,
        Spent(
            spends_others=(Spend("site", "gaussian", 4.0, count=80),),
            spends_run=(Spend("site", "gaussian", 4.0, count=40),),
        ),
        "privacy.budget: in this round: ",
    ),
    "privacy.budget, none": (
        {"privacy__budget": {"unit": "example", "epsilon": 50.0, "delta": 1e-5}},
        {},
        TASK,
        NOTHING,
        "0.000 is spent, and this would make it ∞",
    ),
    "privacy.secure_aggregation_required": (
        {"privacy__secure_aggregation_required": True},
        {},
        TASK,
        NOTHING,
        "shows the coordinator each site's update",
    ),
    "privacy.own_noise_required": (
        {"privacy__own_noise_required": True},
        {"dp": "site"},
        TASK,
        NOTHING,
        "to which the coordinator is to add the noise",
    ),
    "privacy.own_noise_required, none": ({"privacy__own_noise_required": True}, {}, TASK, NOTHING, "without noise"),
    "remote_code": ({}, {"trust_remote_code": True}, TASK, NOTHING, "remote_code is false"),
    "approval": ({"approval": "every-run"}, {}, TASK, Spent(approval="denied"), "a person at this site has denied"),
    "share.scores": ({"share__scores": "none"}, {}, ("evaluate", 1, None), NOTHING, "share.scores is none"),
    "share.samples": ({"share__samples": False}, {}, ("sample", 0, None), NOTHING, "share.samples is false"),
}


@pytest.mark.parametrize("name", DENIALS)
def test_each_rule_denies_in_a_sentence(name: str) -> None:
    change, asked, task, spent, says = DENIALS[name]
    decision = decide_task(make_policy(**change), make_facts(**asked), *task, spent)
    assert not decision.allowed
    assert not decision.needs_approval
    assert says in decision.text
    with pytest.raises(PolicyError, match="this site's policy does not allow it"):
        decision.enforce()


def test_every_field_of_a_policy_denies_something() -> None:
    leaves = {dotted(loc) for loc, field in walk(Policy) if section_of(field) is None}
    leaves.remove("relays")  # it denies a way, not a task
    assert leaves <= {name.partition(",")[0] for name in DENIALS}


@pytest.mark.parametrize("kind", ["join", "train", "evaluate", "chain", "sample"])
def test_what_no_rule_is_against_is_allowed(kind: str) -> None:
    decision = decide_task(make_policy(), PLAIN, kind, 10, 3, Spent(bytes_run=9_000, bytes_total=9_000, rounds=9))
    assert decision == Decision(True, [])
    assert decision.clear
    decision.enforce()


def test_every_reason_is_given() -> None:
    decision = decide(make_policy(models=[], signers=[], max_rounds=1, privacy__dp_required=True), PLAIN, NOTHING)
    assert [reason.split()[0] for reason in decision.reasons] == [
        "signers:",
        "models:",
        "max_rounds",
        "privacy.dp_required",
    ]


def test_a_long_list_is_cut_in_the_refusal() -> None:
    decision = decide(make_policy(purposes=[f"p{k}" for k in range(100)]), PLAIN, NOTHING)
    assert "purposes: p0, p1, p2, p3, p4 and 95 more; " in decision.text


def test_a_signer_may_be_named_by_key() -> None:
    assert decide(make_policy(signers=[KEY]), PLAIN, NOTHING).allowed
    assert decide(make_policy(signers=["any"]), PLAIN, NOTHING).allowed
    assert decide(make_policy(models=["any"], purposes=["any"]), make_facts(purpose=""), NOTHING).allowed


def test_code_of_ones_own_needs_its_exact_name() -> None:
    job = make_facts(objective=OWN_LOSS, strategy="theirs")
    assert decide(make_policy(objectives=["built-in", OWN_LOSS], strategies=["theirs"]), job, NOTHING).allowed
    for near in ("hospital.loss:Carefu", "hospital.loss", "hospital.loss:careful", "*"):
        assert not decide(make_policy(objectives=["built-in", near], strategies=["theirs"]), job, NOTHING).allowed


def test_a_plugin_that_takes_a_built_in_name_is_not_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"fedavg", "scaffold"} <= registry.built_in("strategy")
    ours = EntryPoint("fedavg", "commonweight.strategies.fedavg:FedAvg", "commonweight.strategies")
    theirs = EntryPoint("fedavg", "commonweightier.steal:FedAvg", "commonweight.strategies")
    other = EntryPoint("fedprox", "commonweight.strategies.fedprox:FedProx", "commonweight.strategies")
    monkeypatch.setattr(registry, "entry_points", lambda group: [ours, theirs, other])
    assert registry.built_in.__wrapped__("strategy") == {"fedprox"}


def test_what_has_left_in_a_round_is_not_counted_as_yet_to_be_sent() -> None:
    halfway = Spent(bytes_round=600, bytes_run=9_600, bytes_total=9_600, rounds=9)
    assert decide_task(make_policy(), PLAIN, "train", 10, 3, halfway).allowed


# ---- a person's approval


@pytest.mark.parametrize(
    ("approval", "spent", "asks"),
    [
        ("none", Spent(), False),
        ("first-run", Spent(), True),
        ("first-run", Spent(runs=3), True),
        ("first-run", Spent(runs=3, runs_of_signer=1), False),
        ("first-run", Spent(approval="approved"), False),
        ("first-run", Spent(runs_of_signer=1, approval="pending"), True),
        ("every-run", Spent(runs=3, runs_of_signer=1), True),
        ("every-run", Spent(approval="pending"), True),
        ("every-run", Spent(approval="approved"), False),
    ],
)
def test_when_a_person_is_asked(approval: str, spent: Spent, asks: bool) -> None:
    decision = decide(make_policy(approval=approval), PLAIN, spent)
    assert decision.allowed
    assert decision.needs_approval is asks
    assert decision.clear is not asks
    if asks:
        with pytest.raises(PolicyError, match="must approve"):
            decision.enforce()


def test_nobody_is_asked_about_what_the_policy_denies() -> None:
    decision = decide(make_policy(approval="every-run", models=[]), PLAIN, NOTHING)
    assert (decision.allowed, decision.needs_approval) == (False, False)


def test_a_denial_holds_whatever_the_policy_asks() -> None:
    for approval in ("none", "first-run", "every-run"):
        assert not decide(make_policy(approval=approval), PLAIN, Spent(approval="denied", runs_of_signer=1)).allowed


# ---- what the job will not get


def test_withheld_is_said_in_advance() -> None:
    assert decide(make_policy(), PLAIN, NOTHING).withheld == ()
    total = decide(make_policy(share__scores="total", share__samples=False), PLAIN, NOTHING)
    assert total.allowed
    assert [text.split(" is ")[0] for text in total.withheld] == ["share.scores", "share.samples"]
    assert "will not evaluate" in decide(make_policy(share__scores="none"), PLAIN, NOTHING).withheld[0]
    assert "kinds: train; " in decide(make_policy(kinds=["train"]), PLAIN, NOTHING).withheld[0]
    assert decide(make_policy(share__samples=False), make_facts(samples=0), NOTHING).withheld == ()


# ---- sending


@pytest.mark.parametrize(
    ("change", "what", "num_bytes", "says"),
    [
        ({}, "rows", 1, "asked: 'rows'"),
        ({}, "update", -1, "no fewer than 0 bytes"),
        ({}, "update", 1_501, "max_bytes_per_round is 2,000 bytes (1.95 KiB), 500 bytes have left already"),
        ({"max_bytes_per_round": 20_000}, "update", 9_101, "max_bytes_total"),
        ({"kinds": ["evaluate"]}, "update", 1, "kinds: evaluate"),
        ({"kinds": ["train"]}, "scores", 1, "scores come of evaluation"),
        ({"kinds": ["train"]}, "samples", 1, "samples come of evaluation"),
        ({"share__scores": "none"}, "scores", 1, "share.scores"),
        ({"share__samples": False}, "samples", 1, "share.samples"),
    ],
)
def test_sending_is_denied_in_a_sentence(change: dict[str, Any], what: str, num_bytes: int, says: str) -> None:
    spent = Spent(bytes_round=500, bytes_run=900, bytes_total=900)
    decision = decide_sending(make_policy(**change), what, num_bytes, spent)
    assert not decision.allowed
    assert says in decision.text


def test_sending_up_to_the_limit_is_allowed() -> None:
    spent = Spent(bytes_round=500, bytes_run=900, bytes_total=8_500)
    for what in ("update", "scores", "samples", "facts"):
        assert decide_sending(make_policy(), what, 1_500, spent).allowed


# ---- a job's facts


def header(*channels: str, dtype: torch.dtype = torch.float32) -> bytes:
    tensors = NamedTensors.of({"a": torch.zeros(3, 5, dtype=dtype), "b": torch.zeros(7, dtype=dtype)})
    plan = plan_for(tensors.layout, tuple(Channel(name, name != "theta") for name in channels), 1024)
    wide = NamedTensors.zeros(tensors.layout, wide=True)
    return frame_of({name: tensors if name == "theta" else wide for name in channels}, plan).header


def facts_of(recipe: Recipe, initial: bytes, **fields: Any) -> JobFacts:
    known: dict[str, Any] = {
        "run": "r1",
        "kind": "train",
        "purpose": "triage",
        "signer": "lena",
        "signer_key": KEY.upper(),
        "signer_role": "lead",
        "must_match": {"base weights": MODEL, "tokenizer": "x"},
        "num_sites": 5,
    }
    return JobFacts.of(recipe, initial=initial, **{**known, **fields})


def test_facts_come_from_the_recipe(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(
        federation={"rounds": 10, "min_sites": 3, "quorum": 1.0}, evaluation={"samples": 1, "controls": ["local"]}
    )
    facts = facts_of(recipe, header("theta"))
    assert facts == make_facts(name="small", update_bytes=4 * 22, participations=10)
    assert JobFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    for part in (
        "r1 (small)",
        "triage",
        "lena",
        KEY,
        MODEL,
        "10 rounds of fedavg / sft",
        "at least 3 of 5 sites",
        "ε = ∞",
    ):
        assert part in facts.summary()


def test_a_quorum_is_no_promise_of_a_cohort(make_recipe: Callable[..., Recipe]) -> None:
    # half of a hundred is fifty, but half of whoever joins may be one
    assert facts_of(make_recipe(federation={"quorum": 0.5}), header("theta"), num_sites=100).min_cohort == 1


def test_update_bytes_are_those_of_the_strategys_channels(make_recipe: Callable[..., Recipe]) -> None:
    def update_bytes(strategy: str, *channels: str, dtype: torch.dtype = torch.float32) -> int:
        recipe = make_recipe(federation={"strategy": strategy})
        return facts_of(recipe, header(*channels, dtype=dtype)).update_bytes

    assert update_bytes("fedadam", "theta", "m", "v") == 88  # moments stay with the coordinator
    assert update_bytes("scaffold", "theta", "control") == 2 * 88
    assert update_bytes("scaffold", "theta", "control", dtype=torch.bfloat16) == 2 * 44
    # code that may not be loaded: as many channels as the global tensors have
    assert update_bytes("no.such.module:Mean", "theta", "one", "two") == 3 * 88


def test_a_strategy_of_ones_own_is_not_imported_to_know_its_facts(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spiteful.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = make_recipe(federation={"strategy": "spiteful:Mean"}, training={"objective": "spiteful:Loss"})
    decision = decide(make_policy(), facts_of(recipe, header("theta")), NOTHING)
    assert "'spiteful:Mean'" in decision.text
    assert "'spiteful:Loss'" in decision.text


def test_facts_need_a_readable_header(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(Refused):
        facts_of(make_recipe(), b"\xff\xff not a header")


def test_a_job_that_states_nothing_is_denied(make_recipe: Callable[..., Recipe]) -> None:
    facts = facts_of(make_recipe(), header("theta"), must_match={}, num_sites=0, signer_role="")
    assert facts.model == ""
    assert "of all enrolled sites" in facts.summary()
    denied = decide(make_policy(models=["any"]), facts, NOTHING).text
    assert "must state the digest" in denied
    assert "this one by a nobody" in denied


# ---- what may leave of scores

SCORES = Scores(nll=[0.1, 0.2, 3.0], tokens=[2, 3, 4], correct=[1, 0, 4], exact=[True, False, True]).to_json()


def test_rows_leave_as_they_are() -> None:
    assert shared({"north": SCORES}, make_policy()) == {"north": SCORES}


def test_a_total_is_one_row_of_sums_with_the_same_loss() -> None:
    policy = make_policy(share__scores="total")
    found = shared({"north": SCORES}, policy)["north"]
    assert found == {"nll": [pytest.approx(3.3)], "tokens": [9], "correct": [5]}
    scores = Scores.from_json(json.loads(json.dumps(found)))
    assert scores.nll.sum() / scores.tokens.sum() == pytest.approx(3.3 / 9)
    assert shared_groups(["1", "1", "2"], policy) == ["total"]


def test_no_scores_leave() -> None:
    for policy in (make_policy(share__scores="none"), make_policy(kinds=["train"])):
        with pytest.raises(PolicyError, match="lets no scores"):
            shared({"north": SCORES}, policy)
        assert shared_groups(["1", "1", "2"], policy) == []


def test_what_is_no_score_never_leaves() -> None:
    for policy in (make_policy(), make_policy(share__scores="total")):
        with pytest.raises(DataError, match="text"):
            shared({"north": {**SCORES, "text": ["a patient", "another", "a third"]}}, policy)


def test_a_chains_scores_are_reduced_too() -> None:
    best = {"round": 2, "loss": 0.4, "scores": SCORES}
    chain = {"rounds": [{"round": 1, "losses": {"north": 0.5}}], "final": {"north": SCORES}, "best": best, "seconds": 1}
    assert shared_chain(chain, make_policy()) == chain
    found = shared_chain(chain, make_policy(share__scores="total"))
    assert len(found["final"]["north"]["nll"]) == len(found["best"]["scores"]["nll"]) == 1
    assert found["best"]["loss"] == 0.4
    with pytest.raises(PolicyError):
        shared_chain(chain, make_policy(share__scores="none"))


# ---- site.yaml


def write_site(folder: Path, text: str) -> Path:
    (folder / "site.yaml").write_text(text)
    return folder


def test_the_starter_loads_and_denies_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "site"
    write_starter(folder, "north", "coordinator.example:8443", 'rows: "of" {ours}.jsonl')
    settings = load_settings(folder)
    assert (settings.name, settings.address) == ("north", "coordinator.example:8443")
    assert settings.data_path("triage") == str(tmp_path / 'rows: "of" {ours}.jsonl')
    policy = load_policy(folder)
    decision = decide(policy, PLAIN, NOTHING)
    assert not decision.allowed
    assert {reason.split(":")[0] for reason in decision.reasons} == {"models", "signers", "purposes"}
    filled = policy.model_copy(update={"models": [MODEL], "signers": ["lena"], "purposes": ["triage"]})
    assert decide(filled, PLAIN, NOTHING).needs_approval


def test_the_starter_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("mine")
    with pytest.raises(StateError, match=r"policy.yaml is there already"):
        write_starter(tmp_path, "north", "a:1", DEMO_DATA)
    assert (tmp_path / "policy.yaml").read_text() == "mine"
    assert not (tmp_path / "site.yaml").exists()


@pytest.mark.parametrize(("name", "address"), [("North", "a:1"), ("", "a:1"), ("north", "a"), ("north", "a:70000")])
def test_the_starter_checks_what_it_is_given(tmp_path: Path, name: str, address: str) -> None:
    with pytest.raises(RecipeError, match=r"site\.yaml"):
        write_starter(tmp_path, name, address, "rows.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: north\naddress: a:1\n", "`data` is missing"),
        ("name: north\naddress: a:1\ndata: {}\n", "this site has no data"),
        ("name: north\naddress: a:1\ndata: {path: x}\nthreads: 0\n", "threads 0 must be at least 1"),
        ("name: north\naddress: a:1\ndata: {path: x}\nheartbeat: 3\n", "unknown key `heartbeat`"),
        ("name: north\naddress: a:0\ndata: {path: x}\n", "no port between 1 and 65535"),
        ("name: north\naddress: http://a:1\ndata: {path: x}\n", "`address` is"),
        ("name: north\naddress: a:1\ndata: {path: x, format: xls}\n", '`data.format` is "xls"'),
        ("name: north\naddress: a:1\ndata: {path: x}\nkeep: {runs: -1}\n", "`keep.runs` is -1"),
        ("", "site.yaml is empty"),
    ],
)
def test_bad_settings_are_explained(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_settings(write_site(tmp_path, text))
    assert says in caught.value.message
    assert "recipe" not in caught.value.message + caught.value.hint


def test_missing_settings_are_explained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no .*site\.yaml") as caught:
        load_settings(tmp_path)
    assert "commonweight site join" in caught.value.hint


def test_paths_are_seen_from_the_sites_folder_and_chosen_by_purpose(tmp_path: Path) -> None:
    text = "name: north\naddress: '[::1]:1'\ndata: {path: rows.csv, by_purpose: {triage: /srv/triage.jsonl}}\n"
    settings = load_settings(write_site(tmp_path, text))
    assert settings.data_path() == settings.data_path("care") == str(tmp_path / "rows.csv")
    assert settings.data_path("triage") == "/srv/triage.jsonl"
    built_in_data = load_settings(write_site(tmp_path, f"name: n\naddress: a:1\ndata: {{path: {DEMO_DATA}}}\n"))
    assert built_in_data.data_path() == DEMO_DATA


def test_a_purpose_without_data_is_refused(tmp_path: Path) -> None:
    settings = load_settings(write_site(tmp_path, "name: n\naddress: a:1\ndata: {by_purpose: {triage: t.csv}}\n"))
    with pytest.raises(PolicyError, match=r"no data for the purpose 'care': data\.by_purpose has triage"):
        settings.data_path("care")


def test_a_sites_own_fields_take_the_place_of_the_recipes(tmp_path: Path) -> None:
    spec = DataSpec(path="theirs", prompt="Q: {question}", completion=" {answer}", sites=SitesSpec(by="site"))
    own = 'data: {path: r.csv, format: csv, prompt: "F: {frage}", completion: " {antwort}"}\n'
    found = load_settings(write_site(tmp_path, "name: n\naddress: a:1\n" + own)).data_spec(spec)
    assert (found.path, found.format) == (str(tmp_path / "r.csv"), "csv")
    assert (found.prompt, found.completion, found.sites) == ("F: {frage}", " {antwort}", spec.sites)
    messages = load_settings(write_site(tmp_path, "name: n\naddress: a:1\ndata: {path: r, messages: chat}\n"))
    assert messages.data_spec(spec).prompt is None
    assert messages.data_spec(spec).messages == "chat"
    with pytest.raises(RecipeError, match="`data`"):
        messages.data_spec(DataSpec(text="{text}", chunks=True))


def test_open_policy_covers_the_schema() -> None:
    assert set(OPEN) == set(Policy.model_fields)
