"""What holds for every policy, job and past: stricter never allows more, and nothing passes a limit."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from commonweight.errors import PolicyError
from commonweight.privacy.spending import UNPROTECTED, Spend
from commonweight.site.policy import (
    JobFacts,
    Policy,
    PolicyFile,
    Spent,
    decide,
    decide_sending,
    decide_task,
    policy_text,
)
from commonweight.site.records import SiteRecords
from tests.unit.site_policies import PLAIN, make_policy

MODELS = ("a" * 64, "b" * 64, "c" * 64)
SIGNERS = ("lena", "max", "d" * 64)
PURPOSES = ("triage", "care", "any other")
STRATEGIES = ("built-in", "fedavg", "fedadam", "mine:Mean")
OBJECTIVES = ("built-in", "sft", "mine:Loss")
SIZES = st.integers(0, 40)
TASKS = st.tuples(
    st.sampled_from(["join", "train", "evaluate", "chain", "sample", "other"]),
    st.integers(0, 6),
    st.none() | st.integers(0, 6),
)


def some(values: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), unique=True, max_size=len(values))


def or_any(values: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    return some(values) | st.just(["any"])


BUDGETS = st.fixed_dictionaries(
    {
        "unit": st.sampled_from(["site", "example"]),
        "epsilon": st.floats(0.5, 20),
        "delta": st.sampled_from([1e-6, 1e-5]),
    }
)
SPENDS = st.sampled_from([UNPROTECTED, Spend("site", "gaussian", 3.0), Spend("site", "gaussian", 8.0, count=2)])

POLICIES = st.fixed_dictionaries(
    {
        "models": or_any(MODELS),
        "signers": or_any(SIGNERS),
        "kinds": some(("train", "evaluate")),
        "purposes": or_any(PURPOSES),
        "strategies": some(STRATEGIES),
        "objectives": some(OBJECTIVES),
        "relays": or_any(("upland", "lowland")),
        "min_cohort": st.integers(1, 5),
        "max_rounds": st.integers(0, 5),
        "max_bytes_per_round": SIZES,
        "max_bytes_total": SIZES,
        "privacy": st.fixed_dictionaries(
            {
                "dp_required": st.booleans(),
                "max_epsilon": st.none() | st.floats(0.5, 9),
                "budget": st.none() | BUDGETS,
                "secure_aggregation_required": st.booleans(),
                "own_noise_required": st.booleans(),
            }
        ),
        "remote_code": st.just(False),
        "approval": st.sampled_from(["none", "first-run", "every-run"]),
        "share": st.fixed_dictionaries(
            {"scores": st.sampled_from(["rows", "total", "none"]), "samples": st.booleans()}
        ),
    }
).map(Policy.model_validate)

# most are let through by some policy: otherwise the properties would hold of refusals only
JOBS = st.builds(
    JobFacts,
    run=st.just("r1"),
    name=st.just("demo"),
    kind=st.sampled_from(["train", "train", "evaluate", "other"]),
    signer=st.sampled_from(["lena", "max", "eve"]),
    signer_key=st.sampled_from(["d" * 64, "e" * 64]),
    signer_role=st.sampled_from(["lead", "lead", "admin", "site", ""]),
    model=st.sampled_from([*MODELS, ""]),
    purpose=st.sampled_from([*PURPOSES, ""]),
    rounds=st.integers(1, 6),
    min_cohort=st.integers(1, 6),
    strategy=st.sampled_from(["fedavg", "fedadam", "mine:Mean", "any"]),
    objective=st.sampled_from(["sft", "mine:Loss", "any"]),
    update_bytes=st.integers(0, 8),
    evaluation=st.booleans(),
    samples=st.integers(0, 2),
    dp=st.sampled_from(["none", "example"]),
    epsilon=st.none() | st.floats(0, 10) | st.just(float("nan")),
    secure_aggregation=st.booleans(),
    trust_remote_code=st.just(False),
    num_sites=st.integers(1, 9),
    spend=SPENDS,
    own_noise=st.booleans(),
)


@st.composite
def pasts(draw: st.DrawFn) -> Spent:
    of_round, rest, others = draw(SIZES), draw(SIZES), draw(SIZES)
    of_signer = draw(st.integers(0, 2))
    return Spent(
        bytes_round=of_round,
        bytes_run=of_round + rest,
        bytes_total=of_round + rest + others,
        rounds=draw(st.integers(0, 5)),
        runs=of_signer + draw(st.integers(0, 2)),
        runs_of_signer=of_signer,
        spends_run=tuple(draw(st.lists(SPENDS.filter(lambda spend: spend.unit == "site"), max_size=3))),
        spends_others=tuple(draw(st.lists(SPENDS, max_size=3))),
        approval=draw(st.sampled_from([None, "pending", "approved", "denied"])),
    )


@st.composite
def stricter(draw: st.DrawFn, policy: Policy) -> Policy:
    """A policy that is at least as strict in every field."""
    known = {"models": MODELS, "signers": SIGNERS, "purposes": PURPOSES}
    values: dict[str, Any] = policy.model_dump(mode="json")
    for field in ("models", "signers", "purposes", "kinds", "strategies", "objectives"):
        if values[field] != ["any"] or draw(st.booleans()):
            allowed = known[field] if values[field] == ["any"] else tuple(values[field])
            values[field] = draw(some(allowed)) if allowed else []
    values["min_cohort"] += draw(st.integers(0, 3))
    for field in ("max_rounds", "max_bytes_per_round", "max_bytes_total"):
        values[field] = draw(st.integers(0, values[field]))
    privacy, share = values["privacy"], values["share"]
    for field in ("dp_required", "secure_aggregation_required", "own_noise_required"):
        privacy[field] = privacy[field] or draw(st.booleans())
    bound = privacy["max_epsilon"]
    privacy["max_epsilon"] = draw(st.floats(0.25, bound) if bound else st.none() | st.floats(0.25, 9))
    budget = privacy["budget"]
    if budget is None:
        privacy["budget"] = draw(st.none() | BUDGETS)
    else:
        privacy["budget"] = {**budget, "epsilon": draw(st.floats(0.25, budget["epsilon"]))}
    for section, field, order in (
        (values, "approval", ("none", "first-run", "every-run")),
        (share, "scores", ("rows", "total", "none")),
    ):
        section[field] = draw(st.sampled_from(order[order.index(section[field]) :]))
    share["samples"] = share["samples"] and draw(st.booleans())
    return Policy.model_validate(values)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Policy, Policy]:
    loose = draw(POLICIES)
    return loose, draw(stricter(loose))


#: a policy that allows much, so that "allowed" is not rare, and one stricter than it
GENEROUS = make_policy(
    models=["any"],
    signers=["any"],
    purposes=["any"],
    strategies=["built-in", "mine:Mean"],
    objectives=["built-in", "mine:Loss"],
    min_cohort=1,
    max_rounds=6,
    max_bytes_per_round=200,
    max_bytes_total=200,
)


@given(pairs() | stricter(GENEROUS).map(lambda strict: (GENEROUS, strict)), JOBS, TASKS, pasts())
@settings(max_examples=250, deadline=None)
def test_stricter_never_allows_what_was_denied(
    policies: tuple[Policy, Policy], job: JobFacts, task: tuple[str, int, int | None], past: Spent
) -> None:
    loose, strict = policies
    for before, after in (
        (decide(loose, job, past), decide(strict, job, past)),
        (decide_task(loose, job, *task, past), decide_task(strict, job, *task, past)),
    ):
        assert before.allowed or not after.allowed
        assert before.clear or not after.clear
        assert not (before.allowed and before.needs_approval and after.allowed) or after.needs_approval
        assert len(before.withheld) <= len(after.withheld)


@given(pairs(), st.sampled_from(["update", "scores", "samples", "facts", "rows"]), SIZES, pasts())
@settings(max_examples=100, deadline=None)
def test_stricter_never_lets_leave_what_was_denied(
    policies: tuple[Policy, Policy], what: str, num_bytes: int, past: Spent
) -> None:
    loose, strict = policies
    assert (
        decide_sending(loose, what, num_bytes, past).allowed
        or not decide_sending(strict, what, num_bytes, past).allowed
    )


@given(POLICIES, JOBS, TASKS, pasts())
@settings(max_examples=150, deadline=None)
def test_a_refusal_has_reasons_and_an_allowed_task_is_within_every_limit(
    policy: Policy, job: JobFacts, task: tuple[str, int, int | None], past: Spent
) -> None:
    decision = decide_task(policy, job, *task, past)
    assert decision.allowed == (not decision.reasons)
    assert all(len(reason) > 20 and "\n" not in reason for reason in decision.reasons)
    if decision.allowed:
        kind, round, cohort = task
        assert job.rounds <= policy.max_rounds
        assert job.min_cohort >= policy.min_cohort
        assert past.bytes_round <= policy.max_bytes_per_round
        assert kind != "train" or (1 <= round <= policy.max_rounds and (cohort is None or cohort >= policy.min_cohort))
        assert past.approval != "denied"
        assert decide(policy, job, past).allowed


@given(JOBS, TASKS, pasts())
@settings(max_examples=50, deadline=None)
def test_a_policy_of_empty_lists_denies_every_job(
    job: JobFacts, task: tuple[str, int, int | None], past: Spent
) -> None:
    empty = ("models", "signers", "kinds", "purposes", "strategies", "objectives")
    for field in empty:
        policy = GENEROUS.model_copy(update={field: []})
        assert not decide_task(policy, job, *task, past).allowed


@given(JOBS, pasts(), st.text(min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_dotted_names_are_denied_unless_listed(job: JobFacts, past: Spent, name: str) -> None:
    policy = GENEROUS.model_copy(update={"strategies": ["built-in"], "objectives": ["built-in"]})
    dotted = f"package.{name}:Method"
    for change in ({"strategy": dotted}, {"objective": dotted}):
        assert not decide(policy, replace(job, **change), past).allowed


@given(POLICIES)
@settings(max_examples=50, deadline=None)
def test_a_written_policy_reads_the_same(policy: Policy) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.yaml"
        path.write_text(policy_text(policy), encoding="utf-8")
        assert PolicyFile(path).current() == policy
        assert PolicyFile(path).current().digest == policy.digest


def outcome(path: Path) -> str:
    try:
        PolicyFile(path).current()
    except PolicyError as error:
        return "denies everything" if "denies everything" in error.message else error.message
    return "a policy"


LINES = policy_text(make_policy()).splitlines()


@given(st.integers(0, len(LINES) - 1), st.binary(max_size=20))
@settings(max_examples=100, deadline=None)
def test_whatever_is_in_the_file_it_is_a_policy_or_denies(place: int, rubbish: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.yaml"
        lines = [line.encode() for line in LINES]
        path.write_bytes(b"\n".join([*lines[:place], rubbish, *lines[place + 1 :]]))
        assert outcome(path) in ("a policy", "denies everything")


class Sending(RuleBasedStateMachine):
    """Whatever is sent in whatever order under whatever policies, the records say it, and no limit is passed."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.records = SiteRecords(Path(self.folder.name) / "state.sqlite")
        self.sent: dict[tuple[str, int], int] = {}

    @rule(
        run=st.sampled_from(["r1", "r2"]),
        round=st.integers(0, 2),
        num_bytes=st.integers(-1, 30),
        per_round=SIZES,
        total=st.integers(0, 90),
    )
    def send(self, run: str, round: int, num_bytes: int, per_round: int, total: int) -> None:
        policy = make_policy(max_bytes_per_round=per_round, max_bytes_total=total)
        before = self.sent.get((run, round), 0)
        fits = num_bytes >= 0 and before + num_bytes <= per_round and sum(self.sent.values()) + num_bytes <= total
        try:
            self.records.spend(policy, run=run, round=round, what="update", num_bytes=num_bytes)
        except PolicyError:
            assert not fits
        else:
            assert fits
            self.sent[run, round] = before + num_bytes

    @rule()
    def restart(self) -> None:
        self.records.close()
        self.records = SiteRecords(Path(self.folder.name) / "state.sqlite")

    @invariant()
    def counts_agree(self) -> None:
        for run in ("r1", "r2"):
            for round in range(3):
                spent = self.records.spent(run, round)
                assert spent.bytes_round == self.sent.get((run, round), 0)
                assert spent.bytes_run == sum(n for (r, _), n in self.sent.items() if r == run)
                assert spent.bytes_total == sum(self.sent.values())

    def teardown(self) -> None:
        self.records.close()
        self.folder.cleanup()


TestSending = Sending.TestCase
TestSending.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)


def test_the_generous_policy_allows_something() -> None:
    assert decide(GENEROUS, replace(PLAIN, rounds=6, update_bytes=8), Spent()).clear
