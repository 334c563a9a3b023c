"""A recipe from a file or a built-in name, with overrides: checked as a whole before anything starts.

`load_recipe` goes file → source (values with their lines) → overrides → validation, and needs neither torch nor a
network. `check_methods` lets the strategy's and the objective's own classes check their options, so it imports them.
The way back, from a recipe to text, is `resolved.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from pydantic import BaseModel

from commonweight import registry
from commonweight.errors import RecipeError

from .compatibility import check_pairings
from .overrides import apply_overrides
from .problems import validate
from .resolved import recipe_differences, recipe_digest, recipe_text
from .schema import NO_STAGE, STAGES, CodecSpec, Method, Recipe
from .source import Source, read_source

__all__ = [
    "builtin_recipes",
    "builtin_text",
    "check_methods",
    "load_recipe",
    "parse_recipe",
    "recipe_differences",
    "recipe_digest",
    "recipe_text",
]

MAX_BYTES = 1 << 20


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file, or the name of a built-in recipe (a file of that name comes first).
        overrides: `key.sub=value` texts, the value in YAML, applied in order.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or fields are wrong: all of them are named.
    """
    source = _builtin(str(path)) or read_source(_file_text(Path(path)), Path(path).name)
    return validate(Recipe, apply_overrides(source, overrides, Recipe))


def parse_recipe(text: str, label: str) -> Recipe:
    """Check a recipe that came as text; `label` stands for its file in messages.

    Raises:
        RecipeError: as `load_recipe`.
    """
    if len(text.encode()) > MAX_BYTES:
        raise RecipeError(f"{label} is longer than {MAX_BYTES:,} bytes", hint="a recipe is a page of YAML")
    return validate(Recipe, read_source(text, label))


def check_methods(recipe: Recipe, *, network: bool = False, objective: bool = True) -> None:
    """Find the classes of the recipe's strategy and objective, let each check its own options, and look up whether the
    strategy goes with what else the recipe asks for, carried out over a network or not (`compatibility.py`).

    A method's class has an attribute `Options`, a pydantic model with `extra="forbid"`. This imports the classes, and
    with them whatever they import; without `objective`, the strategy's alone.

    Raises:
        RecipeError: no such method, an option that it does not take, or a pairing that does not work.
    """
    _check_method("strategy", ("federation", "strategy"), recipe.federation.strategy)
    if objective:
        _check_method("objective", ("training", "objective"), recipe.training.objective)
    check_codecs(recipe, network=network)
    check_pairings(recipe, network=network)
    if network and recipe.privacy.secure_aggregation == "homomorphic":
        raise RecipeError(
            "`privacy.secure_aggregation` homomorphic: over a network one site would have to decrypt for the "
            "coordinator, and could not tell a sum from a single site's update",
            hint="set it to on: masks, which no single site can take off, an eighth of the bytes and less time; or "
            "carry the recipe out by `commonweight run`",
        )
    if network and recipe.privacy.canaries.count:
        raise RecipeError(
            "`privacy.canaries`: over a network nobody may see which canaries a site has planted and ask the model too",
            hint="leave it out, or carry the recipe out by `commonweight run`, where all rows are at hand",
        )


def check_codecs(recipe: Recipe, *, network: bool) -> None:
    """Find the classes of the stages that make tensors small, and let each check its options.

    Raises:
        RecipeError: no such stage, an option that it does not take; or, over a network, one that is not commonweight's
            own, whose class is not imported.
    """
    both: tuple[CodecSpec, ...] = (recipe.compression, recipe.compression.down)
    for spec, stage, kind in ((spec, *item) for spec in both for item in STAGES.items()):
        method, loc = getattr(spec, stage), (*spec.loc, stage)
        if method.name == NO_STAGE:
            continue
        if network and method.name not in registry.built_in(kind):
            raise RecipeError(
                f"`{'.'.join(loc)}`: {method.name!r} is not commonweight's own, and both ends of a network "
                "must read a payload alike",
                hint=f"use one of {', '.join(registry.names(kind))}, or carry the recipe out by `commonweight run`",
            )
        _check_method(kind, loc, method)


def builtin_recipes() -> list[str]:
    """The names of the built-in recipes, sorted."""
    return sorted(entry.name[:-5] for entry in _builtin_folder().iterdir() if entry.name.endswith(".yaml"))


def builtin_text(name: str) -> str:
    """A built-in recipe as it was written, comments and all."""
    return (_builtin_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def _builtin_folder() -> Traversable:
    return resources.files("commonweight.recipe") / "builtin"


def _builtin(name: str) -> Source | None:
    if name not in builtin_recipes() or Path(name).is_file():
        return None
    return read_source(builtin_text(name), f"{name}.yaml")


def _check_method(kind: str, path: tuple[str, ...], method: Method) -> None:
    try:
        found = registry.resolve(kind, method.name)
    except RecipeError as error:
        raise RecipeError(f"`{'.'.join(path)}`: {error.message}", hint=error.hint) from error
    options = getattr(found, "Options", None)
    if not (isinstance(options, type) and issubclass(options, BaseModel)):
        raise RecipeError(
            f"`{'.'.join(path)}`: the class behind {method.name!r} declares no options",
            hint="give it a class attribute Options: a pydantic model of its options, empty if it takes none",
        )
    validate(options, Source(method.options), path)


def _file_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder, not a recipe", hint=_inside(path)) from None
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}", hint=_nearest(path)) from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", hint="check its name and permissions") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path} is larger than 1 MiB: this is no recipe", hint="data is named in data.path")
    return _decoded(raw, path)


def _decoded(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"byte 0x{raw[error.start]:02x} at {path.name}:{line}"
        raise RecipeError(f"{path} is not UTF-8 text: {what}", hint="save it as UTF-8") from None


def _inside(folder: Path) -> str:
    found = _recipes_in(folder)
    if not found:
        return "name a YAML file"
    return "it holds " + ", ".join(str(folder / name) for name in found[:5])


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    here = {entry: str(path.parent / entry) for entry in _recipes_in(path.parent)}
    known = here if path.suffix else {name: name for name in builtin_recipes()} | here
    near = difflib.get_close_matches(path.name, known, n=3, cutoff=0.75)
    if near:
        return f"did you mean {' or '.join(known[name] for name in near)}?"
    beside = f"that folder holds {', '.join(list(here)[:5])}; " if here else ""
    return f"{beside}built in: {', '.join(builtin_recipes())}"


def _recipes_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
    except OSError:
        return []
