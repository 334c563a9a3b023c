"""What runs have spent of their sites' privacy, read off their journals.

A release is spent when its round's commit is in the journal, and no restart resets that.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import StateError
from ..privacy.accounting import Releases, epsilon_of_all
from ..recipe.load import load_recipe
from .private_rounds import spent


@dataclass(frozen=True)
class Entry:
    """One run's spending.

    Args:
        releases: committed rounds.
        epsilon: of all of them at the run's own δ; ∞ without differential privacy, 0 before the first.
        sites: all that the run began with, as far as its journal knows them.
    """

    run: str
    dp: str
    releases: int
    noise_multiplier: float | None
    clip: float | None
    delta: float | None
    epsilon: float
    sites: tuple[str, ...]
    plans: tuple[Releases, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; ∞ is null."""
        values = asdict(self)
        values.pop("plans")
        return {**values, "epsilon": self.epsilon if self.epsilon < math.inf else None}


def read_entry(run: Path) -> Entry:
    """A run's entry, whether it has ended or not.

    Raises:
        StateError: its journal cannot be read.
        RecipeError: its recipe cannot.
    """
    recipe = load_recipe(run / "recipe.yaml")
    commits = {n: record for n, record in _commits(run).items() if n > 0}
    plans = tuple(spent(list(commits.values())) if recipe.privacy.dp != "none" else ())
    if recipe.privacy.dp == "none" and commits:
        plans = (Releases(0.0, len(commits)),)
    delta = recipe.privacy.delta
    sites = dict.fromkeys(site for record in commits.values() for site in record["cohort"])
    return Entry(
        run.name,
        recipe.privacy.dp,
        len(commits),
        plans[0].noise_multiplier if plans and recipe.privacy.dp != "none" else None,
        recipe.privacy.clip,
        delta,
        epsilon_of_all(list(plans), delta if delta is not None else 1e-5),
        tuple(sites),
        plans,
    )


def totals(entries: Sequence[Entry], delta: float) -> dict[str, float]:
    """ε of all runs together, by site."""
    plans: dict[str, list[Releases]] = {}
    for entry in entries:
        for site in entry.sites:
            plans.setdefault(site, []).extend(entry.plans)
    return {site: epsilon_of_all(found, delta) for site, found in sorted(plans.items())}


def _commits(run: Path) -> dict[int, dict[str, Any]]:
    """Without taking the run's lock: a run may be looked at while it goes on."""
    path = run / "state.sqlite"
    if not path.exists():
        return {}
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            rows = database.execute("SELECT round, record FROM commits ORDER BY round").fetchall()
        return {number: json.loads(record) for number, record in rows}
    except (sqlite3.Error, json.JSONDecodeError) as error:
        raise StateError(
            f"the journal {path} cannot be read: {error}", hint="restore the run's folder from a copy"
        ) from error
