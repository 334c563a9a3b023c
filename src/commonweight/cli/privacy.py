"""What privacy costs: `plan` before anything runs, `ledger` afterwards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RecipeError, StateError
from .start import RecipeArgument
from .terminal import JsonOption, SetOption, begin, print_json, say, table

#: what neither noise nor clipping covers, said wherever ε is said
NOT_COVERED = (
    "Not covered by ε: the coordinator itself, which sees each update before the noise; the figures that sites send "
    "beside their updates (numbers of examples and steps, training losses, scores on held-out rows); control arms."
)
_PLAN_KEYS = (
    "dp",
    "rounds",
    "unit",
    "adjacency",
    "sampling",
    "clip",
    "noise_multiplier",
    "delta",
    "epsilon",
    "epsilon_rdp",
    "epsilon_after_round",
)
#: enough sites for whatever a recipe asks for
_MANY = 10**6


def plan(recipe: RecipeArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Say what a recipe's privacy will cost, before it runs."""
    begin(json)
    from ..federation.private_rounds import ADJACENCY, SAMPLING, UNIT, planned_noise
    from ..privacy.accounting import Releases, epsilon, epsilon_by_rdp
    from ..recipe.compatibility import secure_sums
    from ..recipe.load import check_methods, load_recipe

    loaded = load_recipe(recipe, set_ or ())
    check_methods(loaded)
    rounds, spec = loaded.federation.rounds, loaded.privacy
    secure, why = secure_sums(loaded, _MANY)
    sums = {"secure_sums": secure, "why_not_secure": why or None}
    told = "on, of at least 3 sites" if secure else f"off, {why}"
    if spec.dp == "none":
        if json:
            print_json(dict.fromkeys(_PLAN_KEYS) | {"dp": "none", "rounds": rounds} | sums)
        else:
            say(f"{recipe}: differential privacy is off: ε = ∞. Set privacy.dp: site to bound it.")
            say(f"  secure sums           {told} (over a network)")
        return
    assert spec.delta is not None
    z = planned_noise(loaded)
    each = [epsilon(Releases(z, count), spec.delta) for count in range(1, rounds + 1)]
    rdp = epsilon_by_rdp(Releases(z, rounds), spec.delta)
    if json:
        known = (spec.dp, rounds, UNIT, ADJACENCY, SAMPLING, spec.clip, z, spec.delta, _finite(each[-1]), _finite(rdp))
        print_json(dict(zip(_PLAN_KEYS, (*known, [_finite(value) for value in each]), strict=True)) | sums)
        return
    say(f"{recipe}: differential privacy of each {UNIT}")
    say(f"  noise multiplier z    {z:g}: σ = {z * (spec.clip or 0):.4g} on each element of the sum of updates")
    say(f"  clipping norm C       {spec.clip:g}")
    say(f"  releases              {rounds}, one a round")
    say(f"  ε at δ = {spec.delta:g}        {_text(each[-1])} (by Rényi divergences {_text(rdp)})")
    say(f"  neighbouring data     {ADJACENCY}")
    say(f"  sampling              {SAMPLING}")
    say(f"  secure sums           {told} (over a network)")
    shown = sorted({1, *range(max(1, rounds // 8), rounds + 1, max(1, rounds // 8)), rounds})
    table(("after round", "ε"), [(str(k), _text(each[k - 1])) for k in shown], right=(0, 1))
    say(NOT_COVERED)


def ledger(
    directory: Annotated[Path, typer.Argument(help="A folder of runs, or one run's folder.", metavar="DIR")] = Path(
        "runs"
    ),
    delta: Annotated[
        float | None,
        typer.Option("--delta", help="Compute totals at this δ. Default: the smallest of the runs'.", metavar="DELTA"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what runs have spent of each site's privacy, all together."""
    begin(json)
    if delta is not None and not 0 < delta < 1:
        raise RecipeError(f"--delta {delta:g}", hint="δ is between 0 and 1, such as 1e-5")
    if not directory.is_dir():
        raise StateError(f"{directory} is no folder", hint="name the folder that holds your runs")
    from ..federation.ledger import Entry, read_entry, totals

    whole = (directory / "recipe.yaml").exists()
    folders = [directory] if whole else sorted(p for p in directory.iterdir() if (p / "recipe.yaml").exists())
    entries: list[Entry] = [read_entry(folder) for folder in folders]
    if delta is None:
        delta = min((e.delta for e in entries if e.delta is not None), default=1e-5)
    found = totals(entries, delta)
    if json:
        print_json({"delta": delta, "runs": [e.to_json() for e in entries], "sites": _finite_all(found)})
        return
    if not entries:
        say(f"no runs in {directory}")
        return
    rows = [
        (e.run, e.dp, str(e.releases), _plain(e.noise_multiplier), _plain(e.clip), _text(e.epsilon), _plain(e.delta))
        for e in entries
    ]
    table(("run", "privacy", "releases", "z", "C", "ε", "δ"), rows, right=(2, 3, 4, 5, 6))
    say("")
    table((f"site, at δ = {delta:g}", "ε of all runs"), [(s, _text(e)) for s, e in found.items()], right=(1,))
    say(NOT_COVERED)


def _text(epsilon: float) -> str:
    return "∞" if epsilon == math.inf else f"{epsilon:.3f}"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _finite(epsilon: float) -> float | None:
    return epsilon if epsilon < math.inf else None


def _finite_all(found: dict[str, float]) -> dict[str, Any]:
    return {site: _finite(epsilon) for site, epsilon in found.items()}
