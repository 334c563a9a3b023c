"""A workbench: one base model with its adapter, and every site's data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from ..codec.feedback import Coder, coder_of
from ..data.canaries import Canaries, plant
from ..data.names import require_sites
from ..data.sites import Site, keep_aside, load_sites
from ..errors import RecipeError
from ..federation.folder import storage_errors
from ..federation.private_rounds import planned_round
from ..federation.tally import Sites
from ..model.adapters import adapter_off, attach_adapter, freeze, refuse_embeddings, save_adapter
from ..model.base import Base, choose_device, load_base, weights_digest
from ..model.moved_base import MovedBase
from ..model.shapes import Shape, shapes_of
from ..model.tensors import Layout, NamedTensors, on_cpu
from ..model.trainables import Trainables
from ..privacy.accounting import Releases
from ..recipe.compatibility import personal_parts
from ..recipe.problems import validate
from ..recipe.schema import PROMPT_KINDS, DataSpec, Method, Recipe
from ..recipe.source import Source
from ..registry import resolve
from ..seeding import derive_seed
from ..strategies.base import Strategy
from ..train import batches
from ..train.local import GradientObjective, Objective, Participant
from ..train.loss import LanguageModel, autocast_dtype
from ..train.per_example import check_examples
from .noise_secret import NoiseSecret

T = TypeVar("T")
NOTHING: Mapping[str, NamedTensors] = MappingProxyType({})


@dataclass
class Bench:
    """Everything that carrying out a recipe's tasks needs.

    Args:
        theta: the initial global tensors, as the adapter was made.
        partition: the partition report.
        base_digest: `weights_digest` of the base as it was loaded.
        frozen: adapter tensors that the strategy keeps out of training, and so out of `theta`; a copy.
        shapes: of the sites that hold less than the whole adapter.
        moved: the base's weights under the adapter, if the strategy adds to them.
        personal: the initial values of what sites train but keep to themselves, which are not in `theta` either.
        canaries: made-up rows, of which those planted are among the sites' training rows.
        coder: makes updates small, if the recipe asks for that.
        planned: with privacy of examples or groups, what a round releases of each site's.
        secret: what their noise is made of; whoever lets tasks be carried out says where it lies.
    """

    recipe: Recipe
    base: Base
    model: Any
    participant: Participant
    objective: Objective
    sites: dict[str, Site]
    theta: NamedTensors
    partition: dict[str, Any]
    base_digest: str
    frozen: NamedTensors = field(default_factory=lambda: NamedTensors.of({}))
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    moved: MovedBase | None = None
    personal: NamedTensors = field(default_factory=lambda: NamedTensors.of({}))
    canaries: Canaries | None = None
    coder: Coder | None = None
    planned: Mapping[str, Releases] = field(default_factory=dict)
    secret: NoiseSecret | None = None

    @property
    def must_match_too(self) -> dict[str, str]:
        """What sites must have alike beside the handshake: tensors that are drawn from the seed and never sent."""
        unsent = {"frozen tensors": self.frozen, "personal tensors": self.personal}
        return {what: tensors.digest() for what, tensors in unsent.items() if tensors}

    @property
    def state_layouts(self) -> dict[str, Layout]:
        """The layouts of groups of a site's private state that are not of `theta`'s."""
        return {"personal": self.personal.layout}

    @property
    def facts(self) -> Sites:
        """What the loop knows of the sites."""
        parts = {name: shape.layout.num_bytes for name, shape in self.shapes.items()}
        return replace(facts_of(self.recipe, self.sites.values()), bytes_up=parts, bytes_down=parts)

    def save(self, theta: NamedTensors, folder: Path, *, tokenizer: bool = False) -> None:
        """Write global tensors into a folder as an adapter that peft opens, with the tokenizer if asked for. What stays
        at the sites is in it as it was at first."""
        self.take_up(theta)
        self.save_as_is(folder, tokenizer=tokenizer)

    def save_as_is(self, folder: Path, *, tokenizer: bool = False) -> None:
        """Write the model as it stands."""
        with storage_errors(folder):
            save_adapter(self.model, self.base.tokenizer if tokenizer else None, folder)

    def take_up(self, theta: NamedTensors, state: Mapping[str, NamedTensors] = NOTHING) -> None:
        """Make the model the global one, with a site's personal parts; without private state with the initial ones."""
        trainables = self.participant.trainables
        trainables.shared.copy_(theta)
        trainables.personal.copy_(state.get("personal", self.personal))

    def pack_seed(self, site: str) -> int:
        return pack_seed(self.recipe, site)

    @contextmanager
    def base_as_loaded(self) -> Iterator[None]:
        """Inside, the adapter lies on the base as it was loaded, without what rounds have added to it."""
        with self.moved.as_loaded() if self.moved else nullcontext():
            yield

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """Inside, the model is the base as it was loaded, without the adapter and without what rounds have added."""
        with self.base_as_loaded(), adapter_off(self.model):
            yield


