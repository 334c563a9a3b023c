"""A run's result, opened again: to score it, to ask it, to hand it on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .data.chat import open_turn
from .data.names import listed
from .data.sites import load_sites
from .data.templates import Example, open_example, question_example
from .data.tokens import encode, prompt_ids
from .engines.bench import asked_by_strategy, check_context
from .engines.personal import has_own, write_site_model
from .errors import ModelError, RecipeError, StateError
from .evaluate.metrics import summarise
from .evaluate.scoring import answer, score_site
from .federation.clusters import FILE as CLUSTERS
from .federation.events import last_event
from .federation.folder import storage_errors
from .federation.residuals import Residuals, save_combined
from .model.base import Base, because, choose_device, load_base, load_weights
from .model.moved_base import MovedBase
from .recipe.load import load_recipe
from .recipe.schema import Recipe
from .train.loss import LanguageModel, autocast_dtype


@dataclass
class Result:
    """A run's model, ready to use: the recipe it came from, the base, the base with the adapter, and how the run read
    its rows (`Template.kind`)."""

    recipe: Recipe
    base: Base
    model: Any
    language_model: LanguageModel
    layout: str | None


def open_result(
    run: Path, overrides: Sequence[str], *, round: int | None, base: bool, site: str | None = None
) -> Result:
    """Open a run's result: its adapter, that of a round, or the base alone. With an adapter comes what the rounds until
    then have added to the base.

    Args:
        site: whose model, where sites have different ones: its own, or its cluster's.

    Raises:
        StateError: the folder holds no run, or not that round's adapter, or nothing of that site, or lacks what a round
            has added to the base.
        RecipeError: all sites have one model.
        ModelError: the base model cannot be loaded, or the adapter does not fit it.
    """
    recipe = _recipe(run, overrides)
    loaded = load_base(recipe.model, choose_device(recipe.engine.device))
    model = loaded.model if base else _opened(loaded, recipe, run, round, site)
    model.eval()
    language_model = LanguageModel(model, autocast_dtype=autocast_dtype(recipe.training, loaded.device))
    return Result(recipe, loaded, model, language_model, last_event(run / "events.jsonl", "loaded").get("layout"))


def _opened(base: Base, recipe: Recipe, run: Path, round: int | None, site: str | None) -> Any:
    """A result's adapter on the base that it belongs to, which is moved for it."""
    folder, residuals = _adapter_folder(run, recipe, round, site), _residuals(run, recipe, round)
    model = _with_adapter(base, recipe, folder)
    if residuals is not None:
        moved = MovedBase(model)
        for residual in residuals[0].read(residuals[1]):
            moved.add({module: (factors.B, factors.A) for module, factors in residual.items()})
    return model


def _residuals(run: Path, recipe: Recipe, round: int | None) -> tuple[Residuals, int] | None:
    """What the rounds have added to the base, and the last of them that counts; None if this run adds nothing.

    Raises:
        StateError: one round's is missing or damaged.
    """
    residuals = Residuals(run)
    if not (residuals.folder.exists() or asked_by_strategy(recipe, "moves_base", False)):
        return None
    last = round if round is not None else load_recipe(run / "recipe.yaml").federation.rounds
    residuals.check(last)
    return residuals, last


def _recipe(run: Path, overrides: Sequence[str]) -> Recipe:
    if not (run / "recipe.yaml").exists():
        raise StateError(
            f"{run} holds no run", hint="name a folder that `commonweight run` made; `commonweight runs` lists them"
        )
    return load_recipe(run / "recipe.yaml", overrides)


def _adapter_folder(run: Path, recipe: Recipe, round: int | None, site: str | None) -> Path:
    if site is not None and has_own(recipe):
        if round is not None:
            raise RecipeError(
                "--site excludes --round in a run whose sites have something of their own",
                hint="it is kept as it is after the last round",
            )
        return write_site_model(run, recipe, site)
    folder = run / "adapter" if round is None else run / "rounds" / f"{round:04d}"
    if folder.is_dir():
        return folder if site is None else _folder_of_site(run, round, site)
    if round is None:
        raise StateError(
            f"the run in {run} has no adapter yet", hint="let it end, or name a round that is done by --round"
        )
    kept = ", ".join(str(int(f.name)) for f in sorted((run / "rounds").glob("*")) if f.name.isdigit())
    raise StateError(f"the run in {run} has no adapter of round {round}", hint=f"rounds kept: {kept or 'none'}")


