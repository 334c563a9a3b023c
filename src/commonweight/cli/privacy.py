"""What a run costs: `plan` before anything runs, and of privacy `ledger` afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RecipeError, StateError
from .forecast import Asked, foresee, say_forecast, to_json
from .network import DEFAULT_IDENTITY, IdentityOption, connected
from .start import RecipeArgument
from .terminal import JsonOption, SetOption, begin, print_json, say, table

if TYPE_CHECKING:
    from ..federation.ledger import Line
    from ..privacy.spending import Budget
    from ..recipe.schema import Recipe

#: what neither noise nor clipping covers, said wherever ε is said
NOT_COVERED = (
    "Not covered by ε: the coordinator itself, which sees updates, or their secure sum, before the noise; the figures "
    "that sites send beside their updates (whether they answered, numbers of examples and steps, training losses, "
    "scores on held-out rows); control arms."
)
NOT_COVERED_OF_SUMS = (
    "Not covered by ε: whether a site answered, and in how many steps; scores on held-out rows; control arms; that a "
    "site knows its own noise (privacy.mechanism.colluding counts it out)."
)
NOT_COVERED_OF_STEPS = (
    "Not covered by ε: how many rows and tokens a site says that it has; the held-out rows, whose scores it sends; "
    "control arms, which train without noise."
)
_SITES_SHOWN = 20
_PLAN_KEYS = (
    "dp",
    "rounds",
    "unit",
    "adjacency",
    "mechanism",
    "sampling",
    "assumed",
    "participations",
    "clip",
    "noise_multiplier",
    "delta",
    "epsilon",
    "epsilon_rdp",
    "epsilon_after_round",
)
#: enough sites for whatever a recipe asks for
_MANY = 10**6


def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    examples: Annotated[
        int | None,
        typer.Option(
            "--examples",
            min=1,
            help="Plan for a site with so many training examples, whatever the recipe's data are.",
            metavar="N",
        ),
    ] = None,
    groups: Annotated[
        int | None,
        typer.Option(
            "--groups",
            min=1,
            help="Privacy of groups: plan for a site with so many groups (patients …) to train on.",
            metavar="N",
        ),
    ] = None,
    sites: Annotated[int | None, typer.Option("--sites", min=1, help="Plan for so many sites.", metavar="N")] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            "--bandwidth",
            help="Each site's line: `10mbit`, or `2mbit/20mbit` for up and down. Says how long transfers take.",
            metavar="RATE",
        ),
    ] = None,
    step_seconds: Annotated[
        float | None,
        typer.Option("--step-seconds", help="Seconds that an optimizer step takes at a site.", metavar="S"),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model, take a few optimizer steps here, and go by their time.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Say what a recipe will cost before it runs: privacy, bytes, hours, memory.

    Memory of what grows with the model is counted from its configuration; its weights are not read.
    """
    begin(json)
    from ..recipe.compatibility import secure_sums
    from ..recipe.load import check_methods, load_recipe

    loaded = load_recipe(recipe, set_ or ())
    check_methods(loaded)
    spec = loaded.privacy
    for unit, number in (("example", examples), ("group", groups)):
        if number is not None and unit != spec.dp and spec.noisy_steps:
            raise RecipeError(
                f"--{unit}s says how large a site is, which does not count with privacy.dp {spec.dp}",
                hint=f"say --{spec.dp}s",
            )
    units = groups if spec.dp == "group" else examples
    secure, why = secure_sums(loaded, _MANY if sites is None else sites)
    asked = Asked(sites, units, bandwidth, step_seconds, measure)
    found, unknown = foresee(loaded, asked, secure=secure)
    further = {"secure_sums": secure, "why_not_secure": why or None, **to_json(found)}
    size = spec.secure_group_size
    told = f"on, of at least {size or 3} sites{' each, in groups' if size else ''}" if secure else f"off, {why}"
    if spec.dp == "none":
        if json:
            print_json(dict.fromkeys(_PLAN_KEYS) | {"dp": "none", "rounds": loaded.federation.rounds} | further)
        else:
            say(f"{recipe}: differential privacy is off: ε = ∞. Set privacy.dp to example, group or site to bound it.")
            say(f"  secure sums           {told} (over a network)")
    elif spec.noisy_steps:
        _plan_steps(str(recipe), loaded, units, further, told, json)
    else:
        _plan_sites(str(recipe), loaded, further, told, json)
    if not json:
        say_forecast(found, unknown, asked)


