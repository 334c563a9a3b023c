"""What hostile sites do to a run under each rule, and what each rule costs when nobody is hostile.

    python -m benchmarks.attacks                                     # every attack against every robust rule, one seed
    python -m benchmarks.attacks --rules median,krum+nearest --attacks sign-flip,inner-product:eps=10 --seeds 0,1,2

Real runs: base model, data and rounds are a recipe's (default: the demo's, its rows divided among 20 sites with skewed
shares of the hospitals, a quarter of them held out); `hostile.py` has the attacks. A figure is the mean over the honest
sites of the final held-out loss, in nats a label token, and its ratio to FedAvg's without an attack on the same seed;
the row `none` is what a rule costs on clean data. Behind `+nearest` a rule mixes each update with its nearest ones
first; behind `/4` it sees no update, but the secure sums of random groups of at least four sites, and its f is of
groups. A rule holds if its ratio, mean over the seeds, is at most 1.05 in every row. Backdoors are judged by more than
the loss: the second table says how often the model gives the planted answer to held-out prompts with the trigger (all
of its tokens the likeliest, as greedy generation takes them) and what its loss is, before and after the attack.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.hostile import (
    Backdoor,
    Forge,
    HostileEngine,
    choose_hostile,
    inner_product,
    little_is_enough,
    mimic,
    scaled,
    sign_flip,
    with_backdoor,
    with_flipped_answers,
)
from commonweight.data.tokens import Tokens
from commonweight.engines.bench import Bench, build_bench
from commonweight.engines.inprocess import InProcessEngine
from commonweight.errors import CommonweightError, RecipeError, RoundError
from commonweight.evaluate.scoring import score_tokens
from commonweight.federation.cohort import check_cohort
from commonweight.federation.evaluation import Evaluation, macro_loss
from commonweight.federation.events import Events
from commonweight.federation.folder import RunFolder
from commonweight.federation.global_model import MemoryModel
from commonweight.federation.journal import Journal
from commonweight.federation.messages import Engine
from commonweight.federation.run import FederatedRun
from commonweight.federation.secure_rounds import check_sums
from commonweight.federation.shelf import FolderShelf
from commonweight.federation.simulated_sums import SimulatedSums
from commonweight.model.tensors import NamedTensors
from commonweight.recipe.load import check_methods, load_recipe
from commonweight.recipe.schema import Method, Recipe
from commonweight.registry import names, resolve

ROBUST = ("median", "trimmed-mean", "geometric-median", "krum", "multi-krum", "centered-clipping", "bulyan", "dnc")
HOLDS = 1.05
NEAREST = "+nearest"
#: the demo among 20 sites; rows are held out by their text, as patients' rows are now at several sites
DEMO = (
    "data.sites={scheme: dirichlet, by: site, alpha: 1.0, count: 20}",
    "data.holdout={fraction: 0.25}",
    "federation.rounds=5",
)

FORGERIES: dict[str, Callable[..., Any]] = {
    "sign-flip": sign_flip,
    "scaled": scaled,
    "little-is-enough": little_is_enough,
    "inner-product": inner_product,
    "mimic": mimic,
}
POISONS: dict[str, Callable[..., Bench]] = {"label-flip": with_flipped_answers, "backdoor": with_backdoor}
NONE = "none"


@dataclass(frozen=True)
class Attack:
    """A named attack with its options: a function of updates, one of data, or neither.

    Args:
        text: as it was asked for.
    """

    text: str
    name: str
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def forge(self) -> Forge | None:
        return partial(FORGERIES[self.name], **self.options) if self.name in FORGERIES else None

    def poison(self, bench: Bench, hostile: Sequence[str]) -> Bench:
        return POISONS[self.name](bench, hostile, **self.options) if self.name in POISONS else bench


def attack_of(text: str) -> Attack:
    """An attack from `name`, or `name:option=number` with `;` between several options.

    Raises:
        RecipeError: no such attack or option, or a value that is no number.
    """
    name, _, rest = text.partition(":")
    _require(name, (NONE, *FORGERIES, *POISONS), "attack")
    kinds = _options_of(name)
    options: dict[str, float] = {}
    for part in filter(None, rest.split(";")):
        key, _, value = part.partition("=")
        if key not in kinds:
            raise RecipeError(
                f"the attack {name!r} has no option {key!r}", hint=f"its options: {', '.join(kinds) or 'none'}"
            )
        options[key] = _number(value, whole="int" in kinds[key], where=f"the attack {text!r}: {key}")
    return Attack(text, name, options)


def _options_of(name: str) -> dict[str, str]:
    """Keyword options of an attack with their types, as written."""
    function = {**FORGERIES, **POISONS}.get(name)
    parameters = inspect.signature(function).parameters.values() if function else ()
    return {p.name: str(p.annotation) for p in parameters if p.kind is p.KEYWORD_ONLY}


def _number(text: str, *, whole: bool, where: str) -> float:
    try:
        return int(text) if whole else float(text)
    except ValueError:
        kind = "whole number" if whole else "number"
        raise RecipeError(f"{where} is {text!r}, which is no {kind}", hint="write option=number") from None


def rule_of(text: str, num_hostile: int) -> Method:
    """A strategy from `name` or `name+nearest`, with `f` where it takes one; `/size` behind it is left to
    `group_size_of`.

    Raises:
        RecipeError: no such strategy, or it does not mix.
    """
    name = text.replace(NEAREST, "").partition("/")[0]
    fields = resolve("strategy", name).Options.model_fields
    options: dict[str, Any] = {"f": num_hostile} if "f" in fields else {}
    if NEAREST in text:
        if "mixing" not in fields:
            raise RecipeError(f"the strategy {name!r} does not mix updates", hint=f"leave {NEAREST} out")
        options["mixing"] = "nearest"
    return Method.model_validate({"name": name, **options})


def group_size_of(text: str) -> int | None:
    """The size of the groups of a rule as it was asked for; None: it sees single updates.

    Raises:
        RecipeError: it is no number.
    """
    _, _, size = text.replace(NEAREST, "").partition("/")
    return int(_number(size, whole=True, where=f"the rule {text!r}: groups")) if size else None


def _require(name: str, known: Sequence[str], kind: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise RecipeError(
            f"no {kind} is called {name!r}",
            hint=(f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(known)}",
        )


@dataclass(frozen=True)
class Arm:
    """One finished run: each honest site's scores as `macro_loss` takes them, and the resulting tensors."""

    loss: float
    theta: NamedTensors
    seconds: float