def pack_seed(recipe: Recipe, site: str) -> int:
    """Decides which of a site's examples share a packed sequence."""
    return derive_seed(recipe.seed, "pack", site)


def facts_of(recipe: Recipe, sites: Iterable[Site]) -> Sites:
    """What is known of sites by their rows."""
    spec, found = recipe.training, {site.name: site for site in sites}
    units = {name: len(site.units) for name, site in found.items()}
    rows = units
    if not recipe.privacy.noisy_steps:
        rows = {name: len(batches.sequences(site.train, spec, pack_seed(recipe, name))) for name, site in found.items()}
    steps = {name: spec.steps_within_budget(name, batches.num_steps(spec, rows[name])) for name in found}
    return Sites(tuple(found), steps, {name: site.groups for name, site in found.items()}, units=units)


class Gather(Protocol):
    """Whence a bench has its sites: `load_sites`, or something of its signature."""

    def __call__(
        self, spec: DataSpec, *, seed: int, tokenizer: Any, max_tokens: int, owner: str | None
    ) -> tuple[list[Site], dict[str, Any]]: ...


def without_data(
    spec: DataSpec, *, seed: int, tokenizer: Any, max_tokens: int, owner: str | None
) -> tuple[list[Site], dict[str, Any]]:
    """Gathers nothing: for a bench whose model alone is wanted."""
    return [], {}


def build_bench(recipe: Recipe, *, gather: Gather = load_sites) -> Bench:
    """Read the data, load the base model, attach the adapter.

    Args:
        gather: gives the sites and the partition report.

    Raises:
        DataError, ModelError, RecipeError: as their parts say.
    """
    spec = recipe.model
    base = load_base(spec, choose_device(recipe.engine.device))
    check_context(recipe, base)
    sites, partition = gather(
        recipe.data,
        seed=recipe.seed,
        tokenizer=base.tokenizer,
        max_tokens=recipe.training.max_tokens,
        owner=recipe.privacy.by,
    )
    if sites:  # whoever builds a bench without data cannot know their names
        names = [site.name for site in sites]
        require_sites(recipe.training.budget, names, "training.budget")
        require_sites(spec.adapter.sites, names, "model.adapter.sites")
        require_sites(spec.adapter.budget, names, "model.adapter.budget")
    sites, canaries = with_canaries(recipe, sites, base.tokenizer)
    frozen_part = asked_by_strategy(recipe, "frozen", "")
    digest = weights_digest(base.model)  # before the adapter's tensors join it
    model = attach_adapter(base, spec.adapter, seed=derive_seed(recipe.seed, "adapter"))
    if recipe.training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    frozen = freeze(model, frozen_part) if frozen_part else NamedTensors.of({})
    if asked_by_strategy(recipe, "personal", ()):
        refuse_embeddings(model, "shared")
    trainables = Trainables(model, personal_parts(recipe))
    language_model = LanguageModel(model, autocast_dtype=autocast_dtype(recipe.training, base.device))
    if recipe.training.packing and not language_model.keeps_packed_apart():
        raise RecipeError(
            f"training.packing: in model {base.name!r} the examples of a packed sequence would see each other",
            hint="use packing: false with this architecture",
        )
    objective = _objective(recipe.training.objective)
    channels = len(asked_by_strategy(recipe, "update_channels", ("delta",)))
    private = recipe.privacy.noisy_steps
    if private:
        _check_private(recipe, objective, language_model, trainables)
    bench = Bench(
        recipe,
        base,
        model,
        Participant(language_model, trainables),
        objective,
        {s.name: s for s in sites},
        on_cpu(trainables.shared),
        partition,
        digest,
        frozen,
        shapes_of(spec.adapter, trainables.shared.layout),
        MovedBase(model) if asked_by_strategy(recipe, "moves_base", False) else None,
        on_cpu(trainables.personal),
        canaries,
        coder_of(recipe.compression, trainables.shared.layout, recipe.seed, channels, common=recipe.privacy.summed),
    )
    if private:
        facts = bench.facts
        bench.planned = {
            name: planned_round(recipe, units=facts.units[name], steps=facts.steps[name]) for name in facts.names
        }
    return bench


