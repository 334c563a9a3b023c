"""A run's result, opened again: to score it, to ask it, to hand it on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data.sites import load_sites
from .errors import ModelError, RecipeError, StateError
from .evaluate.metrics import summarise
from .evaluate.scoring import answer, score_site
from .federation.folder import storage_errors
from .model.base import Base, choose_device, load_base
from .recipe.load import load_recipe
from .recipe.schema import Recipe
from .train.loss import LanguageModel


@dataclass
class Result:
    """A run's model, ready to use: the recipe it came from, the base, and the base with the adapter."""

    recipe: Recipe
    base: Base
    model: Any
    language_model: LanguageModel


def open_result(run: Path, overrides: Sequence[str], *, round: int | None, base: bool) -> Result:
    """Open a run's result: its adapter, that of a round, or the base alone.

    Raises:
        StateError: the folder holds no run, or not that round's adapter.
        ModelError: the base model cannot be loaded, or the adapter does not fit it.
    """
    recipe = _recipe(run, overrides)
    loaded = load_base(recipe.model, choose_device(recipe.engine.device))
    model = loaded.model if base else _with_adapter(loaded, recipe, _adapter_folder(run, round))
    model.eval()
    return Result(recipe, loaded, model, LanguageModel(model))


def _recipe(run: Path, overrides: Sequence[str]) -> Recipe:
    if not (run / "recipe.yaml").exists():
        raise StateError(
            f"{run} holds no run", hint="name a folder that `commonweight run` made; `commonweight runs` lists them"
        )
    return load_recipe(run / "recipe.yaml", overrides)


def _adapter_folder(run: Path, round: int | None) -> Path:
    folder = run / "adapter" if round is None else run / "rounds" / f"{round:04d}"
    if folder.is_dir():
        return folder
    if round is None:
        raise StateError(
            f"the run in {run} has no adapter yet", hint="let it end, or name a round that is done by --round"
        )
    kept = ", ".join(str(int(f.name)) for f in sorted((run / "rounds").glob("*")) if f.name.isdigit())
    raise StateError(f"the run in {run} has no adapter of round {round}", hint=f"rounds kept: {kept or 'none'}")


def _with_adapter(base: Base, recipe: Recipe, folder: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    try:
        if recipe.model.adapter.kind == "full":
            return AutoModelForCausalLM.from_pretrained(str(folder), dtype=base.model.dtype).to(base.device)
        return PeftModel.from_pretrained(base.model, str(folder))
    except Exception as error:  # peft and transformers raise many kinds for damaged or foreign files
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the adapter in {folder} does not fit model {recipe.model.name!r}: {line}",
            hint="was the run moved to another base model, or the folder changed?",
        ) from error


def score(result: Result, *, exact_match: bool) -> dict[str, dict[str, Any]]:
    """Summaries by site (`evaluate.metrics.summarise`) on the held-out rows that the recipe's data section gives."""
    recipe = result.recipe
    sites, _ = load_sites(
        recipe.data, seed=recipe.seed, tokenizer=result.base.tokenizer, max_tokens=recipe.training.max_tokens
    )
    found = {}
    for site in sites:
        scores = score_site(
            result.language_model,
            site.heldout,
            site.heldout_examples,
            result.base.tokenizer,
            max_tokens=recipe.training.max_tokens,
            generate=recipe.evaluation.max_new_tokens if exact_match or recipe.evaluation.exact_match else None,
        )
        found[site.name] = summarise(scores, site.groups, resamples=recipe.evaluation.resamples, seed=recipe.seed)
    return found


class Conversation:
    """Questions put the way that the recipe put them in training, and the model's greedy answers.

    A chat recipe keeps the turns so far; for others each question stands alone.
    """

    def __init__(self, result: Result, *, raw: bool, max_new_tokens: int) -> None:
        self.result, self.raw, self.max_new_tokens = result, raw, max_new_tokens
        self.turns: list[dict[str, str]] = []

    def ask(self, question: str) -> str:
        prompt, begin = self._prompt(question)
        said = answer(
            self.result.language_model,
            self.result.base.tokenizer,
            prompt,
            max_new_tokens=self.max_new_tokens,
            begin=begin,
        ).strip()
        self.turns.append({"role": "assistant", "content": said})
        return said

    def _prompt(self, question: str) -> tuple[str, bool]:
        data, tokenizer = self.result.recipe.data, self.result.base.tokenizer
        self.turns.append({"role": "user", "content": question})
        if self.raw:
            return question, True
        if data.messages is not None and tokenizer.chat_template:
            text = tokenizer.apply_chat_template(self.turns, tokenize=False, add_generation_prompt=True)
            return str(text), False
        if data.prompt is not None:
            return fill_last(data.prompt, question), True
        return question, True


def fill_last(template: str, text: str) -> str:
    """A prompt template with `text` in its last place and the other places empty; double braces are single ones.

    Raises:
        RecipeError: the template has no place.
    """
    places = list(re.finditer(r"\{\{|\}\}|\{[^{}]*\}", template))
    real = [m for m in places if m.group() not in ("{{", "}}")]
    if not real:
        raise RecipeError("data.prompt has no {field} to put a question in", hint="use --raw")
    parts, end = [], 0
    for match in places:
        parts.append(template[end : match.start()])
        parts.append({"{{": "{", "}}": "}"}.get(match.group(), text if match is real[-1] else ""))
        end = match.end()
    return "".join([*parts, template[end:]])


def export_result(run: Path, output: Path, *, merge: bool, round: int | None) -> dict[str, Any]:
    """Copy the adapter to `output`, or write the merged model.

    Raises:
        StateError: `output` is not empty, or there is no such adapter.
        RecipeError: this kind of adapter cannot be merged.
    """
    recipe = _recipe(run, ())
    source = _adapter_folder(run, round)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise StateError(f"{output} is not an empty folder", hint="choose another")
    kind = recipe.model.adapter.kind
    with storage_errors(output):
        if merge and kind != "full":
            _merge(recipe, source, output)
        else:
            shutil.copytree(source, output, dirs_exist_ok=True)
        size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    what = "full weights" if merge or kind == "full" else f"a {kind} adapter"
    return {"folder": str(output), "kind": what, "bytes": size}


def _merge(recipe: Recipe, source: Path, output: Path) -> None:
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
    merged = _with_adapter(base, recipe, source).merge_and_unload()
    merged.save_pretrained(str(output), safe_serialization=True)
    base.tokenizer.save_pretrained(str(output))