def _plan_sites(name: str, recipe: Recipe, further: dict[str, Any], told: str, json: bool) -> None:
    """The privacy of sites.

    Args:
        further: what is said beside it, as plain data.
        told: whether the coordinator learns sums alone, in words.
    """
    from ..federation.private_rounds import UNIT, assumed, band_of, sampling
    from ..privacy.accounting import Releases, epsilon, epsilon_by_rdp
    from ..privacy.site_level import participations, planned_noise
    from ..privacy.spending import adjacency

    rounds, spec = recipe.federation.rounds, recipe.privacy
    assert spec.delta is not None
    z = planned_noise(recipe)
    times = participations(recipe)
    at_sites = spec.mechanism.at_sites
    by_times = [epsilon(Releases(z, count, discrete=at_sites), spec.delta) for count in range(1, times + 1)]
    each = [by_times[participations(recipe, number) - 1] for number in range(1, rounds + 1)]
    rdp = epsilon_by_rdp(Releases(z, times), spec.delta)
    mechanism = spec.mechanism.name
    correlated, neighbours = spec.mechanism.separation > 1, adjacency(UNIT, mechanism)
    if json:
        counted = (sampling(recipe), assumed(recipe), times)
        known = (spec.dp, rounds, UNIT, neighbours, mechanism, *counted, spec.clip, z, spec.delta)
        costs = (_finite(each[-1]), _finite(rdp), [_finite(value) for value in each])
        print_json(dict(zip(_PLAN_KEYS, (*known, *costs), strict=True)) | further)
        return
    earlier = ", before it is correlated" if correlated else ""
    say(f"{name}: differential privacy of each {UNIT}")
    say(f"  noise multiplier z    {z:g}: σ = {z * (spec.clip or 0):.4g} on each element of the sum of updates{earlier}")
    follows = (
        "" if spec.adaptive_clip is None else f" at first; it follows the {spec.adaptive_clip.quantile:g} quantile"
    )
    say(f"  clipping norm C       {spec.clip:g}{follows}")
    say(f"  releases              {rounds}, one a round")
    say(f"  ε at δ = {spec.delta:g}        {_text(each[-1])} (by Rényi divergences {_text(rdp)})")
    say(f"  neighbouring data     {neighbours}")
    say(f"  sampling              {sampling(recipe)}")
    say(f"  assumed               {assumed(recipe)}")
    if correlated:
        from ..privacy.toeplitz import optimised, rmse

        band = min(band_of(recipe), rounds)
        share = rmse(optimised(rounds, band), rounds) / rmse(optimised(rounds, 1), rounds)
        say(f"  a site takes part     {times} times at most")
        say(f"  correlated noise      over {band} rounds: {share:.0%} of what independent noise leaves in the models")
    say(f"  secure sums           {told} (over a network)")
    table(("after round", "ε"), [(str(k), _text(each[k - 1])) for k in _some(rounds)], right=(0, 1))
    say(NOT_COVERED_OF_SUMS if at_sites else NOT_COVERED)


