"""The round as a state machine, driven through every order of events, and who is invited to it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from commonweight.errors import RecipeError
from commonweight.federation.cohort import check_cohort, choose_cohort
from commonweight.federation.round import (
    Answered,
    Committed,
    DeadlinePassed,
    Event,
    Failed,
    Phase,
    Round,
    Verdict,
    answers_needed,
)
from commonweight.recipe.schema import FederationSpec

SITES = tuple("abcdef")
NUMBER = 4

quick = settings(max_examples=100, deadline=None)
sites = st.sampled_from([*SITES, "stranger"])
numbers = st.sampled_from([NUMBER, NUMBER, NUMBER, NUMBER - 1, NUMBER + 1])
cohorts = st.lists(st.sampled_from(SITES), min_size=1, max_size=6, unique=True).map(tuple)
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Answered, sites, numbers),
    st.builds(Failed, sites, numbers, st.sampled_from(["out of memory", "non-finite"])),
    st.builds(DeadlinePassed, numbers),
    st.builds(Committed, numbers),
)


def opened(cohort: Sequence[str], needed: int) -> Round:
    return Round(NUMBER, tuple(cohort), needed)


def played(round: Round, told: Sequence[Event]) -> Round:
    for event in told:
        round, _ = round.apply(event)
    return round


class RoundMachine(RuleBasedStateMachine):
    """A round beside a naive account of it: the first thing heard of each invited site while the round was open."""

    @initialize(cohort=cohorts, data=st.data())
    def open(self, cohort: tuple[str, ...], data: st.DataObject) -> None:
        needed = data.draw(st.integers(1, len(cohort)))
        self.round = opened(cohort, needed)
        self.heard: dict[str, str] = {}
        self.deadline_passed = self.committed = False

    def tell(self, event: Event) -> Verdict:
        before = self.round
        self.round, verdict = before.apply(event)
        assert verdict.accepted != bool(verdict.reason)
        if not verdict.accepted:
            assert self.round == before
        assert (self.round.number, self.round.cohort, self.round.needed) == (NUMBER, before.cohort, before.needed)
        return verdict

    @property
    def expected_phase(self) -> Phase:
        answers = [*self.heard.values()].count("answered")
        silent = len(self.round.cohort) - len(self.heard)
        out_of_reach = answers + silent < self.round.needed
        if self.committed:
            return Phase.COMMITTED
        if self.deadline_passed or silent == 0 or out_of_reach:
            return Phase.CLOSED if answers >= self.round.needed else Phase.ABANDONED
        return Phase.OPEN

    def may_speak(self, site: str, number: int) -> bool:
        first = site in self.round.cohort and site not in self.heard
        return first and number == NUMBER and self.round.phase is Phase.OPEN

    @rule(site=sites, number=numbers)
    def answer(self, site: str, number: int) -> None:
        expected = self.may_speak(site, number)
        assert self.tell(Answered(site, number)).accepted == expected
        if expected:
            self.heard[site] = "answered"

    @rule(site=sites, number=numbers)
    def fail(self, site: str, number: int) -> None:
        expected = self.may_speak(site, number)
        assert self.tell(Failed(site, number, "broken")).accepted == expected
        if expected:
            self.heard[site] = "failed"

    @rule(number=numbers)
    def pass_deadline(self, number: int) -> None:
        expected = number == NUMBER and self.round.phase is Phase.OPEN
        assert self.tell(DeadlinePassed(number)).accepted == expected
        self.deadline_passed |= expected

    @rule(number=numbers)
    def commit(self, number: int) -> None:
        expected = number == NUMBER and self.round.phase is Phase.CLOSED
        assert self.tell(Committed(number)).accepted == expected
        self.committed |= expected

    @precondition(lambda self: self.round.phase is Phase.OPEN)
    @rule(data=st.data())
    def answer_one_that_is_waited_for(self, data: st.DataObject) -> None:
        self.answer(data.draw(st.sampled_from(self.round.waiting)), NUMBER)

    @invariant()
    def every_site_is_counted_once_and_by_what_came_first(self) -> None:
        counted = [*self.round.answered, *self.round.failed, *self.round.late]
        assert Counter(counted) == Counter(set(counted))
        assert set(counted) <= set(self.round.cohort)
        assert set(self.round.answered) == {s for s, how in self.heard.items() if how == "answered"}
        assert set(self.round.failed) == {s for s, how in self.heard.items() if how == "failed"}

    @invariant()
    def the_phase_follows_from_what_was_heard(self) -> None:
        assert self.round.phase is self.expected_phase

    @invariant()
    def those_waited_for_are_the_silent_ones_in_cohort_order(self) -> None:
        silent = tuple(site for site in self.round.cohort if site not in self.heard)
        assert self.round.waiting == (silent if self.round.phase is Phase.OPEN else ())
        assert self.round.late == (silent if self.deadline_passed else ())


RoundMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestRoundMachine = RoundMachine.TestCase


@quick
@given(cohorts, st.integers(1, 6), st.lists(events, max_size=30))
def test_a_closed_round_accepts_nothing_but_its_commit(cohort: tuple[str, ...], needed: int, told: list[Event]) -> None:
    closed, _ = played(opened(cohort, min(needed, len(cohort))), told).apply(DeadlinePassed(NUMBER))
    assert closed.phase is not Phase.OPEN
    for event in told:
        after, verdict = closed.apply(event)
        assert verdict.accepted == (isinstance(event, Committed) and after.phase is not closed.phase)
        if not isinstance(event, Committed):
            assert after is closed
            assert closed.phase.value in verdict.reason


@quick
@given(cohorts, st.data())
def test_the_order_of_answers_changes_only_the_order_in_which_they_are_listed(
    cohort: tuple[str, ...], data: st.DataObject
) -> None:
    fates = data.draw(st.lists(st.booleans(), min_size=len(cohort), max_size=len(cohort)))
    told: list[Event] = [
        Answered(site, NUMBER) if fate else Failed(site, NUMBER, "broken")
        for site, fate in zip(cohort, fates, strict=True)
    ]
    needed = data.draw(st.integers(1, len(cohort)))
    one, other = (played(opened(cohort, needed), order) for order in (told, data.draw(st.permutations(told))))
    assert one.phase is other.phase is (Phase.CLOSED if sum(fates) >= needed else Phase.ABANDONED)
    if one.phase is Phase.CLOSED:
        assert set(one.answered) == set(other.answered)
        assert one.failed == other.failed


@quick
@given(cohorts, st.data())
def test_a_round_is_abandoned_at_the_very_failure_that_puts_the_quorum_out_of_reach(
    cohort: tuple[str, ...], data: st.DataObject
) -> None:
    needed = data.draw(st.integers(1, len(cohort)))
    round = opened(cohort, needed)
    for failures, site in enumerate(cohort, start=1):
        round, verdict = round.apply(Failed(site, NUMBER, "broken"))
        assert verdict.accepted
        assert (round.phase is Phase.ABANDONED) == (len(cohort) - failures < needed)
        if round.phase is Phase.ABANDONED:
            break
    assert round.phase is Phase.ABANDONED


@quick
@given(st.sampled_from([Phase.OPEN, Phase.ABANDONED, Phase.COMMITTED]))
def test_only_a_closed_round_is_committed(phase: Phase) -> None:
    round = Round(NUMBER, SITES, 1, phase=phase)
    after, verdict = round.apply(Committed(NUMBER))
    assert after is round
    assert verdict == Verdict(False, f"a round that is {phase.value} cannot be committed")


def test_an_answer_after_the_round_before_names_both_rounds() -> None:
    _, verdict = opened(SITES, 1).apply(Answered("a", NUMBER - 1))
    assert verdict.reason == f"it is for round {NUMBER - 1}; round {NUMBER} is open"


@quick
@given(st.floats(1e-6, 1.0), st.integers(1, 40), st.integers(1, 10_000))
def test_as_many_are_needed_as_the_quorum_or_min_sites_says(quorum: float, min_sites: int, size: int) -> None:
    needed = answers_needed(FederationSpec(quorum=quorum, min_sites=min_sites), size)
    assert needed >= min_sites
    assert needed >= quorum * size - 1e-6
    assert needed == min_sites or needed < quorum * size + 1
    assert needed <= max(size, min_sites)


@pytest.mark.parametrize(
    ("quorum", "size", "needed"), [(0.5, 3, 2), (0.5, 4, 2), (0.1, 30, 3), (0.7, 10, 7), (0.6, 5, 3), (1.0, 7, 7)]
)
def test_a_quorum_that_is_a_whole_number_of_sites_is_that_number(quorum: float, size: int, needed: int) -> None:
    """0.1 × 30 and 0.7 × 10 are not whole in binary."""
    assert answers_needed(FederationSpec(quorum=quorum), size) == needed


# --- who is invited -----------------------------------------------------------------------------------------------

names = st.integers(1, 40).map(lambda count: tuple(f"site-{k}" for k in range(count)))
choices = st.one_of(st.just("all"), st.integers(1, 60), st.floats(0.001, 1.0).filter(lambda f: f != 1.0))
seeds, rounds = st.integers(0, 2**63 - 1), st.integers(1, 10_000)


def spec(cohort: Any, **options: Any) -> FederationSpec:
    return FederationSpec.model_validate({"cohort": cohort, **options})


def size_of(cohort: Any, count: int) -> int:
    if cohort == "all":
        return count
    return min(count, cohort) if isinstance(cohort, int) else max(1, math.ceil(cohort * count - 1e-9))


@quick
@given(names, choices, seeds, rounds)
def test_a_cohort_depends_on_the_seed_and_the_round_alone(
    all_sites: tuple[str, ...], cohort: Any, seed: int, round: int
) -> None:
    chosen = choose_cohort(all_sites, spec(cohort), seed=seed, round=round)
    assert choose_cohort(list(all_sites), spec(cohort, quorum=1.0), seed=seed, round=round) == chosen


@quick
@given(names, choices, seeds, rounds)
def test_a_cohort_has_the_size_asked_for_no_site_twice_and_keeps_their_order(
    all_sites: tuple[str, ...], cohort: Any, seed: int, round: int
) -> None:
    chosen = choose_cohort(all_sites, spec(cohort), seed=seed, round=round)
    assert len(chosen) == size_of(cohort, len(all_sites))
    assert list(chosen) == [site for site in all_sites if site in set(chosen)]


def test_other_rounds_and_other_seeds_invite_other_sites() -> None:
    many = tuple(f"site-{k}" for k in range(50))
    drawn = {choose_cohort(many, spec(10), seed=seed, round=round) for seed in range(5) for round in range(1, 11)}
    assert len(drawn) == 50


@pytest.mark.parametrize("seed", [0, 1])
def test_every_site_and_every_pair_is_invited_equally_often(seed: int) -> None:
    """χ² over 6,000 draws of 3 of 10: sampling without replacement keeps it below a χ² of the same degrees of freedom.

    The bounds are mean + 5 standard deviations (9 ± √18, and 44 ± √88).
    """
    ten, num_rounds = tuple(f"site-{k}" for k in range(10)), 6000
    single: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for round in range(1, num_rounds + 1):
        chosen = choose_cohort(ten, spec(3), seed=seed, round=round)
        single.update(chosen)
        pairs.update((a, b) for k, a in enumerate(chosen) for b in chosen[k + 1 :])
    each, each_pair = num_rounds * 3 / 10, num_rounds * 3 / 45
    assert sum((single[site] - each) ** 2 / each for site in ten) < 9 + 5 * math.sqrt(18)
    assert len(pairs) == 45
    assert sum((n - each_pair) ** 2 / each_pair for n in pairs.values()) < 44 + 5 * math.sqrt(88)


def test_more_sites_than_there_are_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"federation\.cohort asks for 5 sites, but the data has 4") as caught:
        check_cohort(4, spec(5))
    assert "cohort: all" in caught.value.hint


@pytest.mark.parametrize(("cohort", "size"), [("all", 4), (3, 3), (0.5, 2)])
def test_min_sites_beyond_the_cohort_is_refused(cohort: Any, size: int) -> None:
    with pytest.raises(RecipeError, match=rf"min_sites is 5, but a cohort has only {size} of 4 sites"):
        check_cohort(4, spec(cohort, min_sites=5))


@quick
@given(names, choices, st.floats(1e-3, 1.0), st.integers(1, 60))
def test_settings_that_are_let_through_can_be_met(
    all_sites: tuple[str, ...], cohort: Any, quorum: float, min_sites: int
) -> None:
    settings_ = spec(cohort, quorum=quorum, min_sites=min_sites)
    try:
        check_cohort(len(all_sites), settings_)
    except RecipeError:
        assert min_sites > size_of(cohort, len(all_sites)) or (isinstance(cohort, int) and cohort > len(all_sites))
        return
    chosen = choose_cohort(all_sites, settings_, seed=0, round=1)
    round = played(Round(1, chosen, answers_needed(settings_, len(chosen))), [Answered(site, 1) for site in chosen])
    assert round.phase is Phase.CLOSED
