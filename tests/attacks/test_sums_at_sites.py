"""Attacks on a site's part in secure sums, at the site: what the coordinator shows, who carries every message, is
checked before anything is answered, and nothing is answered twice over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from commonweight.errors import AccessError, PolicyError, SiteError
from commonweight.federation.groups import draw_groups
from commonweight.federation.messages import SumTask, TrainTask
from commonweight.federation.secure_rounds import Terms
from commonweight.identity.folder import IdentityFolder
from commonweight.model.tensors import NamedTensors
from commonweight.privacy.secure_aggregation.messages import SecureAggregationError
from commonweight.privacy.secure_aggregation.rows import MASKED, Most, RowCode
from commonweight.recipe.schema import Recipe
from commonweight.site.gate import KnownJob
from commonweight.site.records import SiteRecords
from commonweight.site.run_files import RunFiles
from commonweight.wire import protocol_pb2 as pb
from tests.protocol.fake_coordinator import People
from tests.protocol.federations import theta
from tests.protocol.sum_sites import sums_of, work_of

BASE = "ab" * 32
NAMES = ("site-a", "site-b", "site-c", "site-d")
TERMS = Terms(0.5, {"kind": "none"}, Most(8, 4096)).to_json()
LAYOUT = theta().layout


class Federation:
    """Sites with identities of one authority, and a coordinator that is the test."""

    def __init__(self, folder: Path, names: tuple[str, ...] = NAMES, **recipe: Any) -> None:
        self.folder, self.people = folder, People(folder)
        #: of the sites' updates
        self.scale = 1.0
        values = {"name": "x", "privacy": {"secure_aggregation": "on"}, "training": {"batch_size": 8}, **recipe}
        digest, job = hashlib.sha256(b"job").digest(), pb.Job(id="r", sites=names)
        self.job = KnownJob(job, digest, cast(Any, None), Recipe.model_validate(values), LAYOUT, 1024)
        self.identities = {name: self.people.enrol(name, "site") for name in names}
        self.records = {name: SiteRecords(folder / f"{name}.sqlite") for name in names}
        self.sums = {name: self.new(name) for name in names}

    def new(self, name: str, *, min_cohort: int = 1) -> Any:
        """A site's part, as a restarted process has it."""
        RunFiles(self.folder / name, "r").folder.mkdir(parents=True, exist_ok=True)
        return sums_of(self.folder / name, self.identities[name], self.records[name], min_cohort=min_cohort)

    def ask(self, name: str, step: str, said: Any = None, **changes: Any) -> dict[str, Any]:
        """One step of a site. Changes: `base`, `job`, and fields of the task."""
        base, job = changes.pop("base", BASE), changes.pop("job", self.job)
        values = {
            "round": 1,
            "site": name,
            "step": step,
            "attempt": 0,
            "sites": NAMES,
            "terms": TERMS,
            "said": said or {},
        }
        body = SumTask(**{**values, **changes})
        task = pb.Task(id="t", run="r", round=body.round, kind=step, base=base)
        answer: dict[str, Any] = json.loads(json.dumps(self.sums[name].answer(job, task, body)))
        return answer

    def keys(self, **changes: Any) -> dict[str, Any]:
        return {name: self.ask(name, "keys", **changes) for name in NAMES}

    def boxes(self, keys: dict[str, Any], **changes: Any) -> dict[str, dict[str, str]]:
        """What each site gets of the others' shares."""
        handed = {name: self.ask(name, "shares", keys, **changes)["boxes"] for name in NAMES}
        return {name: {peer: handed[peer][name] for peer in NAMES if peer != name} for name in NAMES}

    def mask(self, name: str, boxes: dict[str, str], **changes: Any) -> NamedTensors:
        terms = changes.pop("terms", TERMS)
        secure = {"attempt": changes.pop("attempt", 0), "sites": list(NAMES), "terms": terms, "boxes": boxes}
        body = TrainTask(1, name, 0.5, 1, secure=secure)
        task = pb.Task(id="t", run="r", round=1, kind="train", base=BASE)
        work = work_of(name, 1, LAYOUT)
        for _, flat in work.channels["delta"].floating():
            flat.mul_(self.scale)
        masked = self.sums[name].mask(self.job, task, replace(body, **changes), work)
        found: NamedTensors = masked.channels[MASKED]
        return found

    def up_to_rows(self) -> None:
        for name, boxes in self.boxes(self.keys()).items():
            self.mask(name, boxes)

    def consents(self, survivors: tuple[str, ...] = NAMES) -> dict[str, str]:
        return {n: self.ask(n, "consent", {"survivors": list(survivors)})["signature"] for n in survivors}


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