def _plan_steps(name: str, recipe: Recipe, size: int | None, further: dict[str, Any], told: str, json: bool) -> None:
    """The same of each site's examples or groups; sites differ in what their size lets them claim.

    Args:
        size: of a site that is planned for, in these; None: of those in the recipe's data.
        further, told: as `_plan_sites`.
    """
    from ..engines.forecast import sites_of
    from ..federation.private_rounds import planned_round
    from ..privacy.accounting import Releases, epsilon, epsilon_by_rdp, epsilons
    from ..privacy.example_level import SAMPLING
    from ..privacy.spending import adjacency, unit_of
    from ..train.batches import num_steps

    spec, rounds = recipe.privacy, recipe.federation.rounds
    assert spec.delta is not None
    assert spec.clip is not None
    neighbours, unit = adjacency(unit_of(spec)), spec.by or spec.dp
    sizes = sites_of(recipe).units if size is None else {f"a site of {size} {spec.dp}s": size}
    planned: dict[str, Releases] = {}
    for site, num in sizes.items():
        steps = recipe.training.steps_within_budget(site, num_steps(recipe.training, num))
        planned[site] = planned_round(recipe, units=num, steps=steps)
    whole = {s: Releases(one.noise_multiplier, one.count * rounds, one.sampling) for s, one in planned.items()}
    costs = {one: epsilon(one, spec.delta) for one in set(whole.values())}
    worst = max(whole, key=lambda site: costs[whole[site]])
    each, rdp = epsilons(planned[worst], rounds, spec.delta), epsilon_by_rdp(whole[worst], spec.delta)
    if json:
        known: dict[str, Any] = {
            "dp": spec.dp,
            "rounds": rounds,
            "unit": unit_of(spec),
            "adjacency": neighbours,
            "sampling": SAMPLING.format(unit=spec.dp),
            "clip": spec.clip,
            "noise_multiplier": planned[worst].noise_multiplier,
            "delta": spec.delta,
            "epsilon": _finite(each[-1]),
            "epsilon_rdp": _finite(rdp),
            "epsilon_after_round": [_finite(value) for value in each],
        }
        sites = {
            site: {
                f"{spec.dp}s": sizes[site],
                "sampling": one.sampling,
                "steps": one.count,
                "noise_multiplier": one.noise_multiplier,
                "epsilon": _finite(costs[whole[site]]),
            }
            for site, one in planned.items()
        }
        print_json({**dict.fromkeys(_PLAN_KEYS), **known, **further, "sites": sites})
        return
    say(f"{name}: differential privacy of each {unit}")
    say(f"  clipping norm C       {spec.clip:g}, of each {unit}'s gradient")
    if spec.dp == "group":
        say(f"  rows of a group       {spec.rows_of_unit} a step, at most")
    say(f"  releases              every optimizer step, in each of {rounds} rounds")
    say(f"  δ                     {spec.delta:g}")
    say(f"  neighbouring data     {neighbours}")
    say(f"  sampling              {SAMPLING.format(unit=spec.dp)}")
    say(f"  secure sums           {told} (over a network)")
    say("")
    rows = [
        (
            site,
            str(sizes[site]),
            f"{one.sampling:.4g}",
            str(one.count),
            f"{one.noise_multiplier:g}",
            f"{one.noise_multiplier * spec.clip:.4g}",
            _text(costs[whole[site]]),
        )
        for site, one in planned.items()
    ]
    columns = ("site", f"{spec.dp}s", "sampling", "steps a round", "z", "σ of a sum", "ε of all rounds")
    table(columns, rows[:_SITES_SHOWN], right=(1, 2, 3, 4, 5, 6))
    if len(rows) > _SITES_SHOWN:
        say(f"and {len(rows) - _SITES_SHOWN} more (--json lists all)")
    say("")
    say(f"{worst}, which pays most: ε = {_text(each[-1])} (by Rényi divergences {_text(rdp)})")
    table(("after round", "ε"), [(str(k), _text(each[k - 1])) for k in _some(rounds)], right=(0, 1))
    say(NOT_COVERED_OF_STEPS)


