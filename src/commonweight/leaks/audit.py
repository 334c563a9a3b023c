"""What a finished run's model gives away of the rows that it was trained on: attacks, and what they came to.

Three attacks, with the rows and the model at hand:

- canaries (`data/canaries.py`): guessed by the score below, and so a lower bound on ε (`privacy/one_run.py`), which is
  set against the ε that the run claims
- membership inference on real rows (`evaluate/membership.py`): rows trained on against as many held-out rows of the
  same sites
- the token-span test (`privacy/token_span.py`): the tokens of a text from the update that a site would send after one
  step on it

A row's score is its mean loss under the base model less that under the run's. An attack that fails proves nothing; a
bound above the claim proves, at 95 % confidence, that the claim is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..data.canaries import FILE as CANARIES
from ..data.canaries import Canaries
from ..data.draws import sample
from ..data.sites import Site, load_sites
from ..data.tokens import Tokens, concatenate
from ..engines.bench import trained_on
from ..errors import StateError
from ..evaluate.bootstrap import Floats
from ..evaluate.membership import auc, membership, min_k_plus_plus
from ..evaluate.report import AUDIT, read_metrics, write_report
from ..evaluate.scoring import score_tokens
from ..federation.folder import DAMAGED, write_json
from ..privacy.one_run import audit as guess
from ..privacy.spending import Spend, cost
from ..recipe.schema import Recipe
from ..result import Result, open_result
from .updates import token_span

FORMAT = 1
#: at which canaries bound ε where the run claims nothing
DELTA = 1e-5


@dataclass(frozen=True)
class Rows:
    """What is scored.

    Args:
        members, others: rows trained on, and as many of each site that nobody has trained on.
        member_groups, other_groups: the group of each.
        canaries: None if the run has none.
    """

    members: Tokens
    others: Tokens
    member_groups: list[str]
    other_groups: list[str]
    canaries: Canaries | None


@dataclass(frozen=True)
class Losses:
    """Mean nats a label token of each row."""

    members: Floats
    others: Floats
    canaries: Floats


def audit_run(run: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Attack a finished run; what was found is left in `audit.json` and in the report.

    Args:
        run: a folder that `commonweight run` has left.
        overrides: of its recipe, for rows or a base model that have been moved.

    Raises:
        StateError: no run, one that has not ended, one over a network, one with several global models, or files or rows
            that are not those of the run.
        DataError, ModelError, RecipeError: the rows or the model cannot be opened.
    """
    metrics = read_metrics(run)
    _refuse(run, metrics)
    base = open_result(run, overrides, round=None, base=True)
    rows = _rows(base, run, metrics)
    before = _losses(base, rows)
    del base
    result = open_result(run, overrides, round=None, base=False)
    after = _losses(result, rows)
    found = {
        "format": FORMAT,
        "adapter_digest": metrics["adapter"]["digest"],
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "claim": claim(metrics["privacy"]),
        **_guessed(rows.canaries, before.canaries - after.canaries, metrics["privacy"]),
        "membership": _membership(result, rows, before, after),
        "token_span": token_span(result, rows.members, metrics["privacy"]),
    }
    write_json(run / AUDIT, found)
    write_report(run)
    return found


def _refuse(run: Path, metrics: Mapping[str, Any]) -> None:
    if metrics.get("engine") == "network":
        raise StateError(
            f"the run in {run} was carried out over a network: an audit needs the rows, which are at its sites",
            hint="audit the same recipe carried out by `commonweight run` on rows that you have",
        )
    if "clusters" in metrics:
        raise StateError(
            f"the run in {run} has several global models; an audit is of one that all sites have trained",
            hint="audit a run whose sites share one model",
        )


def _rows(base: Result, run: Path, metrics: Mapping[str, Any]) -> Rows:
    recipe = base.recipe
    sites, report = load_sites(
        recipe.data,
        seed=recipe.seed,
        tokenizer=base.base.tokenizer,
        max_tokens=recipe.training.max_tokens,
        owner=recipe.privacy.by,
    )
    if report["digest"] != metrics["partition"]["digest"]:
        raise StateError(
            f"the rows of {recipe.data.path} are not those that the run in {run} was trained on",
            hint="name the same data by --set data.path=…; an audit must know who was in and who was not",
        )
    sites = trained_on(recipe, sites)
    taken = [_as_many(site, recipe.seed) for site in sites]
    return Rows(
        concatenate([site.train.subset(rows) for site, rows in zip(sites, taken, strict=True)]),
        concatenate([site.heldout.subset(range(len(rows))) for site, rows in zip(sites, taken, strict=True)]),
        [_group(site, i) for site, rows in zip(sites, taken, strict=True) for i in rows],
        [group for site, rows in zip(sites, taken, strict=True) for group in site.groups[: len(rows)]],
        _canaries(run, recipe),
    )