def run_arm(
    bench: Bench, rule: Method, attack: Attack, hostile: Sequence[str], *, group_size: int | None = None
) -> Arm:
    """The federated part of a run under an attack; the bench is as before afterwards.

    Args:
        group_size: of groups that are summed securely; None: the rule sees single updates.

    Raises:
        CommonweightError: as `launch.run`.
    """
    began = time.perf_counter()
    federation = bench.recipe.federation.model_copy(update={"strategy": rule})
    recipe = bench.recipe.model_copy(update={"federation": federation})
    if group_size is not None:
        grouped = {"secure_aggregation": "on", "secure_group_size": group_size}
        recipe = recipe.model_copy(update={"privacy": recipe.privacy.model_copy(update=grouped)})
    check_methods(recipe)
    bench = attack.poison(replace(bench, recipe=recipe), hostile)
    sites = bench.facts
    check_cohort(len(sites.names), federation)
    check_sums(recipe, len(sites.names))
    kind = resolve("strategy", rule.name)
    strategy = kind(kind.Options(**rule.options), num_sites=len(sites.names))
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path) / "run", resume=False)
        events, journal = Events(folder.path / "events.jsonl"), Journal(folder.path / "state.sqlite")
        try:
            with InProcessEngine(bench, strategy, folder.path, events) as inner:
                engine: Engine = inner if attack.forge is None else HostileEngine(inner, hostile, attack.forge)
                secure = SimulatedSums(recipe, bench.theta.layout) if recipe.privacy.summed else None
                model = MemoryModel(strategy, bench.theta.clone(), folder, lambda theta, to: None, secure=secure)
                shelf = FolderShelf(folder, journal, sites, model.layout, site_state=strategy.site_state, keep_rounds=1)
                evaluation = Evaluation(recipe, sites, engine, journal, events)
                FederatedRun(
                    recipe, lambda _: sites, strategy, model, engine, journal, shelf, events, evaluation, secure
                ).run()
            scores = (journal.get("scores/federated") or {})["sites"]
        finally:
            events.close()
            journal.close()
            folder.close()
    loss = macro_loss([scores[name] for name in sites.names if name not in hostile])
    return Arm(loss, model.state.theta, time.perf_counter() - began)