def _some(rounds: int) -> list[int]:
    """Rounds after which ε is shown."""
    every = max(1, rounds // 8)
    return sorted({1, *range(every, rounds + 1, every), rounds})


def ledger(
    where: Annotated[
        Path,
        typer.Argument(
            help="A folder of runs, one run's folder, or the file of a ledger (`run --ledger`).", metavar="PATH"
        ),
    ] = Path("runs"),
    coordinator: Annotated[
        bool, typer.Option("--coordinator", help="Show the ledger of the federation's coordinator instead.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="Set the budget of a ledger's file: ε, over all runs.", metavar="EPSILON"),
    ] = None,
    unit: Annotated[
        str,
        typer.Option("--unit", help="With --budget: what it protects, `site`, `example` or `group`.", metavar="UNIT"),
    ] = "site",
    by: Annotated[
        str | None,
        typer.Option("--by", help="With --unit group: the field that says whose a row is.", metavar="FIELD"),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(
            "--delta",
            help="Add up at this δ. Default: the budget's, else the smallest of the runs', else 1e-5.",
            metavar="DELTA",
        ),
    ] = None,
    identity: IdentityOption = DEFAULT_IDENTITY,
    json: JsonOption = False,
) -> None:
    """Show what runs have spent of each site's privacy.

    All runs together, and what a budget leaves.
    """
    begin(json)
    _check_delta(delta)
    if budget is not None:
        _set_budget(where, budget, unit, by, delta)
    show_ledger(_coordinators(identity) if coordinator else _local(where), delta, json)


def _set_budget(where: Path, epsilon: float, unit: str, by: str | None, delta: float | None) -> None:
    from ..federation.ledger_file import LedgerFile
    from ..privacy.spending import Budget

    if where.is_dir():
        raise StateError(f"{where} is a folder", hint="a budget lies in a ledger's file: name the file")
    try:
        budget = Budget.model_validate({"unit": unit, "by": by, "epsilon": epsilon, "delta": delta})
    except ValueError as error:
        raise RecipeError(
            "a budget is an ε above 0 at a δ, for a unit: site, example, or group with the field --by",
            hint=f"commonweight ledger {where} --budget 8 --delta 1e-5 --unit site",
        ) from error
    with LedgerFile(where) as file:
        file.set_budget(budget)


@dataclass(frozen=True)
class Book:
    """A ledger as it is shown.

    Args:
        delta: at which it is added up, if nobody asks for another.
    """

    source: str
    lines: Sequence[Line]
    budget: Budget | None
    delta: float


def _local(where: Path) -> Book:
    from ..federation.ledger import lines_of_run
    from ..federation.ledger_file import LedgerFile
    from ..recipe.load import load_recipe

    if where.is_file():
        with LedgerFile(where, make=False) as file:
            found = file.budget()
            return Book(str(where), file.lines(), found, found.delta if found else 1e-5)
    if not where.is_dir():
        raise StateError(
            f"{where} is neither a folder nor a ledger's file", hint="name the folder that holds your runs"
        )
    whole = (where / "recipe.yaml").exists()
    folders = [where] if whole else sorted(path for path in where.iterdir() if (path / "recipe.yaml").exists())
    deltas = [load_recipe(folder / "recipe.yaml").privacy.delta for folder in folders]
    lines = [line for folder in folders for line in lines_of_run(folder)]
    return Book(str(where), lines, None, min((delta for delta in deltas if delta is not None), default=1e-5))


def _coordinators(identity: Path) -> Book:
    from ..federation.ledger import Line
    from ..privacy.spending import Budget

    with connected(identity) as client:
        found, address = client.ledger(), client.identity.address
    lines = [Line.from_json(line) for line in found["lines"]]
    budget = None if found["budget"] is None else Budget.model_validate(found["budget"])
    return Book(address, lines, budget, budget.delta if budget else 1e-5)


def show_ledger(book: Book, delta: float | None, json: bool) -> None:
    """Print a ledger: what each run has spent, and how each site stands."""
    from ..federation.ledger import accounts, by_run
    from ..privacy.spending import adjacency

    _check_delta(delta)
    delta = book.delta if delta is None else delta
    if book.budget is not None and delta != book.budget.delta:
        raise RecipeError(
            f"the budget is added up at δ = {book.budget.delta:g}, not {delta:g}", hint="leave --delta out"
        )
    runs, found = by_run(book.lines, delta), accounts(book.lines, delta, book.budget)
    if json:
        print_json(
            {
                "delta": delta,
                "budget": None if book.budget is None else book.budget.model_dump(exclude_none=True),
                "runs": [{**asdict(run), "epsilon": _finite(run.epsilon)} for run in runs],
                "sites": [{**asdict(account), "epsilon": _finite(account.epsilon)} for account in found],
                "lines": [line.to_json() for line in book.lines],
            }
        )
        return
    if not book.lines:
        say(f"nothing is spent in {book.source}")
        return
    table(
        ("run", "protects", "by", "releases", "z", "sampling", f"ε at δ = {delta:g}"),
        [
            (
                r.run,
                r.unit,
                r.mechanism,
                str(r.releases),
                _plain(r.noise_multiplier),
                _plain(r.sampling),
                _text(r.epsilon),
            )
            for r in runs
        ],
        right=(3, 4, 5, 6),
    )
    say("")
    budget = "–" if book.budget is None else f"{book.budget.epsilon:g}"
    table(
        ("site", "unit", "neighbouring data", "ε of all runs", "budget", "left"),
        [(a.site, a.unit, adjacency(a.unit), _text(a.epsilon), *_allowed(a.left, budget)) for a in found],
        right=(3, 4, 5),
    )
    say(NOT_COVERED)


def _check_delta(delta: float | None) -> None:
    if delta is not None and not 0 < delta < 1:
        raise RecipeError(f"--delta {delta:g}", hint="δ is between 0 and 1, such as 1e-5")


def _allowed(left: float | None, budget: str) -> tuple[str, str]:
    return ("–", "–") if left is None else (budget, _text(left))


def _text(epsilon: float) -> str:
    return "∞" if epsilon == math.inf else f"{epsilon:.3f}"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _finite(epsilon: float) -> float | None:
    return epsilon if epsilon < math.inf else None