def _as_many(site: Site, seed: int) -> list[int]:
    """Training rows, as many as the site holds out: sites that are easy would otherwise look like membership."""
    return sample(range(len(site.train)), len(site.heldout), seed=seed, purpose=("audit", site.name))


def _group(site: Site, row: int) -> str:
    return site.train_groups[row] if site.train_groups else f"{site.name}/{row}"


def _canaries(run: Path, recipe: Recipe) -> Canaries | None:
    if not recipe.privacy.canaries.count:
        return None
    path = run / CANARIES
    try:
        return Canaries.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise StateError(f"{path} is missing: which canaries were planted is not known", hint=DAMAGED) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} is damaged: {error}", hint=DAMAGED) from error


def _losses(result: Result, rows: Rows) -> Losses:
    def mean(tokens: Tokens) -> Floats:
        nats, labels, _ = score_tokens(result.language_model, tokens)
        return np.asarray(nats / np.maximum(labels, 1))

    canaries = np.zeros(0) if rows.canaries is None else mean(rows.canaries.tokens)
    return Losses(mean(rows.members), mean(rows.others), canaries)


def claim(privacy: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's metrics claim of a canary: `epsilon` (None: ∞), `delta`, and `why` in words.

    Differential privacy of sites is of a site more or fewer. With a row more or fewer the site stays, and its update
    may go anywhere inside the clipping bound: by twice the bound, as if there were half the noise.
    """
    kind = privacy.get("dp", "none")
    if kind == "none" or privacy.get("epsilon") is None:
        return {"epsilon": None, "delta": DELTA, "why": "the run claims no bound"}
    if kind == "site":
        spend = Spend(
            kind, privacy.get("mechanism", "gaussian"), privacy["noise_multiplier"], count=privacy["releases"]
        )
        value = cost([spend], "example", privacy["delta"])
        return {
            "epsilon": value if value < math.inf else None,
            "delta": privacy["delta"],
            "why": f"a site more or fewer costs ε = {privacy['epsilon']:.2f}; a row less in one that stays changes its "
            "update by up to twice the clipping bound",
        }
    if kind in ("example", "group"):
        of = "an example" if kind == "example" else f"a {privacy['by']} with all rows"
        own = "" if kind == "example" else "; each canary, with its copies, has one of its own"
        return {
            "epsilon": privacy["epsilon"],
            "delta": privacy["delta"],
            "why": f"what {of} more or fewer costs, at the site where that is most{own}",
        }
    raise StateError(f"the run claims differential privacy of a kind that is not known here: {kind!r}")


def _guessed(canaries: Canaries | None, scores: Floats, privacy: Mapping[str, Any]) -> dict[str, Any]:
    """`canaries` and the `verdict`."""
    if canaries is None:
        return {"canaries": None, "verdict": "no canaries"}
    claimed, planted = claim(privacy), np.array(canaries.planted)
    found = guess(scores, canaries.planted, delta=claimed["delta"])
    exceeded = claimed["epsilon"] is not None and found.epsilon > claimed["epsilon"]
    verdict = "exceeded" if exceeded else "not exceeded" if claimed["epsilon"] is not None else "nothing claimed"
    return {
        "canaries": {
            **canaries.facts(),
            "auc": auc(scores[planted], scores[~planted]) if 0 < planted.sum() < len(planted) else None,
            "guesses": found.guesses,
            "correct": found.correct,
            "epsilon_at_least": found.epsilon,
            "delta": found.delta,
        },
        "verdict": verdict,
    }


def _membership(result: Result, rows: Rows, before: Losses, after: Losses) -> dict[str, Any]:
    recipe, model = result.recipe, result.language_model
    scores = {
        "reference_loss": (before.members - after.members, before.others - after.others),
        "min_k_plus_plus": (min_k_plus_plus(model, rows.members), min_k_plus_plus(model, rows.others)),
        "base_loss": (-before.members, -before.others),
    }
    options = {"resamples": recipe.evaluation.resamples, "seed": recipe.seed}
    return {
        name: membership(members, others, rows.member_groups, rows.other_groups, **options)
        for name, (members, others) in scores.items()
    }