def _folder_of_site(run: Path, round: int | None, site: str) -> Path:
    clusters = _clusters(run, round)
    if not clusters:
        which = f"the run in {run}" if round is None else f"round {round} of the run in {run}"
        raise RecipeError(f"{which} has one model for all sites, none for {site!r} alone", hint="leave --site out")
    if site not in clusters["sites"]:
        raise StateError(
            f"the run in {run} knows no cluster of a site {site!r}",
            hint=f"its sites: {listed(clusters['sites'])}; without --site the largest cluster's model is used",
        )
    return _root(run, round) / "clusters" / str(clusters["sites"][site])


def _root(run: Path, round: int | None) -> Path:
    return run if round is None else run / "rounds" / f"{round:04d}"


def _clusters(run: Path, round: int | None) -> dict[str, Any]:
    """`clusters.json` of a run or a round (`federation/clusters.py`); empty where there is one model."""
    path = _root(run, round) / CLUSTERS
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StateError(f"{path} is damaged: {error}", hint="restore the folder from a copy") from error
    return found


def _with_adapter(base: Base, recipe: Recipe, folder: Path) -> Any:
    from peft import PeftModel

    try:
        if recipe.model.adapter.kind == "full":
            return load_weights(recipe.model, str(folder), dtype=base.model.dtype).to(base.device)
        model = PeftModel.from_pretrained(base.model, str(folder))
        _check_names(model, folder)
        return model
    except Exception as error:  # peft and transformers raise many kinds for damaged or foreign files
        raise ModelError(
            f"the adapter in {folder} does not fit model {recipe.model.name!r}" + because(error),
            hint="was the run moved to another base model, or the folder changed?",
        ) from error


def _check_names(model: Any, folder: Path) -> None:
    """The adapter's file holds the model's adapter tensors, no more and no fewer: peft passes over what does not fit.

    Raises:
        ValueError: it does not.
    """
    from peft import get_peft_model_state_dict

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        strange = set(file.keys()) ^ set(get_peft_model_state_dict(model))
    if strange:
        raise ValueError(f"{min(strange)} is in only one of them")


def score_run(
    run: Path, overrides: Sequence[str], *, round: int | None, base: bool, site: str | None, exact_match: bool
) -> dict[str, dict[str, Any]]:
    """Summaries by site as `score` gives them, each site scored with its own model if there are several: its
    cluster's, or, if it has none, the largest cluster's. With `site` all are scored with that site's; where that is a
    model of its own, on its own rows alone."""
    clusters = {} if base or site is not None else _clusters(run, round)
    if not clusters:
        result = open_result(run, overrides, round=round, base=base, site=site)
        alone = site is not None and has_own(result.recipe)
        return score(result, exact_match=exact_match, wanted=lambda name: not alone or name == site)
    of: Mapping[str, int] = clusters["sites"]
    found: dict[str, dict[str, Any]] = {}
    for cluster in sorted(set(of.values())):
        member = next(name for name, own in of.items() if own == cluster)
        result = open_result(run, overrides, round=round, base=False, site=member)
        own = partial(_is_of, of, cluster, clusters["adapter"])
        found |= score(result, exact_match=exact_match, wanted=own)
    return dict(sorted(found.items(), key=lambda item: list(of).index(item[0]) if item[0] in of else len(of)))


def _is_of(of: Mapping[str, int], cluster: int, default: int, name: str) -> bool:
    return of.get(name, default) == cluster


