"""What a site lets happen: its `policy.yaml`, and the decision on every job, task and byte.

Nothing is implicit. Every field must be in the file; an empty list allows nothing; a file that is missing, damaged or
has a key that this version does not know denies everything. The decision is made at the site, from the signed job and
the site's own records, and what a coordinator says cannot widen it. Making any field stricter never allows what was
denied before.

    Policy      what policy.yaml says          JobFacts   what a signed job asks for
    Spent       what has happened already      Decision   allowed or not, each refusal a sentence
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Field

from ..codec.common import common_numbers
from ..errors import PolicyError, RecipeError
from ..evaluate.metrics import Scores
from ..federation.messages import SUM_STEPS
from ..federation.private_rounds import NOISY_STEPS, spends_of
from ..identity.roles import SIGNING_ROLES
from ..model.shapes import shapes_of
from ..privacy.accounting import Releases, epsilon, noise_multiplier
from ..privacy.secure_aggregation.rows import row_layout
from ..privacy.site_level import participations, planned_noise
from ..privacy.spending import UNPROTECTED, Budget, Spend, unit_of
from ..recipe.schema import Recipe, Section
from ..registry import BUILT_IN, built_in, is_listed, resolve
from ..strategies.base import Strategy
from ..wire.frames import parse_header
from .settings import NAME, POLICY_FILE, parse_section

ANY = "any"

#: the job's handshake entry that names its base model
BASE_WEIGHTS = "base weights"

#: how many entries of a list a refusal names
_LISTED = 5

_HEX = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(NAME)
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def _bytes(value: object) -> object:
    """`64 MiB` as a number of bytes; anything but text is left to the type's own check."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)", value)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{value!r} is no number of bytes; write 67108864 or 64 MiB (units: {', '.join(_UNITS)})")
    return int(Decimal(match[1]) * _UNITS[match[2]])


def _any_alone(values: list[str]) -> list[str]:
    if ANY in values and len(values) > 1:
        raise ValueError(f"`{ANY}` stands alone: beside it the other entries would change nothing")
    return values


def _models(values: list[str]) -> list[str]:
    for value in values:
        if value != ANY and not _HEX.fullmatch(value):
            raise ValueError(f"{value!r} is neither a digest (64 hex digits, small letters) nor `{ANY}`")
    return _any_alone(values)


def _signers(values: list[str]) -> list[str]:
    for value in values:
        if not _HEX.fullmatch(value) and not _NAME.fullmatch(value):
            raise ValueError(f"{value!r} is neither a name, nor a signing key (64 hex digits), nor `{ANY}`")
    return _any_alone(values)


def _relays(values: list[str]) -> list[str]:
    for value in values:
        if value != ANY and not _NAME.fullmatch(value):
            raise ValueError(f"{value!r} is neither a relay's name nor `{ANY}`")
    return _any_alone(values)


def _methods(values: list[str]) -> list[str]:
    if ANY in values:
        raise ValueError(f"`{ANY}` would let a job run whatever code is installed; list `{BUILT_IN}` and exact names")
    return values


def _not_blank(values: list[str]) -> list[str]:
    if any(not value.strip() for value in values):
        raise ValueError("an entry is blank")
    return values


Bytes = Annotated[int, BeforeValidator(_bytes)]
Methods = Annotated[list[str], AfterValidator(_not_blank), AfterValidator(_methods)]


class PrivacyRules(Section):
    """The least privacy that a job must have."""

    dp_required: bool = Field(description="Only jobs with differential privacy.")
    max_epsilon: float | None = Field(
        gt=0, description="Only jobs that state an ε of at most so much. Null: no bound, and none need be stated."
    )
    budget: Budget | None = Field(
        description="What this site's updates of all runs together may cost: `{unit: site, epsilon: 8, delta: 1e-5}`; "
        "an update without differential privacy costs ∞. Null: no bound."
    )
    secure_aggregation_required: bool = Field(
        description="Only jobs in which the coordinator learns sums of updates and no single one."
    )
    own_noise_required: bool = Field(
        description="Only jobs in which the sites add the noise themselves, and trust no coordinator to: privacy of "
        "examples, or of sites with mechanism distributed-discrete."
    )