# ---- keys


def enrolled_again(federation: Federation, name: str) -> IdentityFolder:
    """Somebody who has the authority's ear gets a certificate in a site's name, over a key of his own."""
    (federation.folder / "identities" / f"site-{name}").rename(federation.folder / "first")
    return federation.people.enrol(name, "site")


def test_a_key_that_was_swapped_since_it_was_first_seen_is_refused(federation: Federation) -> None:
    """Even where the authority itself helps: the coordinator's machine may hold it."""
    federation.boxes(federation.keys())
    federation.identities["site-b"] = enrolled_again(federation, "site-b")
    federation.records["site-b"] = SiteRecords(federation.folder / "other.sqlite")
    federation.sums["site-b"] = federation.new("site-b")
    keys = federation.keys(round=2)
    with pytest.raises(AccessError, match=r"site site-b shows the signing key \w+, before \w+") as refused:
        federation.ask("site-a", "shares", keys, round=2)
    assert "site peers DIR --forget site-b" in refused.value.hint
    assert "site-b" in federation.records["site-a"].alarms()[0][1]
    federation.records["site-a"].forget_peer("site-b")
    assert set(federation.ask("site-a", "shares", keys, round=2)["boxes"]) == set(NAMES[1:])


def test_keys_under_a_certificate_of_another_authority_are_refused(federation: Federation, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = People(tmp_path / "elsewhere").enrol("site-b", "site")
    keys = federation.keys()
    keys["site-b"]["certificate"] = other.certificate.decode()
    with pytest.raises(AccessError, match="not issued by this authority"):
        federation.ask("site-a", "shares", keys)


@pytest.mark.parametrize("of", ["site-c", "lena"])
def test_keys_under_the_certificate_of_somebody_else_are_refused(federation: Federation, of: str) -> None:
    lead = federation.people.enrol("lena", "lead")
    keys = federation.keys()
    certificate = lead.certificate if of == "lena" else federation.identities[of].certificate
    keys["site-b"]["certificate"] = certificate.decode()
    with pytest.raises(AccessError, match=f"come with the certificate of (site|lead) '{of}'"):
        federation.ask("site-a", "shares", keys)


def test_keys_that_their_site_did_not_sign_are_refused(federation: Federation) -> None:
    keys = federation.keys()
    keys["site-b"]["pair"] = keys["site-c"]["channel"][::-1]
    with pytest.raises(SecureAggregationError, match="not signed by its identity"):
        federation.ask("site-a", "shares", keys)


# ---- being told different things


def with_terms(**changes: Any) -> dict[str, Any]:
    return {"terms": {**TERMS, **changes}}


@pytest.mark.parametrize(
    "told",
    [
        with_terms(lr=0.0),  # the others would send nothing, and the sum be the victim's update
        with_terms(most={"examples": 10**9, "label_tokens": 4096}),  # the others' would be rounded away
        with_terms(correction={"kind": "prox", "mu": 1e9}),
        {"base": "cd" * 32},
        {"sites": (*NAMES[1:], NAMES[0])},
        {"attempt": 1},
    ],
    ids=["lr", "weights", "correction", "base", "order", "attempt"],
)
def test_sites_that_were_told_different_things_go_no_further(federation: Federation, told: dict[str, Any]) -> None:
    keys = {name: federation.ask(name, "keys", **({} if name == "site-a" else told)) for name in NAMES}
    with pytest.raises(SecureAggregationError, match="not signed by its identity"):
        federation.ask("site-a", "shares", keys)


def test_another_job_is_another_sum(federation: Federation) -> None:
    other = replace(federation.job, digest=hashlib.sha256(b"another").digest())
    keys = {name: federation.ask(name, "keys", **({} if name == "site-a" else {"job": other})) for name in NAMES}
    with pytest.raises(SecureAggregationError, match="not signed by its identity"):
        federation.ask("site-a", "shares", keys)


@pytest.mark.parametrize(
    "change", [{"lr": 0.0}, {"correction": {"kind": "prox", "mu": 1.0}}, {"start": {"kind": "best"}}]
)
def test_a_training_task_other_than_the_terms_is_refused(federation: Federation, change: dict[str, Any]) -> None:
    boxes = federation.boxes(federation.keys())
    with pytest.raises(SiteError, match="another than what the sites of the secure sum were told"):
        federation.mask("site-a", boxes["site-a"], **change)


def test_terms_other_than_those_that_were_signed_are_refused(federation: Federation) -> None:
    boxes = federation.boxes(federation.keys())
    with pytest.raises(SecureAggregationError, match="another session"):
        federation.mask("site-a", boxes["site-a"], terms={**TERMS, "most": {"examples": 9, "label_tokens": 4096}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sites": NAMES[:2]}, "fewer than 3"),
        ({"sites": (*NAMES, "stranger")}, "'stranger' too, whom the signed job does not name"),
        ({"sites": NAMES[1:]}, "not invited"),
        ({"site": "site-b"}, "not about this site's step"),
        ({"terms": {"lr": float}}, "malformed"),
    ],
)
def test_sums_that_make_no_sense_are_refused(federation: Federation, change: dict[str, Any], words: str) -> None:
    with pytest.raises(SiteError, match=words):
        federation.ask("site-a", "keys", **change)


def test_a_job_without_secure_sums_has_none(tmp_path: Path) -> None:
    federation = Federation(tmp_path, privacy={"secure_aggregation": "off"})
    with pytest.raises(SiteError, match="the signed job has no secure sums"):
        federation.ask("site-a", "keys")


def test_the_sites_own_policy_bounds_how_few_are_in_a_sum(federation: Federation) -> None:
    federation.sums["site-a"] = federation.new("site-a", min_cohort=5)
    with pytest.raises(PolicyError, match="min_cohort is 5; the secure sum would be of 4 sites"):
        federation.ask("site-a", "keys")
    federation.sums["site-a"] = federation.new("site-a", min_cohort=4)
    federation.up_to_rows()
    with pytest.raises(PolicyError, match="would be of 3 sites"):
        federation.ask("site-a", "consent", {"survivors": list(NAMES[:3])})


# ---- opening


def test_a_forged_or_a_second_list_of_survivors_opens_nothing(federation: Federation) -> None:
    federation.up_to_rows()
    signatures = federation.consents()
    with pytest.raises(SecureAggregationError, match="another list of survivors before"):
        federation.ask("site-a", "consent", {"survivors": list(NAMES[:3])})
    federation.sums["site-a"] = federation.new("site-a")
    with pytest.raises(SecureAggregationError, match="another list of survivors before"):
        federation.ask("site-a", "consent", {"survivors": list(NAMES[:3])})
    forged = {**signatures, "site-b": "00" * 64, "site-c": signatures["site-a"]}
    with pytest.raises(SecureAggregationError, match="2 sites have signed"):
        federation.ask("site-a", "reveal", forged)
    shares = federation.ask("site-a", "reveal", signatures)
    assert set(shares["own"]) == set(NAMES)
    assert not shares["pair"]


def test_no_answer_holds_both_shares_of_one_site(federation: Federation) -> None:
    """Lost to some, alive to others: together the two kinds of share would open a row."""
    federation.up_to_rows()
    signatures = federation.consents(NAMES[:3])
    first = federation.ask("site-a", "reveal", signatures)
    assert (set(first["own"]), set(first["pair"])) == (set(NAMES[:3]), {"site-d"})
    federation.sums["site-a"] = federation.new("site-a")
    assert federation.ask("site-a", "reveal", signatures) == first
    for step, said in (("consent", {"survivors": list(NAMES)}), ("shares", {})):
        with pytest.raises(SiteError):
            federation.ask("site-a", step, said)


def test_who_has_helped_to_open_a_sum_takes_part_in_no_other_of_that_round(federation: Federation) -> None:
    federation.up_to_rows()
    federation.ask("site-a", "reveal", federation.consents())
    with pytest.raises(AccessError, match="has helped to open attempt 0"):
        federation.ask("site-a", "keys", attempt=1)
    federation.ask("site-b", "keys", attempt=1)
    federation.ask("site-a", "keys", round=2)
    with pytest.raises(AccessError, match="took part in a later one"):
        federation.ask("site-b", "keys")


# ---- killed in between


@pytest.mark.parametrize("step", ["keys", "shares", "train", "consent", "reveal"])
def test_a_site_that_was_killed_says_the_same_again(federation: Federation, step: str) -> None:
    def again(answer: Callable[[], Any]) -> Any:
        first = answer()
        federation.sums["site-a"] = federation.new("site-a")
        assert answer() == first

    keys = federation.keys()
    if step == "keys":
        again(lambda: federation.ask("site-a", "keys"))
    if step == "shares":
        again(lambda: federation.ask("site-a", "shares", keys))
        federation.sums["site-a"] = federation.new("site-a")
    boxes = federation.boxes(keys)
    rows = {name: federation.mask(name, boxes[name]) for name in NAMES}
    if step == "train":
        federation.sums["site-a"] = federation.new("site-a")
        assert federation.mask("site-a", boxes["site-a"]).digest() == rows["site-a"].digest()
        with pytest.raises(SecureAggregationError, match="other shares before"):
            federation.mask("site-a", {peer: boxes["site-a"][peer] for peer in NAMES[1:3]})
    signatures = federation.consents()
    if step == "consent":
        again(lambda: federation.ask("site-a", "consent", {"survivors": list(NAMES)}))
    again(lambda: federation.ask("site-a", "reveal", signatures))


def test_one_row_leaves_under_one_set_of_masks(federation: Federation) -> None:
    records = federation.records["site-a"]
    federation.ask("site-a", "keys")
    records.send_row("r", 1, 0, "one")
    records.send_row("r", 1, 0, "one")
    with pytest.raises(AccessError, match="another masked update has left"):
        records.send_row("r", 1, 0, "two")
    with pytest.raises(AccessError, match="another masked update"):
        records.send_row("r", 1, 7, "one")


def test_secrets_do_not_outlive_their_attempt(federation: Federation) -> None:
    records = federation.records["site-a"]
    federation.ask("site-a", "keys")
    assert records.sum_state("r", 1, 0)
    federation.ask("site-a", "keys", attempt=1)
    assert records.sum_state("r", 1, 0) is None
    records.erase_sums("r")
    assert records.sum_state("r", 1, 1) is None


# ---- groups

SIX = tuple(f"site-{letter}" for letter in "abcdef")
GROUPED = {"privacy": {"secure_aggregation": "on", "secure_group_size": 3}, "federation": {"strategy": "median"}}
GROUPED_TERMS = {**TERMS, "cohort": list(SIX)}


MINE, OTHERS = draw_groups(SIX, 3, seed=0, round=1)


@pytest.fixture
def grouped(tmp_path: Path) -> Federation:
    return Federation(tmp_path, names=SIX, **GROUPED)


def test_a_site_goes_along_with_the_group_that_the_seed_gives_it(grouped: Federation) -> None:
    keys = {name: grouped.ask(name, "keys", sites=MINE, terms=GROUPED_TERMS) for name in MINE}
    boxes = grouped.ask("site-a", "shares", keys, sites=MINE, terms=GROUPED_TERMS)["boxes"]
    assert set(boxes) == set(MINE) - {"site-a"}


def test_a_coordinator_does_not_choose_who_is_summed_with_whom(grouped: Federation) -> None:
    """A victim among confederates of the coordinator's would have its update read off the sum."""
    swapped = tuple(sorted(("site-a", *MINE[1:2], *OTHERS[:1])))
    for sites in (swapped, SIX, MINE[:2]):
        with pytest.raises(SiteError, match="not of the sites that the recipe's seed puts together"):
            grouped.ask("site-a", "keys", sites=sites, terms=GROUPED_TERMS)
    # nor by leaving out the cohort, or by naming it in another order
    with pytest.raises(SiteError, match="not of the sites"):
        grouped.ask("site-a", "keys", sites=swapped, terms=TERMS | {"cohort": [*swapped, *set(SIX) - set(swapped)]})
    with pytest.raises(SiteError, match="whom the signed job does not name"):
        grouped.ask("site-a", "keys", sites=MINE, terms={**TERMS, "cohort": [*SIX, "stranger"]})


def test_members_that_were_told_different_cohorts_go_no_further(tmp_path: Path) -> None:
    """Who else is in the round decides who is with whom: it is signed too, even where the group would be the same."""
    seven = (*SIX, "site-g")
    federation = Federation(tmp_path, names=seven, **GROUPED)
    round, mine = next(
        (round, group)
        for round in range(1, 1000)
        for group in draw_groups(SIX, 3, seed=0, round=round)
        if "site-a" in group and group in draw_groups(seven, 3, seed=0, round=round)
    )
    told = {name: {"sites": mine, "round": round, "terms": GROUPED_TERMS} for name in mine}
    told[mine[-1]]["terms"] = {**TERMS, "cohort": list(seven)}
    keys = {name: federation.ask(name, "keys", **told[name]) for name in mine}
    with pytest.raises(SecureAggregationError, match="not signed by its identity"):
        federation.ask("site-a", "shares", keys, **told["site-a"])


# ---- noise of the sites


OWN_NOISE = {
    "privacy": {
        "dp": "site",
        "clip": 1.0,
        "delta": 1e-5,
        "noise_multiplier": 2.0,
        "mechanism": "distributed-discrete",
        "secure_aggregation": "on",
    },
    "federation": {"weighting": "uniform"},
}


def test_a_row_that_is_made_again_has_the_same_noise_and_another_updates_row_has_other(tmp_path: Path) -> None:
    """What is sent twice could otherwise be told from its noise: two noises on one update, or one noise on two."""
    federation = Federation(tmp_path, **OWN_NOISE)
    boxes = federation.boxes(federation.keys())
    first = federation.mask("site-a", boxes["site-a"])
    federation.sums["site-a"] = federation.new("site-a")
    again = federation.mask("site-a", boxes["site-a"])
    assert torch.equal(first["row"], again["row"])
    federation.sums["site-a"] = federation.new("site-a")
    federation.scale = 1.001
    other = federation.mask("site-a", boxes["site-a"])
    code = RowCode.of(federation.job.recipe, LAYOUT, 4, Most(8, 4096))
    assert code.noise is not None
    # the masks are the same: what remains is the difference of two noises, where the updates differ by next to nothing
    difference = (other["row"] - first["row"]).double()
    assert float(difference.std()) > code.noise.sigma


def test_a_job_whose_noise_counts_on_secure_sums_is_held_to_them(tmp_path: Path) -> None:
    """Whatever the job says of secure sums, or leaves to the coordinator."""
    values = {**OWN_NOISE, "privacy": {**OWN_NOISE["privacy"], "secure_aggregation": "auto"}}
    assert Federation(tmp_path, **values).job.secure