def _check_private(recipe: Recipe, objective: Objective, language_model: LanguageModel, trainables: Trainables) -> None:
    """Raises RecipeError: with this objective, model or adapter examples have no gradients of their own."""
    if not (isinstance(objective, GradientObjective) and objective.of_examples):
        raise RecipeError(
            f"privacy.dp {recipe.privacy.dp}: the objective {objective.name!r} does not say that its loss is a sum "
            "over examples",
            hint="use training.objective sft, or say so in its class (`of_examples`) if it is true",
        )
    check_examples(language_model, trainables, objective.backward, packing=recipe.training.packing)


def trained_on(recipe: Recipe, sites: list[Site]) -> list[Site]:
    """The sites without the rows that the recipe's strategy keeps out of training."""
    share = asked_by_strategy(recipe, "aside", 0.0)
    return [keep_aside(site, share, seed=recipe.seed) if share else site for site in sites]


def with_canaries(recipe: Recipe, sites: list[Site], tokenizer: Any) -> tuple[list[Site], Canaries | None]:
    """The sites as a run trains on them: `trained_on`, and with the canaries that the recipe plants."""
    sites = trained_on(recipe, sites)
    if sites and recipe.privacy.canaries.count:
        return plant(sites, recipe.privacy.canaries, seed=recipe.seed, tokenizer=tokenizer)
    return sites, None


def asked_by_strategy(recipe: Recipe, attribute: str, otherwise: T) -> T:
    """What the recipe's strategy asks of a model, such as a part to freeze; see `recipe_strategy`."""
    found: T = getattr(recipe_strategy(recipe), attribute, otherwise)
    return found


def recipe_strategy(recipe: Recipe) -> Strategy | None:
    """The recipe's strategy, for what it says of the sites' work. A site need not have its code, which runs at the
    coordinator: if it freezes something or keeps it at the sites, the layouts then differ, and the handshake says so.
    """
    method = recipe.federation.strategy
    try:
        kind = resolve("strategy", method.name)
    except RecipeError:
        return None
    options = validate(kind.Options, Source(method.options), ("federation", "strategy"))
    strategy: Strategy = kind(options)
    return strategy


def _objective(method: Method) -> Objective:
    kind = resolve("objective", method.name)
    options = validate(kind.Options, Source(method.options), ("training", "objective"))
    objective: Objective = kind(options)
    return objective


def check_context(recipe: Recipe, base: Base) -> None:
    """Raises RecipeError: `training.max_tokens` is more than the model has positions for."""
    adapter = recipe.model.adapter
    virtual = adapter.virtual_tokens if adapter.kind in PROMPT_KINDS else 0
    if base.context is not None and recipe.training.max_tokens + virtual > base.context:
        raise RecipeError(
            f"training.max_tokens is {recipe.training.max_tokens}"
            + (f" and the adapter adds {virtual} tokens" if virtual else "")
            + f", but model {base.name!r} has positions for {base.context} tokens",
            hint=f"set training.max_tokens to at most {base.context - virtual}",
        )