class ShareRules(Section):
    """What may leave of this site's held-out rows. Counts of examples and the mean training loss always leave."""

    scores: Literal["rows", "total", "none"] = Field(
        description="`rows`: each row's loss and counts; `total`: their sums; `none`: evaluation is refused."
    )
    samples: bool = Field(description="Whether the model's answers to held-out prompts may leave.")


class Policy(Section):
    """What a site lets happen. Every field must be given."""

    models: Annotated[list[str], AfterValidator(_models)] = Field(
        description="Base models: SHA-256 of their weights in hex, or `any` alone."
    )
    signers: Annotated[list[str], AfterValidator(_signers)] = Field(
        description="Who may submit jobs: names, or Ed25519 keys in hex, or `any` alone."
    )
    kinds: list[Literal["train", "evaluate"]] = Field(
        description="`train`: local training whose updates leave. `evaluate`: scoring models on held-out rows."
    )
    purposes: Annotated[list[str], AfterValidator(_not_blank), AfterValidator(_any_alone)] = Field(
        description="What the data may be used for, in the job's own words, or `any` alone."
    )
    strategies: Methods = Field(description="`built-in`, and exact names of others.")
    objectives: Methods = Field(
        description="`built-in`, and exact names of others: code that runs on this site's rows."
    )
    relays: Annotated[list[str], AfterValidator(_relays)] = Field(
        description="Relays that may have this site's update, which they see before they add it to others': names, or "
        "`any` alone. Past one that is not listed, the update goes to the coordinator."
    )
    min_cohort: int = Field(
        ge=1,
        description="A round must combine the updates of at least so many sites; where secure sums are made in "
        "groups, each group must.",
    )
    max_rounds: int = Field(ge=0, description="Rounds of one run.")
    max_bytes_per_round: Bytes = Field(
        ge=0, description="Bytes that may leave in one round of a run, whatever is sent again included."
    )
    max_bytes_total: Bytes = Field(ge=0, description="Bytes that may ever leave, in all runs together.")
    privacy: PrivacyRules = Field(description="The least privacy that a job must have.")
    remote_code: Literal[False] = Field(description="Always false: code from a model's folder is never run.")
    approval: Literal["none", "first-run", "every-run"] = Field(
        description="Whether a person at the site must approve a run: never, a signer's first, or every one."
    )
    share: ShareRules = Field(description="What may leave of held-out rows.")

    @property
    def digest(self) -> str:
        """SHA-256 in hex of what the policy says: comments, order and spelling of numbers do not count."""
        values = {key: sorted(v) if isinstance(v, list) else v for key, v in self.model_dump(mode="json").items()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_policy(folder: Path) -> Policy:
    """The policy of a site's folder.

    Raises:
        PolicyError: it is missing, unreadable, writable by everyone, or wrong in any way: everything is denied.
    """
    return PolicyFile(folder / POLICY_FILE).current()


class PolicyFile:
    """A policy file that is read again whenever it changes, so that a change takes effect at the next task."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: tuple[bytes, Policy] | None = None

    def current(self) -> Policy:
        """What the file says now. It is small: its bytes are read each time, and parsed when they differ.

        Raises:
            PolicyError: as `load_policy`; what the file said before no longer counts.
        """
        raw = self._raw()
        if self._known is None or self._known[0] != raw:
            try:
                self._known = raw, parse_section(Policy, raw, self.path)
            except RecipeError as error:
                raise _denied(error.message, error.hint) from error
        return self._known[1]

    def _raw(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_mode & stat.S_IWOTH:
                    raise _denied("this site's policy can be written by every user", f"chmod o-w {self.path}")
                return file.read()
        except FileNotFoundError:
            hint = f"{self.path} is missing; docs/site.md has one to start from"
            raise _denied("this site has no policy", hint) from None
        except OSError as error:
            what = f"this site's policy cannot be read: {error.strerror}"
            raise _denied(what, f"check the permissions of {self.path}") from None


def _denied(message: str, hint: str) -> PolicyError:
    """The message may be told to others: it names no path."""
    return PolicyError(f"{message}; until that is mended this site denies everything", hint=hint)


def policy_text(policy: Policy) -> str:
    """The policy as YAML that loads to an equal one."""
    return yaml.safe_dump(policy.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=1_000_000)


@dataclass(frozen=True)
class JobFacts:
    """What a job asks of a site, from its signed text alone.

    Args:
        signer, signer_key, signer_role: name, Ed25519 key (hex) and role in the certificate that signed it; the caller
            has verified both.
        model: digest of the base weights, "" if the job states none.
        min_cohort: answers without which a round is abandoned, however few sites join: `federation.min_sites`. The
            quorum's share does not count here, since it is a share of whoever happens to take part.
        update_bytes: of one round's update.
        evaluation: whether models are to be scored on held-out rows.
        samples: held-out prompts that the run wants answered, over all its sites.
        dp: `none`, or the unit that is protected.
        epsilon: what the job states; None: no bound (∞).
        num_sites: sites that the job names; 0: every enrolled site.
        spend: what a round costs this site, if the coordinator does as the job says. With privacy of examples or groups
            that depends on the site's rows: until it has joined, it is what the job promises at most.
        participations: rounds in which this site takes part at most; None: all.
        separation: of so many rounds in a row this site takes part in one at most.
        secure_group_size: the fewest sites whose updates are summed before somebody sees the sum, where that is not all
            of a round's.
        own_noise: the site adds the noise that protects it.
    """

    run: str
    name: str
    kind: str
    signer: str
    signer_key: str
    signer_role: str
    model: str
    purpose: str
    rounds: int
    min_cohort: int
    strategy: str
    objective: str
    update_bytes: int
    evaluation: bool
    samples: int
    dp: str
    epsilon: float | None
    secure_aggregation: bool
    trust_remote_code: bool
    num_sites: int
    spend: Spend = UNPROTECTED
    participations: int | None = None
    separation: int = 1
    secure_group_size: int | None = None
    own_noise: bool = False

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        *,
        run: str,
        kind: str,
        purpose: str,
        signer: str,
        signer_key: str,
        signer_role: str,
        must_match: Mapping[str, str],
        initial: bytes,
        num_sites: int,
        site: str = "",
    ) -> Self:
        """The facts of a job.

        Args:
            must_match, initial: the job's fields of these names.
            num_sites: sites that the job names; 0: it asks every enrolled site.
            site: this site's enrolled name: it may send less than others.

        Raises:
            Refused: `initial` is no frame's header.
            RecipeError: it has no such part of the adapter as the recipe gives this site.
        """
        strategy = recipe.federation.strategy.name
        return cls(
            run=run,
            name=recipe.name,
            kind=kind,
            signer=signer,
            signer_key=signer_key.lower(),
            signer_role=signer_role,
            model=must_match.get(BASE_WEIGHTS, ""),
            purpose=purpose,
            rounds=recipe.federation.rounds,
            min_cohort=recipe.federation.min_sites,
            strategy=strategy,
            objective=recipe.training.objective.name,
            update_bytes=_update_bytes(recipe, initial, site),
            evaluation=True,  # every run ends with the result's scores
            samples=recipe.evaluation.samples,
            dp=unit_of(recipe.privacy),
            epsilon=_planned_epsilon(recipe),
            secure_aggregation=recipe.privacy.summed,
            trust_remote_code=recipe.model.trust_remote_code,
            num_sites=num_sites,
            spend=_promised(recipe),
            participations=participations(recipe),
            separation=recipe.privacy.mechanism.separation,
            secure_group_size=recipe.privacy.secure_group_size,
            own_noise=recipe.privacy.own_noise,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        spend = {"spend": Spend.from_json(values["spend"])} if "spend" in values else {}
        return cls(**{**values, **spend})

    def summary(self) -> str:
        """What a person who approves the run is shown, in lines."""
        epsilon = "∞" if self.epsilon is None else f"{self.epsilon:g}"
        return "\n".join(
            [
                f"run {self.run} ({self.name}): {self.kind}, purpose {self.purpose or 'not stated'}",
                f"signed by {self.signer} ({self.signer_role}, key {self.signer_key})",
                f"base model {self.model or 'not stated'}",
                f"{self.rounds} rounds of {self.strategy} / {self.objective}; a round combines at least "
                f"{self.min_cohort} of {self.num_sites or 'all enrolled'} sites",
                f"up to {size(self.update_bytes)} leave in a round; {self.samples} sample prompts in all",
                f"differential privacy: {self.dp}, ε = {epsilon}{self._whose_noise}; secure aggregation: "
                f"{'yes' if self.secure_aggregation else 'no'}"
                + (f", in groups of at least {self.secure_group_size}" if self.secure_group_size else ""),
            ]
        )

    @property
    def _whose_noise(self) -> str:
        if self.dp == "none":
            return ""
        return f", noise added by {'the site itself' if self.own_noise else 'the coordinator'}"


def _planned_epsilon(recipe: Recipe) -> float | None:
    """ε of all the job's rounds at its own δ; None: ∞.

    Of examples or groups it is the one that the job promises, to which this site calibrates its own noise. A job that
    gives the noise instead promises none: what that costs depends on the size of the site.
    """
    spec = recipe.privacy
    if spec.dp == "none":
        return None
    if spec.noisy_steps:
        return spec.epsilon
    assert spec.delta is not None
    plan = Releases(planned_noise(recipe), participations(recipe), discrete=spec.mechanism.at_sites)
    found = epsilon(plan, spec.delta)
    return found if found < math.inf else None


def _promised(recipe: Recipe) -> Spend:
    """What a round costs a site of whose rows nothing is known."""
    spec = recipe.privacy
    if not spec.noisy_steps:
        return spends_of(recipe, [""])[""]
    if spec.epsilon is not None:
        assert spec.delta is not None
        # Gaussian releases, one a round, that cost as much together
        z = noise_multiplier(spec.epsilon, spec.delta, count=recipe.federation.rounds)
        return Spend(unit_of(spec), NOISY_STEPS, z)
    assert spec.noise_multiplier is not None
    if recipe.training.steps is None:
        return UNPROTECTED  # as many steps as the site's size makes of an epoch
    return Spend(unit_of(spec), NOISY_STEPS, spec.noise_multiplier, count=recipe.training.steps)


def _update_bytes(recipe: Recipe, initial: bytes, site: str) -> int:
    """Bytes of one update: a copy of the site's tensors for each channel that the strategy's updates carry; a masked
    one is a row of the ring.

    The code of a strategy that is not built in is not loaded before the policy has allowed it: a channel is counted for
    each that the global tensors have.
    """
    plan, strategy = parse_header(initial).plan, recipe.federation.strategy.name
    if recipe.privacy.summed:
        return row_layout(plan.layout, common_numbers(recipe, plan.layout, 0)).num_bytes
    shape = shapes_of(recipe.model.adapter, plan.layout).get(site)
    num_channels = len(plan.channels)
    if strategy in built_in("strategy"):
        found: type[Strategy] = resolve("strategy", strategy)
        num_channels = len(found.update_channels)
    return num_channels * (plan.layout if shape is None else shape.layout).num_bytes


def allows_relay(policy: Policy, relay: str) -> bool:
    """Whether this site's update may go to the relay of this name."""
    return policy.relays == [ANY] or relay in policy.relays


@dataclass(frozen=True)
class Spent:
    """What has happened already (`SiteRecords.spent` knows it).

    Args:
        bytes_round, bytes_run, bytes_total: that have left: in the round at hand, in its run, and ever.
        rounds: other rounds of the run that this site took part in.
        runs: other runs that this site took part in.
        runs_of_signer: those of them whose jobs the same key signed.
        nearest: rounds between the round at hand and the nearest other of the run that this site took part in.
        spends_run, spends_others: of privacy, by updates that left: in other rounds of the run, and in other runs.
        approval: what a person said about the run: `pending`, `approved`, `denied`; None: nobody was asked.
    """

    bytes_round: int = 0
    bytes_run: int = 0
    bytes_total: int = 0
    rounds: int = 0
    runs: int = 0
    runs_of_signer: int = 0
    nearest: int | None = None
    spends_run: tuple[Spend, ...] = ()
    spends_others: tuple[Spend, ...] = ()
    approval: str | None = None


@dataclass(frozen=True)
class Decision:
    """What the policy says.

    Args:
        allowed: no rule is against it.
        reasons: a sentence for each rule that is: the rule, its limit, what was asked.
        needs_approval: no rule is against it, but a person must approve the run first.
        withheld: what the job wants of this site and will not get, although it may go on without.
    """

    allowed: bool
    reasons: list[str]
    needs_approval: bool = False
    withheld: tuple[str, ...] = ()

    @property
    def clear(self) -> bool:
        """Whether work may begin now."""
        return self.allowed and not self.needs_approval

    @property
    def text(self) -> str:
        """Every reason, as one line for logs and for the coordinator."""
        return "; ".join(self.reasons)

    def enforce(self) -> None:
        """Raise PolicyError with the reasons, unless work may begin now."""
        if not self.allowed:
            raise PolicyError(f"this site's policy does not allow it: {self.text}", hint=_LEAD_HINT)
        if self.needs_approval:
            raise PolicyError(
                "a person at this site must approve the run first", hint="commonweight site approve DIR RUN"
            )


_LEAD_HINT = "the lead may submit another job; only the site's owner can change its policy.yaml"


def decide(policy: Policy, facts: JobFacts, spent: Spent) -> Decision:
    """Whether this site takes part in a job, before any of it is touched."""
    return _decision(policy, facts, spent, list(_job_reasons(policy, facts, spent)))


def decide_task(
    policy: Policy, facts: JobFacts, kind: str, round: int, cohort_size: int | None, spent: Spent
) -> Decision:
    """Whether this site takes on one task of a job; everything about the job is decided anew.

    Args:
        kind: join, train, evaluate, chain or sample; keys, shares, consent or reveal.
        round: the task's; 0 for those outside a round.
        cohort_size: sites invited to the round, None if it is not known.
    """
    reasons = [*_job_reasons(policy, facts, spent), *_task_reasons(policy, facts, kind, round, cohort_size, spent)]
    return _decision(policy, facts, spent, reasons)


def decide_sending(policy: Policy, what: str, num_bytes: int, spent: Spent, spend: Spend = UNPROTECTED) -> Decision:
    """Whether so many bytes more may leave now.

    Args:
        what: update, masks (keys and shares of a secure sum), scores, samples, or facts.
        spend: what an update costs.
    """
    reasons = []
    if what not in ("update", "masks", "scores", "samples", "facts"):
        reasons.append(f"only updates, their masks, scores, samples and facts may leave; asked: {what!r}")
    if num_bytes < 0:
        reasons.append(f"no fewer than 0 bytes can leave; asked: {num_bytes}")
    reasons += _over("max_bytes_per_round", policy.max_bytes_per_round, spent.bytes_round, num_bytes, "in this round")
    reasons += _over("max_bytes_total", policy.max_bytes_total, spent.bytes_total, num_bytes, "in all runs")
    if what in ("update", "masks") and "train" not in policy.kinds:
        reasons.append(f"kinds: {_listed(policy.kinds)}; an update comes of training, which is not among them")
    if what == "update":
        reasons += _over_budget(policy, [*spent.spends_others, *spent.spends_run], spend)
    if what in ("scores", "samples") and "evaluate" not in policy.kinds:
        reasons.append(f"kinds: {_listed(policy.kinds)}; {what} come of evaluation, which is not among them")
    if what == "scores" and policy.share.scores == "none":
        reasons.append("share.scores is none: no scores of held-out rows leave")
    if what == "samples" and not policy.share.samples:
        reasons.append("share.samples is false: no answers to held-out prompts leave")
    return Decision(not reasons, reasons)


def _decision(policy: Policy, facts: JobFacts, spent: Spent, reasons: list[str]) -> Decision:
    unknown = spent.runs_of_signer == 0 or spent.approval == "pending"  # a question once put waits for its answer
    asks = policy.approval == "every-run" or (policy.approval == "first-run" and unknown)
    open_question = asks and spent.approval != "approved"
    return Decision(not reasons, reasons, not reasons and open_question, tuple(_withheld(policy, facts)))


def _job_reasons(policy: Policy, facts: JobFacts, spent: Spent) -> Iterator[str]:
    yield from _who(policy, facts, spent)
    yield from _what(policy, facts)
    yield from _code(policy, facts)
    yield from _how_much(policy, facts, spent)
    yield from _privacy(policy.privacy, facts)
    if facts.kind == "train":
        times = facts.rounds if facts.participations is None else facts.participations
        whole = replace(facts.spend, count=facts.spend.count * times)
        yield from _over_budget(policy, spent.spends_others, whole, "in all the job's rounds: ")


def _who(policy: Policy, facts: JobFacts, spent: Spent) -> Iterator[str]:
    if spent.approval == "denied":
        yield "a person at this site has denied this run"
    if facts.signer_role not in SIGNING_ROLES:
        yield f"a job is signed by a {' or '.join(SIGNING_ROLES)}; this one by a {facts.signer_role or 'nobody'}"
    if policy.signers != [ANY] and not {facts.signer, facts.signer_key} & set(policy.signers):
        yield f"signers: {_listed(policy.signers)}; the job is signed by {facts.signer!r} (key {facts.signer_key})"


def _what(policy: Policy, facts: JobFacts) -> Iterator[str]:
    if facts.kind not in policy.kinds:
        yield f"kinds: {_listed(policy.kinds)}; the job is of kind {facts.kind!r}"
    if not facts.model:
        yield "models: a job must state the digest of its base weights; this one does not"
    elif policy.models != [ANY] and facts.model not in policy.models:
        yield f"models: {_listed(policy.models)}; the job is for the base weights {facts.model}"
    if policy.purposes != [ANY] and facts.purpose not in policy.purposes:
        yield f"purposes: {_listed(policy.purposes)}; the job's purpose is {facts.purpose or 'not stated'!r}"


def _code(policy: Policy, facts: JobFacts) -> Iterator[str]:
    for kind, field, name, listed in (
        ("strategy", "strategies", facts.strategy, policy.strategies),
        ("objective", "objectives", facts.objective, policy.objectives),
    ):
        if not is_listed(kind, name, listed):
            yield f"{field}: {_listed(listed)}; the job names the {kind} {name!r}, which is not among them"
    if facts.trust_remote_code and not policy.remote_code:
        yield "remote_code is false: code from a model's folder is never run; the job asks for it"


def _how_much(policy: Policy, facts: JobFacts, spent: Spent) -> Iterator[str]:
    if facts.min_cohort < policy.min_cohort:
        yield (
            f"min_cohort is {policy.min_cohort}: so many sites' updates must be combined in a round; the job goes on "
            f"with {facts.min_cohort} (its federation.min_sites)"
        )
    if facts.secure_group_size is not None and facts.secure_group_size < policy.min_cohort:
        yield (
            f"min_cohort is {policy.min_cohort}: so many sites' updates must be combined before anybody sees them; the "
            f"job shows sums of groups of {facts.secure_group_size} (its privacy.secure_group_size)"
        )
    if facts.rounds > policy.max_rounds:
        yield f"max_rounds is {policy.max_rounds}; the job has {facts.rounds} rounds"
    if facts.kind == "train":
        yield from _over("max_bytes_per_round", policy.max_bytes_per_round, 0, facts.update_bytes, "in a round")
        others, whole = spent.bytes_total - spent.bytes_run, facts.update_bytes * facts.rounds
        yield from _over("max_bytes_total", policy.max_bytes_total, others, whole, "in all its rounds")


def _privacy(rules: PrivacyRules, facts: JobFacts) -> Iterator[str]:
    if rules.dp_required and facts.dp == "none":
        yield "privacy.dp_required is true; the job has no differential privacy"
    if rules.max_epsilon is not None and not (facts.epsilon is not None and facts.epsilon <= rules.max_epsilon):
        stated = "none (ε = ∞)" if facts.epsilon is None else f"{facts.epsilon:g}"
        yield f"privacy.max_epsilon is {rules.max_epsilon:g}; the job states {stated}"
    if rules.secure_aggregation_required and not facts.secure_aggregation:
        yield "privacy.secure_aggregation_required is true; the job shows the coordinator each site's update"
    if rules.own_noise_required and not facts.own_noise:
        added = "without noise" if facts.dp == "none" else "to which the coordinator is to add the noise"
        yield f"privacy.own_noise_required is true; the job wants updates {added}"


def _over_budget(policy: Policy, before: Sequence[Spend], more: Spend, where: str = "") -> list[str]:
    why = policy.privacy.budget.excess(before, more) if policy.privacy.budget is not None else ""
    return [f"privacy.budget: {where}{why}"] if why else []


def _task_reasons(
    policy: Policy, facts: JobFacts, kind: str, round: int, cohort_size: int | None, spent: Spent
) -> Iterator[str]:
    needed = _KINDS_NEEDED.get(kind)
    if needed is None:
        yield f"tasks are {', '.join(_KINDS_NEEDED)}; asked: {kind!r}"
        return
    for one in needed:
        if one not in policy.kinds:
            yield f"kinds: {_listed(policy.kinds)}; the task {kind!r} needs {one}"
    if kind in ("evaluate", "chain") and policy.share.scores == "none":
        yield f"share.scores is none; the task {kind!r} asks for scores of held-out rows"
    if kind == "sample" and not policy.share.samples:
        yield "share.samples is false; the task asks for answers to held-out prompts"
    if kind == "train":
        yield from _round_reasons(policy, facts, round, cohort_size, spent)
    if spent.bytes_round > policy.max_bytes_per_round:
        yield from _over("max_bytes_per_round", policy.max_bytes_per_round, spent.bytes_round, 0, "in this round")


_KINDS_NEEDED: dict[str, tuple[str, ...]] = {
    "join": (),
    "train": ("train",),
    "evaluate": ("evaluate",),
    "chain": ("train", "evaluate"),
    "sample": ("evaluate",),
    **dict.fromkeys(SUM_STEPS, ("train",)),
}


def _round_reasons(policy: Policy, facts: JobFacts, round: int, cohort_size: int | None, spent: Spent) -> Iterator[str]:
    if round < 1 or round > facts.rounds:
        yield f"the job has rounds 1 to {facts.rounds}; the task is for round {round}"
    if round > policy.max_rounds:
        yield f"max_rounds is {policy.max_rounds}; the task is for round {round}"
    if spent.rounds + 1 > policy.max_rounds:
        yield f"max_rounds is {policy.max_rounds}; this site took part in {spent.rounds} rounds of the run already"
    if spent.nearest is not None and spent.nearest < facts.separation:
        yield (
            f"the job promises that of {facts.separation} rounds in a row this site takes part in one; it took part in "
            f"one {spent.nearest} before or after round {round}"
        )
    if cohort_size is not None and cohort_size < policy.min_cohort:
        yield f"min_cohort is {policy.min_cohort}; {cohort_size} sites are invited to the round"
    yield from _over_budget(policy, [*spent.spends_others, *spent.spends_run], facts.spend, "in this round: ")
    fresh = facts.update_bytes if spent.bytes_round == 0 else 0  # what a round has sent already is not sent twice
    yield from _over("max_bytes_total", policy.max_bytes_total, spent.bytes_total, fresh, "in this round")


def _over(rule: str, limit: int, before: int, more: int, where: str) -> list[str]:
    if before + more <= limit:
        return []
    left = f", {size(before)} have left already" if before else ""
    return [f"{rule} is {size(limit)}{left}; asked: {size(more)} {where}"]


def _withheld(policy: Policy, facts: JobFacts) -> Iterator[str]:
    if facts.evaluation and "evaluate" not in policy.kinds:
        yield f"kinds: {_listed(policy.kinds)}; this site will not evaluate the model"
    elif facts.evaluation and policy.share.scores == "none":
        yield "share.scores is none; this site will not evaluate the model"
    elif facts.evaluation and policy.share.scores == "total":
        yield "share.scores is total; this site sends the sums of its scores, not each row's"
    if facts.samples and not (policy.share.samples and "evaluate" in policy.kinds):
        yield "share.samples is false, or evaluation is not allowed; this site will not answer sample prompts"


def _listed(values: Sequence[str]) -> str:
    if not values:
        return "none are allowed"
    more = f" and {len(values) - _LISTED} more" if len(values) > _LISTED else ""
    return ", ".join(values[:_LISTED]) + more


def size(num_bytes: int) -> str:
    """A number of bytes for people, exact where it is short: `67,108,864 bytes (64 MiB)`."""
    exact = f"{num_bytes:,} bytes"
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes >= _UNITS[unit]:
            return f"{exact} ({num_bytes / _UNITS[unit]:.3g} {unit})"
    return exact


def shared(result: Mapping[str, Any], policy: Policy) -> dict[str, Any]:
    """An evaluation's result (site → `Scores` as JSON), reduced to what may leave. Unknown columns never do. Beside its
    scores goes which cluster's model a site was scored with, where there are several.

    Raises:
        PolicyError: no scores may leave.
        DataError: they are no scores.
    """
    return {site: _shared_of_site(found, policy) for site, found in result.items()}


def _shared_of_site(found: Mapping[str, Any], policy: Policy) -> dict[str, Any]:
    scores = shared_scores({key: value for key, value in found.items() if key != "cluster"}, policy)
    return {**scores, "cluster": int(found["cluster"])} if "cluster" in found else scores


def shared_scores(scores: Mapping[str, Any], policy: Policy) -> dict[str, Any]:
    """One site's `Scores` as JSON: as they are, or as one row of sums (a rate of whole rows has no sum and stays)."""
    if policy.share.scores == "none" or "evaluate" not in policy.kinds:
        raise PolicyError("this site's policy lets no scores of held-out rows leave (kinds, share.scores)")
    checked = Scores.from_json(scores)
    if policy.share.scores == "rows" or not len(checked):
        return checked.to_json()
    return {
        "nll": [math.fsum(checked.nll)],
        "tokens": [int(checked.tokens.sum())],
        "correct": [int(checked.correct.sum())],
    }


def shared_chain(result: Mapping[str, Any], policy: Policy) -> dict[str, Any]:
    """A control arm's result, its scores reduced as in `shared`; the other figures are sums over rows already.

    Raises:
        PolicyError: no scores may leave.
    """
    best = {**result["best"], "scores": shared_scores(result["best"]["scores"], policy)}
    return {**result, "final": shared(result["final"], policy), "best": best}


def shared_groups(groups: Sequence[str], policy: Policy) -> list[str]:
    """The groups of held-out rows, one for each row of scores that may leave."""
    if policy.share.scores == "none" or "evaluate" not in policy.kinds:
        return []
    return list(groups) if policy.share.scores == "rows" else ["total"]