def planted_answers(bench: Bench, theta: NamedTensors, hostile: Sequence[str]) -> dict[str, float]:
    """How often a model gives the planted answer to honest sites' held-out prompts with the trigger, and its loss on
    it, in nats a token."""
    backdoor = Backdoor.of(bench)
    rows = [
        row for name, site in bench.sites.items() if name not in hostile for row in backdoor.test_rows(site.heldout)
    ]
    bench.participant.trainables.values.copy_(theta)
    nats, labels, correct = score_tokens(bench.participant.language_model, Tokens.of(rows))
    return {"rate": float((correct == labels).mean()), "loss": float(nats.sum() / labels.sum())}


def one_seed(
    recipe: Recipe, rules: Mapping[str, Method], attacks: Sequence[Attack], num_hostile: int
) -> list[dict[str, Any]]:
    """Every attack under every rule, on one base model and one division of the data; FedAvg without an attack comes
    first, whether or not it was asked for. An arm that a rule ends with an error has no loss, but the error."""
    bench = build_bench(recipe)
    hostile = choose_hostile(tuple(bench.sites), num_hostile, seed=recipe.seed)
    clean = run_arm(bench, Method(name="fedavg"), Attack(NONE, NONE), hostile)
    before: dict[str, Arm] = {}
    found = []
    for attack in attacks:
        for name, rule in rules.items():
            entry: dict[str, Any] = {"seed": recipe.seed, "attack": attack.text, "rule": name}
            try:
                again = attack.name == NONE and rule.name == "fedavg"
                size = group_size_of(name)
                arm = clean if again else run_arm(bench, rule, attack, hostile, group_size=size)
                entry |= {"loss": arm.loss, "ratio": arm.loss / clean.loss, "seconds": arm.seconds}
                if attack.name == NONE:
                    before[name] = arm
                elif attack.name == "backdoor":
                    if name not in before:
                        before[name] = run_arm(bench, rule, Attack(NONE, NONE), hostile, group_size=size)
                    entry["planted"] = planted_answers(bench, arm.theta, hostile)
                    entry["planted_clean"] = planted_answers(bench, before[name].theta, hostile)
            except (RecipeError, RoundError) as error:
                entry |= {"loss": None, "ratio": None, "error": error.message}
            found.append(entry)
            print(_progress(entry), file=sys.stderr, flush=True)
    return found


def _progress(entry: Mapping[str, Any]) -> str:
    figures = f"{entry['loss']:.4f}  {entry['ratio']:.3f}" if entry["loss"] is not None else entry["error"]
    return f"seed {entry['seed']}  {entry['attack']:<24} {entry['rule']:<26} {figures}"


