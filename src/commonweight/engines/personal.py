"""The model that a site uses, out of the folder of a run whose sites have models or parts of their own."""

from __future__ import annotations

from pathlib import Path

from ..errors import StateError
from ..evaluate.report import read_metrics
from ..federation.folder import read_tensors, site_file
from ..federation.journal import Journal
from ..recipe.compatibility import personal_parts
from ..recipe.schema import Recipe
from .bench import NOTHING, asked_by_strategy, build_bench, without_data
from .work import TaskWork


def has_own(recipe: Recipe) -> bool:
    """Whether its sites have models or parts of their own."""
    return asked_by_strategy(recipe, "own_model", False) or bool(personal_parts(recipe))


def write_site_model(run: Path, recipe: Recipe, site: str) -> Path:
    """Write a site's model under `personal/` in the run's folder, as peft saves an adapter: the latest global tensors
    and what the site has trained for itself.

    Raises:
        StateError: the run has no such site, or what is its own is not here.
        ModelError: the base model cannot be opened.
    """
    if not (run / "state.sqlite").exists():
        raise StateError(
            f"the sites of the run in {run} keep what is their own: it is not here",
            hint="at the site itself: commonweight site export DIR RUN OUTPUT",
        )
    journal = Journal(run / "state.sqlite")
    try:
        return _write(run, recipe, site, journal, alpha=asked_by_strategy(recipe, "alpha", None))
    finally:
        journal.close()


def _write(run: Path, recipe: Recipe, site: str, journal: Journal, *, alpha: float | None) -> Path:
    """`alpha`: as in `Strategy.alpha`."""
    if not (run / "metrics.json").exists():
        raise StateError(f"the run in {run} has not ended", hint="let it end; go on with it by --resume")
    names, commits = list(read_metrics(run)["sites"]), journal.commits()
    if site not in names:
        raise StateError(f"the run in {run} has no site called {site!r}", hint=f"its sites: {', '.join(names[:20])}")
    bench = build_bench(recipe, gather=without_data)
    layout, place, last = bench.theta.layout, names.index(site), max(commits)
    theta = read_tensors(run / "state" / commits[last]["state"]["file"], layout)["theta"]
    answered = [number for number, record in commits.items() if site in record.get("answered", ())]
    state = NOTHING
    if answered:
        state = read_tensors(run / site_file(place, max(answered)), layout, others=bench.state_layouts)
    bench.take_up(theta, state)
    if "own" in state:
        chosen = (journal.get("scores/personal") or {}).get("alpha", {}).get(site) if alpha is None else alpha
        if chosen is None:
            raise StateError(
                f"site {site!r} was not evaluated after the last round, and so has chosen no share of its own model",
                hint="its events say why (evaluation_missing); mend it, and carry the recipe out anew",
            )
        TaskWork(bench, run, lambda _: None).mix(theta, state["own"], chosen)
    folder = run / "personal" / f"{place:03d}"
    bench.save_as_is(folder, tokenizer=True)
    return folder