def score(
    result: Result, *, exact_match: bool, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, dict[str, Any]]:
    """Summaries by site (`evaluate.metrics.summarise`) on the held-out rows that the recipe's data section gives.

    Args:
        wanted: which sites.
    """
    recipe = result.recipe
    check_context(recipe, result.base)
    sites, _ = load_sites(
        recipe.data, seed=recipe.seed, tokenizer=result.base.tokenizer, max_tokens=recipe.training.max_tokens
    )
    found = {}
    for one in filter(lambda one: wanted(one.name), sites):
        scores = score_site(
            result.language_model,
            one.heldout,
            one.heldout_examples,
            result.base.tokenizer,
            max_tokens=recipe.training.max_tokens,
            generate=recipe.evaluation.max_new_tokens if exact_match or recipe.evaluation.exact_match else None,
        )
        found[one.name] = summarise(scores, one.groups, resamples=recipe.evaluation.resamples, seed=recipe.seed)
    return found


class Conversation:
    """Questions put the way that training put them, and the model's greedy answers.

    A chat keeps the turns so far; otherwise each question stands alone.
    """

    def __init__(self, result: Result, *, raw: bool, max_new_tokens: int) -> None:
        self.result, self.raw, self.max_new_tokens = result, raw, max_new_tokens
        self.turns: list[dict[str, str]] = []

    def ask(self, question: str) -> str:
        """Raises RecipeError: the recipe's prompt has no place for a question, or there is nothing to ask."""
        tokenizer = self.result.base.tokenizer
        prompt = prompt_ids(next(encode([self._example(question)], tokenizer, end_of_text=False)))
        if not len(prompt):
            raise RecipeError("there is nothing to ask", hint="give a question")
        said = answer(self.result.language_model, tokenizer, prompt, self.max_new_tokens).strip()
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
        return said

    def _example(self, question: str) -> Example:
        data, layout = self.result.recipe.data, self.result.layout
        if self.raw:
            return open_example(question)
        if data.messages is not None or (layout == "messages" and data.prompt is None and data.text is None):
            return open_turn(self.result.base.tokenizer, [*self.turns, {"role": "user", "content": question}])
        return question_example(data, layout, question)


def export_result(
    run: Path,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    merge: bool,
    round: int | None,
    site: str | None = None,
) -> dict[str, Any]:
    """Copy the adapter to `output`, that of a round or of a site, or write the merged model. Where rounds have added to
    the base, one adapter with both effects is written.

    Raises:
        StateError: `output` is not empty, or there is no such adapter.
        RecipeError: this kind of adapter cannot be merged.
    """
    recipe = _recipe(run, overrides)
    source = _adapter_folder(run, recipe, round, site)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise StateError(f"{output} is not an empty folder", hint="choose another")
    kind = recipe.model.adapter.kind
    with storage_errors(output):
        if merge and kind != "full":
            _merge(recipe, run, round, site, output)
        else:
            ignored = shutil.ignore_patterns("residual", "clusters", CLUSTERS)
            shutil.copytree(source, output, dirs_exist_ok=True, ignore=ignored)
            residuals = _residuals(run, recipe, round)
            if residuals is not None:
                save_combined(*residuals, source, output)
        size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    what = "full weights" if merge or kind == "full" else f"a {kind} adapter"
    return {"folder": str(output), "kind": what, "bytes": size}


def _merge(recipe: Recipe, run: Path, round: int | None, site: str | None, output: Path) -> None:
    if recipe.model.adapter.kind in ("prompt", "prefix", "p-tuning"):
        raise RecipeError(
            f"a {recipe.model.adapter.kind} adapter is learned tokens: there are no weights to merge it into",
            hint="export it without --merge",
        )
    if recipe.model.quantization != "none":
        raise RecipeError(
            f"the base is loaded in {recipe.model.quantization}: merging into rounded weights loses precision",
            hint="set model.quantization to none in a copy of the run's recipe.yaml, or export without --merge",
        )
    base = load_base(recipe.model, choose_device("cpu"))
    merged = _opened(base, recipe, run, round, site).merge_and_unload()
    merged.save_pretrained(str(output), safe_serialization=True)
    base.tokenizer.save_pretrained(str(output))