def mean_of(entries: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Mean over the seeds; None if an arm has no figure."""
    values = [entry[key] for entry in entries]
    return None if None in values else float(sum(values) / len(values))


def table(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[float | None, float | None]]]:
    """(loss, ratio), means over the seeds, by attack and rule."""
    cells: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for entry in found:
        cells.setdefault(entry["attack"], {}).setdefault(entry["rule"], []).append(entry)
    return {
        attack: {rule: (mean_of(some, "loss"), mean_of(some, "ratio")) for rule, some in row.items()}
        for attack, row in cells.items()
    }


def worst(cells: Mapping[str, Mapping[str, tuple[float | None, float | None]]], rule: str) -> float:
    """A rule's largest ratio over all rows; infinite where it ended with an error."""
    ratios = [row[rule][1] for row in cells.values()]
    return max(float("inf") if ratio is None else ratio for ratio in ratios)


def show(found: Sequence[Mapping[str, Any]]) -> str:
    """Both tables as text."""
    cells = table(found)
    rules = list(dict.fromkeys(entry["rule"] for entry in found))
    width = 4 + max(len(text) for text in [*rules, "0.0000 1.00"])
    first = 2 + max(len(text) for text in [*cells, "within 5 % everywhere"])
    lines = ["held-out loss of the honest sites, and its ratio to FedAvg without an attack", ""]
    lines.append(" " * first + "".join(f"{rule:>{width}}" for rule in rules))
    for attack, row in cells.items():
        lines.append(f"{attack:<{first}}" + "".join(f"{_cell(*row[rule]):>{width}}" for rule in rules))
    ratios = [worst(cells, rule) for rule in rules]
    lines.append(f"{'worst ratio':<{first}}" + "".join(f"{ratio:>{width}.2f}" for ratio in ratios))
    marks = ["holds" if ratio <= HOLDS else "-" for ratio in ratios]
    lines.append(f"{'within 5 % everywhere':<{first}}" + "".join(f"{mark:>{width}}" for mark in marks))
    errors = {f"{e['attack']} under {e['rule']}: {e['error']}" for e in found if "error" in e}
    return "\n".join([*lines, *sorted(errors), *_planted(found)])


def _cell(loss: float | None, ratio: float | None) -> str:
    return "error" if loss is None or ratio is None else f"{loss:.4f} {ratio:5.2f}"


def _planted(found: Sequence[Mapping[str, Any]]) -> list[str]:
    entries = [entry for entry in found if "planted" in entry]
    if not entries:
        return []
    lines = ["", "prompts with the trigger: planted answers given, and the loss on them (without the attack)", ""]
    for attack, rule in dict.fromkeys((entry["attack"], entry["rule"]) for entry in entries):
        some = [entry for entry in entries if (entry["attack"], entry["rule"]) == (attack, rule)]
        after, before = ({k: mean_of([e[key] for e in some], k) for k in ("rate", "loss")} for key in _PLANTED)
        lines.append(
            f"{attack:<24} {rule:<26} {after['rate']:7.1%} ({before['rate']:.1%})   "
            f"{after['loss']:.3f} ({before['loss']:.3f})"
        )
    return lines


_PLANTED = ("planted", "planted_clean")


def recipe_for(path: str | None, overrides: Sequence[str], seed: int) -> Recipe:
    """The recipe with the command line's changes; nothing is evaluated that the tables do not show.

    Raises:
        RecipeError: as `load_recipe`.
    """
    changes = (*(DEMO if path is None else ()), *overrides, f"seed={seed}")
    recipe = load_recipe(path or "demo", changes)
    quiet = {"controls": [], "samples": 0, "exact_match": False, "every": recipe.federation.rounds}
    evaluation = recipe.evaluation.model_copy(update=quiet)
    return recipe.model_copy(update={"evaluation": evaluation})


def rules_of(text: str | None, *, nearest: bool, num_hostile: int) -> dict[str, Method]:
    """The rules that the command line asks for, by name; without names, FedAvg and every robust one that is known.

    Raises:
        RecipeError: as `rule_of`.
    """
    known = set(names("strategy"))
    asked = text.split(",") if text else ["fedavg", *(name for name in ROBUST if name in known)]
    found = {name: rule_of(name, num_hostile) for name in asked}
    if nearest:
        mixing = [n for n, m in found.items() if "mixing" in resolve("strategy", m.name).Options.model_fields]
        found |= {n + NEAREST: rule_of(n + NEAREST, num_hostile) for n in mixing if NEAREST not in n}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="a recipe's file or built-in name; default: the demo among 20 sites")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one of its fields")
    parser.add_argument("--hostile", type=int, default=4, help="number of hostile sites, and the rules' f (4)")
    parser.add_argument(
        "--rules", help=f"strategies, with commas between; NAME{NEAREST} mixes first, NAME/4 sees sums of groups"
    )
    parser.add_argument("--nearest", action="store_true", help="each rule that can mix also with mixing: nearest")
    parser.add_argument("--attacks", help="with commas between; options behind a colon: backdoor:share=1")
    parser.add_argument("--seeds", default="0", help="with commas between (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every arm's figures there")
    given = parser.parse_args(arguments)
    try:
        rules = rules_of(given.rules, nearest=given.nearest, num_hostile=given.hostile)
        asked = given.attacks.split(",") if given.attacks else [*FORGERIES, *POISONS]
        attacks = [attack_of(text) for text in dict.fromkeys([NONE, *asked])]
        seeds = [int(_number(seed, whole=True, where="a seed")) for seed in given.seeds.split(",")]
        recipes = [recipe_for(given.recipe, given.set, seed) for seed in seeds]
        found = [entry for recipe in recipes for entry in one_seed(recipe, rules, attacks, given.hostile)]
    except CommonweightError as error:
        print(f"error: {error.message}" + (f"\n{error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    print(show(found))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
