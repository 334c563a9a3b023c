"""What to run: the recipe, one typed schema.

Every field is documented here and nowhere else; `docs/recipe.md` and the JSON Schema are generated from it. The schema
checks types, ranges and contradictions between fields; whether a path exists or a field is in the data is checked
where it is opened. Methods (`federation.strategy`, `training.objective`) keep their own options beside their code.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

TINY_MODEL = "commonweight/tiny"
DEMO_DATA = "commonweight/consortium"

PROMPT_KINDS = ("prompt", "prefix", "p-tuning")
LORA_KINDS = ("lora", "dora", "rslora")
#: our choice: enough that a group's gradient is not one row's, few enough that a step stays short
ROWS_PER_GROUP = 4
#: adapters that consist of pairs A, B and nothing else
PAIRED_KINDS = ("lora", "rslora")

Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, and it is never changed once it is built."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Method(BaseModel):
    """A method by name, with its own options: `fedadam`, or `{name: fedadam, lr: 0.01}`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(description="A registered name, or `package.module:Class`.", min_length=1)

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside `name`; the method's own class checks them."""
        return dict(self.model_extra or {})


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


MethodField = Annotated[Method, BeforeValidator(_named)]


class SiteAdapterSpec(Section):
    """One site's part of the adapter, for strategies that combine sites of different shapes. What is left out is the
    adapter's own.
    """

    r: int | None = Field(None, ge=1, description="The site's rank, at most the adapter's.")
    alpha: float | None = Field(
        None, gt=0, description="The site's α. Default: the one at which its scale is the adapter's."
    )
    targets: list[str] | None = Field(
        None, min_length=1, description="Names of the modules that the site trains, among the adapter's."
    )
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="Transformer blocks that the site trains, counted from 0."
    )


class AdapterSpec(Section):
    """The small part of the model that is trained and sent."""

    kind: Literal["lora", "dora", "rslora", "ia3", "prompt", "prefix", "p-tuning", "full"] = Field(
        "lora",
        description="`lora`; `dora` (weight-decomposed); `rslora` (scale α/√r); `ia3` (learned rescaling vectors); "
        "`prompt`, `prefix`, `p-tuning` (learned virtual tokens); `full` trains every weight.",
    )
    r: int = Field(8, ge=1, description="LoRA rank.")
    alpha: float = Field(16, gt=0, description="LoRA α: the update is scaled by α/r (`rslora`: α/√r).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of the LoRA branch.")
    targets: Literal["all-linear", "auto"] | list[str] = Field(
        "all-linear",
        description="Modules that get an adapter: `all-linear`, `auto` (peft's choice for the architecture), or module "
        "names.",
    )
    virtual_tokens: int = Field(16, ge=1, description="Length of the learned prompt (`prompt`, `prefix`, `p-tuning`).")
    sites: dict[str, SiteAdapterSpec] = Field(
        {},
        description="Sites that train and send a part of the adapter only, by name: "
        "`{clinic: {r: 4, targets: [q_proj, v_proj]}}`.",
    )
    budget: dict[str, Share] = Field(
        {},
        description="Small sites, by name: the share of the adapter's parameters that a site may hold. "
        "`{clinic: 0.25}`. Its rank is lowered to that share of `r`, rounded down. Where not even rank 1 fits, only as "
        "many of the last blocks are trained as fit at rank 1.",
    )

    @property
    def shaped(self) -> tuple[str, ...]:
        """The sites that may hold less than the whole adapter."""
        return (*self.sites, *self.budget)

    @property
    def scale(self) -> float:
        """s, by which LoRA's product is multiplied."""
        return self.scale_of(self.alpha, self.r)

    def scale_of(self, alpha: float, r: int) -> float:
        """α/r, or for `rslora` α/√r."""
        return alpha / math.sqrt(r) if self.kind == "rslora" else alpha / r

    @model_validator(mode="after")
    def _parts_lie_inside(self) -> Self:
        if self.shaped and self.kind not in PAIRED_KINDS:
            raise ValueError(
                f"`sites` and `budget` cut a lora or rslora adapter to size, and kind is {self.kind}; use one of the "
                "two, or leave them out"
            )
        for site, own in self.sites.items():
            if site in self.budget:
                raise ValueError(f"{site} is in `sites` and in `budget`; say its shape, or let the budget choose it")
            if own.r is not None and own.r > self.r:
                raise ValueError(
                    f"sites.{site}.r is {own.r}, above the adapter's r of {self.r}, which is the largest of all"
                )
        return self


class ModelSpec(Section):
    """The base model. It is frozen unless the adapter is `full`."""

    name: str = Field(
        TINY_MODEL,
        min_length=1,
        description=f"A folder in transformers layout, a hub id, or the built-in `{TINY_MODEL}`.",
    )
    revision: str | None = Field(None, description="A hub id's revision (commit, tag or branch).")
    tokenizer: str | None = Field(
        None, description="A tokenizer from elsewhere: a folder or hub id. Default: the model's."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the base weights. `auto`: float32 on CPU, bfloat16 on a GPU."
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="Load the base in 8 or 4 bits through bitsandbytes. Needs a CUDA GPU."
    )
    trust_remote_code: Literal[False] = Field(False, description="Always false: code from a model folder is never run.")
    adapter: AdapterSpec = Field(default_factory=AdapterSpec, description="The trained part.")

    @model_validator(mode="after")
    def _full_needs_whole_weights(self) -> Self:
        if self.adapter.kind == "full" and self.quantization != "none":
            raise ValueError(
                f"adapter.kind full trains the base weights, which quantization {self.quantization} freezes; "
                "use adapter.kind lora, or quantization none"
            )
        return self


class SitesSpec(Section):
    """How rows fall to sites."""

    scheme: Literal["field", "file", "iid", "dirichlet", "shards", "quantity"] = Field(
        "field",
        description="`field`: one site for each value of `by`. `file`: one for each data file. `iid`: shuffled evenly. "
        "`dirichlet`: each value of `by` is spread over sites by Dirichlet(`alpha`). `shards`: rows sorted by `by`, "
        "cut, and `shards_per_site` dealt to each. `quantity`: IID in kind, sizes by Dirichlet(`alpha`).",
    )
    by: str | None = Field(None, description="Field that decides: `field`, `dirichlet` and `shards` need it.")
    count: int | None = Field(
        None, ge=1, description="Number of sites: `iid`, `dirichlet`, `shards` and `quantity` need it."
    )
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; smaller is more skewed.")
    shards_per_site: int = Field(2, ge=1, description="`shards`: pieces dealt to each site.")
    only: list[str] | None = Field(None, description="Keep only these sites, by name.")
    largest: int | None = Field(None, ge=1, description="Keep only the sites with the most rows.")
    min_rows: int = Field(1, ge=1, description="Leave out sites with fewer rows than this, before the held-out split.")
    take: int | None = Field(None, ge=1, description="At most this many training rows a site, drawn by the seed.")

    @model_validator(mode="after")
    def _scheme_has_what_it_needs(self) -> Self:
        if self.scheme in ("field", "dirichlet", "shards") and self.by is None:
            raise ValueError(f"scheme {self.scheme} needs `by`: the name of the field that decides the site")
        if self.scheme in ("iid", "dirichlet", "shards", "quantity") and self.count is None:
            raise ValueError(f"scheme {self.scheme} needs `count`: the number of sites")
        if self.scheme in ("field", "file") and self.count is not None:
            raise ValueError(
                f"`count` makes sites for iid, dirichlet, shards and quantity, but scheme {self.scheme} takes them as "
                "they are; `largest` keeps only so many"
            )
        return self


class HoldoutSpec(Section):
    """Rows of each site kept for testing, never trained on by any site."""

    by: str | None = Field(
        None,
        description="Group field (patient, disease, document): a group is held out, or trained on, everywhere as a "
        "whole. Rows without a value are left out and counted. Default: a row's own text (copies stay together).",
    )
    examples: int | None = Field(None, ge=1, description="Held-out rows a site.")
    fraction: float | None = Field(None, gt=0, lt=1, description="Held-out share of a site's rows. Default 0.2.")

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.examples is not None and self.fraction is not None:
            raise ValueError("give `examples` or `fraction`, not both")
        return self


class DataSpec(Section):
    """Where the rows are and how a row becomes an example.

    With neither `prompt`/`completion`, `messages` nor `text` given, the fields decide: `messages`; else
    `prompt` + `completion`; else `instruction` (+ `input`) + `output`; else `question` + `answer`; else `text`.
    A row in which a needed field is null or missing, or whose completion is blank, is left out and counted.
    """

    path: str = Field(
        DEMO_DATA,
        min_length=1,
        description=f"A file, a folder of files, a dataset folder or hub id, or the built-in `{DEMO_DATA}`.",
    )
    format: Literal["auto", "json", "jsonl", "csv", "parquet", "text", "dataset"] = Field(
        "auto", description="File format; `auto` goes by the name's ending (`.gz` may follow)."
    )
    split: str = Field("train", description="Split of a dataset folder or hub id.")
    prompt: str | None = Field(None, description="Template of what is given, with `{field}` places; not trained on.")
    completion: str | None = Field(None, description="Template of what is learned, with `{field}` places.")
    messages: str | None = Field(
        None, description="Field with chat messages (role, content); the tokenizer's chat template applies."
    )
    text: str | None = Field(None, description="Template of plain text, all of it learned, with `{field}` places.")
    paragraphs: Literal["line", "blank-line", "file"] = Field(
        "blank-line", description="Plain text files: what one row is."
    )
    pattern: str | None = Field(
        None,
        description="Plain text files: a regular expression whose named groups become the row's fields, beside `text` "
        "(the whole paragraph, unless a group has that name). Paragraphs without a match are left out and counted.",
    )
    chunks: bool = Field(
        False,
        description="Plain text: join each site's rows, after the held-out split, and cut them into pieces of "
        "`training.max_tokens`; `sites.take` and `holdout.examples` then count pieces.",
    )
    options: str | None = Field(None, description="Field with a list of answer options: evaluates multiple choice.")
    answer: str | None = Field(None, description="With `options`: field with the right option's index or text.")
    end_of_text: bool = Field(True, description="Learn the tokenizer's end-of-text token after each completion.")
    sites: SitesSpec = Field(default_factory=lambda: SitesSpec(by="site"), description="How rows fall to sites.")
    holdout: HoldoutSpec = Field(default_factory=HoldoutSpec, description="What is kept for testing.")

    @model_validator(mode="after")
    def _one_way_to_read_a_row(self) -> Self:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("`prompt` and `completion` go together; for text without a prompt use `text`")
        ways = [
            n for n, v in (("prompt/completion", self.prompt), ("messages", self.messages), ("text", self.text)) if v
        ]
        if len(ways) > 1:
            raise ValueError(f"give one of {' and '.join(ways)}, not both")
        if (self.options is None) != (self.answer is None):
            raise ValueError("`options` and `answer` go together")
        return self

    @model_validator(mode="after")
    def _plain_text_options(self) -> Self:
        if self.pattern is not None:
            if self.format not in ("auto", "text"):
                raise ValueError(f"`pattern` reads plain text files, but format is {self.format}")
            _check_pattern(self.pattern)
        if self.chunks and (self.prompt is not None or self.messages is not None or self.options is not None):
            raise ValueError("`chunks` joins plain text, which `prompt`, `messages` and `options` are not; use `text`")
        return self


def _check_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise ValueError(f"`pattern` {pattern!r} is not a regular expression: {error}") from error
    if not groups:
        raise ValueError(f"`pattern` {pattern!r} has no named group, such as (?P<text>.*), to become a field")


class TrainingSpec(Section):
    """A site's local work in one round."""

    objective: MethodField = Field(
        default_factory=lambda: Method(name="sft"), description="What is optimised: `sft`, or a method of one's own."
    )
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="Local optimizer; its state starts fresh each round."
    )
    lr: float = Field(1e-3, gt=0, description="Local learning rate in round 1, after warm-up.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="Learning rate across rounds (constant inside a round): falls to `lr × final_lr_ratio`."
    )
    final_lr_ratio: float = Field(0.1, ge=0, le=1, description="Last round's learning rate over the first's.")
    warmup_rounds: int = Field(0, ge=0, description="Rounds over which the learning rate rises to `lr`.")
    epochs: float | None = Field(None, gt=0, description="Passes over the site's examples a round. Default 1.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps a round, instead of `epochs`.")
    budget: dict[str, Share] = Field(
        {},
        description="Slow sites, by name: the share of its steps that a site takes, rounded down, at least one step. "
        "`{clinic: 0.25}`. The strategy `fednova` evens out what unequal steps do.",
    )
    batch_size: int = Field(
        8,
        ge=1,
        description="Examples (packed: sequences) an optimizer step; with `privacy.dp` example or group the number of "
        "examples or groups to be expected, packed or not.",
    )
    micro_batch_size: int | Literal["auto"] = Field(
        "auto",
        description="Examples a forward pass; gradients accumulate over a batch, weighted by tokens, so that the step "
        "is the same to rounding. `auto`: about 1,024 tokens on CPU, the whole batch on a GPU. With `privacy.dp` "
        "example or group a copy of the adapter's gradient is held for each, packed or not.",
    )
    max_tokens: int = Field(512, ge=2, description="Tokens an example (packed: a sequence); longer ones are cut.")
    packing: bool = Field(False, description="Fill sequences with several examples, attention kept apart at the seams.")
    clip_norm: float | None = Field(
        1.0,
        gt=0,
        description="Gradient norm bound a step; null: none. With `privacy.dp` example or group `privacy.clip` bounds "
        "each one's gradient in its place.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled for AdamW, L2 for SGD.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's β₁, β₂.")
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD's momentum.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Arithmetic: `bfloat16` is autocast. `auto`: float32 on CPU, bfloat16 on a GPU."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give `epochs` or `steps`, not both")
        if isinstance(self.micro_batch_size, int) and self.micro_batch_size > self.batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} is larger than batch_size {self.batch_size}")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self

    def steps_within_budget(self, site: str, steps: int) -> int:
        """How many of a round's `steps` a site takes."""
        return max(1, math.floor(self.budget.get(site, 1.0) * steps + 1e-9))


class CohortSpec(Section):
    """Which sites take part in a round: `all`, a `fraction` of them, or a `count`."""

    fraction: float | None = Field(
        None, gt=0, le=1, description="Share of the sites, drawn anew each round by the seed."
    )
    count: int | None = Field(None, ge=1, description="Number of sites, drawn anew each round by the seed.")

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.fraction is not None and self.count is not None:
            raise ValueError("give `fraction` or `count`, not both")
        return self

    def size(self, num_sites: int) -> int:
        """How many of `num_sites` a round invites."""
        if self.count is not None:
            return min(self.count, num_sites)
        if self.fraction is not None:
            return max(1, math.ceil(self.fraction * num_sites - 1e-9))
        return num_sites


def _cohort(value: object) -> object:
    if value == "all":
        return {}
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return {"count": value}
    if isinstance(value, float):
        return {"fraction": value}
    return value


class ClockSpec(Section):
    """Simulation: how fast each site works, on a virtual clock. Without `speeds` or `fastest` there is no clock.

    The simulation of an asynchronous strategy goes by the clock (over a network sites are as fast as they are); of a
    synchronous run, the metrics say how long each round would have taken: as long as its slowest site.
    """

    speeds: list[float] | None = Field(
        None, description="Each site's optimizer steps a virtual second, in the order of the sites."
    )
    slowest: float | None = Field(None, gt=0, description="Instead: the slowest site's speed …")
    fastest: float | None = Field(None, gt=0, description="… and the fastest's.")
    spread: Literal["even", "lognormal"] = Field(
        "even",
        description="Speeds between `slowest` and `fastest`: at even distances, dealt to the sites by the seed, or "
        "drawn from a log-normal distribution, of which four standard deviations lie between the two.",
    )
    availability: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Chance that a site carries a task through; a try that breaks off costs as long and is repeated.",
    )

    @property
    def runs(self) -> bool:
        """Whether there is a clock."""
        return self.speeds is not None or self.fastest is not None

    @model_validator(mode="after")
    def _speeds_in_one_way(self) -> Self:
        if (self.slowest is None) != (self.fastest is None):
            raise ValueError("`slowest` and `fastest` go together")
        if self.slowest is not None and self.fastest is not None:
            if self.speeds is not None:
                raise ValueError("give `speeds`, or `slowest` and `fastest`, not both")
            if self.slowest > self.fastest:
                raise ValueError(f"slowest {self.slowest:g} is above fastest {self.fastest:g}")
        if self.speeds is not None and not (self.speeds and all(speed > 0 for speed in self.speeds)):
            raise ValueError(f"speeds {self.speeds} must be numbers above 0, one for each site")
        if not self.runs and (self.availability < 1 or self.spread != "even"):
            raise ValueError("a clock needs `speeds`, or `slowest` and `fastest`")
        return self


class FederationSpec(Section):
    """Rounds, who takes part, and how updates combine."""

    rounds: int = Field(10, ge=1, description="Number of rounds.")
    cohort: Annotated[CohortSpec, BeforeValidator(_cohort)] = Field(
        default_factory=CohortSpec,
        description="`all`, a whole number of sites, a fraction, or `{fraction: …}` / `{count: …}`.",
    )
    quorum: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the cohort that must answer; a round below it ends the run with an error. An "
        "asynchronous strategy has its `buffer` instead.",
    )
    min_sites: int = Field(
        1,
        ge=1,
        description="And at least this many sites must answer; an asynchronous strategy's `buffer` is no smaller.",
    )
    over_selection: float = Field(
        1.0,
        ge=1,
        le=10,
        description="Invite this many times the cohort, and close a round when as many have answered as the cohort "
        "asks for: 1.3 spares a round the wait for its slowest sites. Which answers come first decides the result.",
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="Seconds after which a round closes without those still working. Null: wait for all. "
        "With a deadline the result depends on the machine's speed.",
    )
    patience_s: float = Field(
        10.0,
        gt=0,
        description="Networked runs: a round waits this long for a site that is away (unreachable, restarting), as "
        "long as its quorum can be met without it; without a quorum it waits on, up to `deadline_s`. An asynchronous "
        "run then gives its place among those who work at once to another.",
    )
    retries: int = Field(1, ge=0, description="Times a site's task is repeated after its worker died.")
    strategy: MethodField = Field(
        default_factory=lambda: Method(name="fedavg"),
        description="How updates combine; `commonweight methods` lists them.",
    )
    relays: dict[str, list[str]] = Field(
        {},
        description="Regions: a relay's name, and the sites whose updates it adds up before the coordinator gets their "
        "sum alone. `{north: [clinic, hospital]}`. A site that is in none sends to the coordinator.",
    )
    personal: list[Annotated[str, Field(pattern=r"^[^.\s]+(\.[^.\s]+)*$")]] = Field(
        [],
        description="Tensors that each site trains and keeps to itself, by parts of their names: `[layers.3]` is a "
        "block, `[lora_B]` a half of every LoRA pair. They are never sent or averaged; a site uses its own.",
    )
    clock: ClockSpec = Field(default_factory=ClockSpec, description="Simulation: the sites' speeds.")
    weighting: Literal["examples", "tokens", "uniform"] = Field(
        "examples", description="A site's weight in the mean: examples or label tokens it trained on, or all alike."
    )

    @model_validator(mode="after")
    def _one_relay_a_site(self) -> Self:
        listed = [site for sites in self.relays.values() for site in sites]
        twice = next((site for place, site in enumerate(listed) if site in listed[:place]), None)
        if twice is not None:
            raise ValueError(f"relays name the site {twice!r} twice; a site has one relay, or none")
        empty = next((relay for relay, sites in self.relays.items() if not (relay and sites)), None)
        if empty is not None:
            raise ValueError(f"the relay {empty!r} has no site, or no name")
        if self.relays and self.over_selection > 1:
            raise ValueError(
                "`relays` and `over_selection` do not go together: a region's sum cannot be taken in part when enough "
                "have answered"
            )
        return self

    @property
    def relay_of(self) -> dict[str, str]:
        """The relay of each site that has one."""
        return {site: relay for relay, sites in self.relays.items() for site in sites}


class EvaluationSpec(Section):
    """What is measured, on each site's held-out rows."""

    controls: list[Literal["base", "local", "centralised"]] = Field(
        ["base", "local", "centralised"],
        description="Arms to compare with: `base` (untouched), `local` (each site alone), `centralised` (all data "
        "pooled).",
    )
    every: int = Field(
        1, ge=1, description="Evaluate the global model after every so many rounds (and after the last)."
    )
    exact_match: bool = Field(False, description="Generate answers for held-out prompts and count exact matches.")
    max_new_tokens: int = Field(64, ge=1, description="Length bound of generated answers.")
    samples: int = Field(1, ge=0, description="Held-out prompts answered before and after, for the report.")
    resamples: int = Field(1000, ge=100, description="Bootstrap resamples behind each 95 % interval.")


class EngineSpec(Section):
    """Where participants run."""

    kind: Literal["in-process"] = Field("in-process", description="`in-process`: worker processes on this machine.")
    workers: int | Literal["auto"] = Field(
        "auto",
        description="Worker processes, each with one thread. `auto`: one a core on CPU, one on a GPU. The result does "
        "not depend on it.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto`: a GPU if there is one.")

    @model_validator(mode="after")
    def _some_workers(self) -> Self:
        if isinstance(self.workers, int) and self.workers < 1:
            raise ValueError(f"workers {self.workers} must be at least 1, or auto")
        return self


class CanariesSpec(Section):
    """Made-up rows by which `commonweight audit` bounds ε from below; simulations only. Each is put among a site's
    training rows, or not, by a coin of its own; it has the length of one of them, and random tokens.
    """

    count: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Number of canaries, of which about a half is planted. 0: none; else at least 8.",
    )
    sites: Literal["all"] | list[str] = Field("all", description="Sites to which canaries are dealt in turn.")
    repeat: int = Field(1, ge=1, le=1000, description="How often a planted canary is among its site's rows.")

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if not self.count and (self.sites != "all" or self.repeat != 1):
            raise ValueError("`sites` and `repeat` do nothing without `count`; give one, or remove them")
        if 0 < self.count < 8:
            raise ValueError(f"count {self.count} is too few to show anything; plant at least 8, better some hundreds")
        if not self.sites:
            raise ValueError("sites is empty; name some, or leave it out for all")
        return self


class AdaptiveClipSpec(Section):
    """A clipping norm that follows the updates' norms."""

    quantile: float = Field(
        0.5, gt=0, lt=1, description="γ: the share of sites whose updates are to be within the clipping norm."
    )
    lr: float = Field(0.2, gt=0, description="η: how fast the clipping norm follows.")
    count_noise: float | None = Field(
        None,
        gt=0,
        description="σ_b: the noise's standard deviation on the count of sites within the norm. More of it leaves less "
        "noise for the sum. Default: a twentieth of the cohort, at least the noise multiplier.",
    )


class MechanismSpec(Section):
    """The noise of a run's rounds."""

    name: Literal["gaussian", "banded-toeplitz", "distributed-discrete"] = Field(
        "gaussian",
        description="`gaussian`: independent in each round. `banded-toeplitz`: what a round adds later ones take back "
        "in part, which leaves less of it in the model; each site then takes part at most once in `min_separation` "
        "rounds. `distributed-discrete`: each site adds noise of its own before a secure sum, so that the coordinator "
        "never sees the sum without.",
    )
    min_separation: int | None = Field(
        None,
        ge=2,
        description="`banded-toeplitz` needs it: of so many rounds in a row a site takes part in one at most. The "
        "cohort times this is no more than the number of sites.",
    )
    band: int | None = Field(
        None,
        ge=1,
        description="`banded-toeplitz`: rounds over which noise is spread, at most and by default `min_separation`.",
    )
    colluding: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="`distributed-discrete`: the share of the sites that a round invites that might leave out their "
        "noise, or tell the coordinator what it was; the others add so much more. Default: none.",
    )

    @model_validator(mode="after")
    def _only_what_it_asks_for(self) -> Self:
        for other, names in _OPTIONS.items():
            given = [name for name in names if getattr(self, name) is not None]
            if given and self.name != other:
                raise ValueError(f"`{given[0]}` does nothing with {self.name} noise; use name: {other}")
        return self

    @model_validator(mode="after")
    def _a_band_within_the_separation(self) -> Self:
        if self.name != "banded-toeplitz":
            return self
        if self.min_separation is None:
            raise ValueError("banded-toeplitz needs `min_separation`: what it costs depends on it")
        if self.band is not None and self.band > self.min_separation:
            raise ValueError(
                f"band {self.band} is above min_separation {self.min_separation}: a site could take part in it twice"
            )
        return self

    @property
    def separation(self) -> int:
        """Of so many rounds in a row a site takes part in one at most; 1: in all."""
        return self.min_separation or 1

    @property
    def at_sites(self) -> bool:
        """Whether the sites add it."""
        return self.name == "distributed-discrete"


_OPTIONS = {"banded-toeplitz": ("min_separation", "band"), "distributed-discrete": ("colluding",)}


class PrivacySpec(Section):
    """What bounds what is learnt of a site: by whoever gets the result, and by the coordinator."""

    dp: Literal["none", "site", "example", "group"] = Field(
        "none",
        description="`site`: differential privacy of each site with all its rows: updates are clipped at the site, and "
        "the coordinator, or with another `mechanism` the sites, add noise to their sum. `example`: of each single "
        "training example: a site draws the batch of a step by chance, clips each example's gradient and adds noise "
        "itself (DP-SGD). `group`: the same of all rows of a site that have one value of `by`, such as a patient's, "
        "together. `none`: ε = ∞.",
    )
    by: str | None = Field(
        None, min_length=1, description="`dp: group`: the field that says whose a row is. Every row must have a value."
    )
    rows_per_group: int | None = Field(
        None,
        ge=1,
        description="`dp: group`: rows of a group in one step, at most; of a group that has more, other ones are drawn "
        "for each step. More of them make its gradient steadier, and take longer. Default 4.",
    )
    clip: float | None = Field(
        None,
        gt=0,
        description="C: the L2 norm to which a site's update is clipped, or with `dp` example or group each one's "
        "gradient, over all trained tensors together. Needed unless `dp: none`.",
    )
    delta: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="δ, well below one over the number of sites, or with `dp` example or group of a site's training "
        "examples or groups. Needed unless `dp: none`.",
    )
    epsilon: float | None = Field(
        None,
        gt=0,
        description="The ε that all rounds together may cost; the noise follows, with `dp` example or group for each "
        "site by itself. Or `noise_multiplier`.",
    )
    noise_multiplier: float | None = Field(
        None, ge=0, description="z: the noise's standard deviation in units of `clip`; ε follows. Or `epsilon`."
    )
    mechanism: Annotated[MechanismSpec, BeforeValidator(_named)] = Field(
        default_factory=MechanismSpec,
        description="The noise: `gaussian`, `{name: banded-toeplitz, …}`, or `distributed-discrete`.",
    )
    adaptive_clip: AdaptiveClipSpec | None = Field(
        None,
        description="Let `clip`, which round 1 has, follow a quantile of the updates' norms: `{}`, or `{quantile: 0.5, "
        "lr: 0.2, count_noise: 5}`. The same ε, out of which the count of sites within the norm is paid.",
    )
    canaries: CanariesSpec = Field(default_factory=CanariesSpec, description="Made-up rows for a leak audit.")

    secure_aggregation: Literal["auto", "on", "off", "homomorphic"] = Field(
        "auto",
        description="Whether the coordinator learns sums of updates alone. `auto`: over a network, where the strategy "
        "needs no more than their weighted sum and a round invites at least 3 sites; a simulation has nobody to hide "
        "them from. `on`: or the recipe is refused. `homomorphic`: by encryption in place of masks, in simulations "
        "alone: it costs much more and protects less (docs/privacy.md).",
    )
    secure_group_size: int | None = Field(
        None,
        ge=3,
        description="With `secure_aggregation: on` and a robust strategy: a round's sites are split by chance into "
        "groups of at least so many, each makes a secure sum of its own, and the rule works on the groups' means. Its "
        "f then counts groups that have a hostile site.",
    )
    secure_bound: float | None = Field(
        None,
        gt=0,
        description="Secure sums: the largest size of an element of an update; larger ones are clipped to it. "
        "Default: `clip` with `dp: site`, else 8.",
    )

    @property
    def summed(self) -> bool:
        """Whether updates are seen in sums alone, as far as the recipe has decided it."""
        return self.secure_aggregation in ("on", "homomorphic")

    @property
    def rows_are(self) -> str:
        """What hides a single row of a secure sum: it is `masked`, or `encrypted`."""
        return "encrypted" if self.secure_aggregation == "homomorphic" else "masked"

    @model_validator(mode="after")
    def _groups_make_secure_sums(self) -> Self:
        if self.secure_group_size is None:
            return self
        if self.secure_aggregation != "on":
            raise ValueError(
                f"`secure_group_size` is of secure sums, and secure_aggregation is {self.secure_aggregation}; set it "
                "to on, or remove `secure_group_size`"
            )
        if self.dp == "site":
            raise ValueError(
                "dp: site reckons with the mean of a round's updates, and a rule across groups of them is another "
                "function, whose sensitivity nobody has bounded; leave `secure_group_size` out, or use dp: none"
            )
        return self

    @model_validator(mode="after")
    def _a_canary_is_one_example(self) -> Self:
        if self.dp == "example" and self.canaries.repeat > 1:
            raise ValueError(
                f"dp: example covers a single example, and canaries.repeat {self.canaries.repeat} makes a group of "
                "each canary; use repeat: 1"
            )
        return self

    @property
    def noisy_steps(self) -> bool:
        """Whether sites draw the batches of their steps and add noise to each themselves."""
        return self.dp in ("example", "group")

    @property
    def rows_of_unit(self) -> int:
        """Rows of what is drawn as one that a step takes, at most."""
        return (self.rows_per_group or ROWS_PER_GROUP) if self.dp == "group" else 1

    @model_validator(mode="after")
    def _groups_have_a_field(self) -> Self:
        if self.dp == "group" and self.by is None:
            raise ValueError("dp: group needs `by`: the field that says whose a row is, such as patient")
        given = [name for name in ("by", "rows_per_group") if getattr(self, name) is not None]
        if self.dp != "group" and given:
            raise ValueError(f"`{given[0]}` does nothing with dp: {self.dp}; set dp: group, or remove it")
        return self

    @model_validator(mode="after")
    def _whole_or_nothing(self) -> Self:
        names = ("clip", "delta", "epsilon", "noise_multiplier", "adaptive_clip")
        given = [name for name in names if getattr(self, name) is not None]
        if self.dp == "none":
            if given:
                raise ValueError(
                    f"`{given[0]}` does nothing with dp: none; set dp: site, example or group, or remove it"
                )
            if self.mechanism.name != "gaussian":
                raise ValueError("`mechanism` does nothing with dp: none; set dp: site, or remove it")
            return self
        if self.mechanism.name != "gaussian" and self.adaptive_clip is not None:
            raise ValueError(
                f"the noise of mechanism {self.mechanism.name} is for one clipping norm, and `adaptive_clip` changes "
                "it; leave that out, or use mechanism: gaussian"
            )
        missing = [name for name in ("clip", "delta") if name not in given]
        if missing:
            raise ValueError(f"dp: {self.dp} needs `{missing[0]}`")
        if ("epsilon" in given) == ("noise_multiplier" in given):
            raise ValueError(f"dp: {self.dp} needs `epsilon` or `noise_multiplier`, and not both")
        if self.noisy_steps and self.adaptive_clip is not None:
            raise ValueError("`adaptive_clip` follows the norms of sites' updates, with dp: site; remove it")
        if self.noisy_steps and self.mechanism.name != "gaussian":
            raise ValueError("`mechanism` is of the noise on sums of sites' updates, with dp: site; remove it")
        return self

    @model_validator(mode="after")
    def _noise_of_sites_is_within_a_secure_sum(self) -> Self:
        if not self.mechanism.at_sites:
            return self
        if self.secure_aggregation == "off":
            raise ValueError(
                f"with mechanism {self.mechanism.name} a site adds too little noise to hide its update by itself: "
                "`secure_aggregation` must not be off"
            )
        if self.noise_multiplier == 0:
            raise ValueError(f"mechanism {self.mechanism.name} needs noise; set `noise_multiplier` above 0")
        if self.secure_bound is not None:
            raise ValueError(f"`secure_bound` does nothing with mechanism {self.mechanism.name}, which goes by `clip`")
        return self

    @property
    def own_noise(self) -> bool:
        """Whether a site adds the noise that protects it, and need trust nobody to."""
        return self.noisy_steps or self.mechanism.at_sites


#: what a codec consists of, each by its field in `compression`: the kind of method that stands there
STAGES = {"shorten": "shortening", "round": "rounding", "pack": "packing"}
NO_STAGE = "none"
#: `compression: auto`
AUTO_COMPRESSION = {"round": {"name": "sign"}}
#: `compression.down: auto`
AUTO_DOWN = {"round": {"name": "uniform", "bits": 4, "rounding": "nearest"}, "pack": {"name": "huffman"}}


#: the codec that goes with secure sums
_SUMMED_CODEC = "compression: {shorten: random-k}, and nothing beside,"


def _compression(value: object) -> object:
    if value == "none":
        return {}
    return AUTO_COMPRESSION if value == "auto" else value


def _down(value: object) -> object:
    if value == "none":
        return {}
    return AUTO_DOWN if value == "auto" else value


class CodecSpec(Section):
    """A codec's stages."""

    #: where it stands in the recipe
    loc: ClassVar[tuple[str, ...]] = ("compression",)

    shorten: MethodField = Field(
        Method(name=NO_STAGE), description="Which numbers are sent: `top-k`, `random-k`, `low-rank`, or `none`: all."
    )
    round: MethodField = Field(
        Method(name=NO_STAGE),
        description="In how many bits: `bf16`, `fp16`, `int8`, `uniform`, `nf4`, `sign`, or `none`: as they are.",
    )
    pack: MethodField = Field(Method(name=NO_STAGE), description="Without loss: `huffman`, or `none`.")

    @property
    def unbiased(self) -> bool:
        """Whether the mean of many codings is to be what was coded; of no use where what is lost is sent later."""
        return False

    @property
    def has_stages(self) -> bool:
        return any(getattr(self, stage).name != NO_STAGE for stage in STAGES)


class DownSpec(CodecSpec):
    """How the global tensors are made small on their way to the sites: `none`, `auto`, or stages by name.

    Sites are sent the coded difference from what they hold, and all hold the same: what a coding loses the coordinator
    keeps and adds to the next difference. The initial tensors each site makes by itself. `auto` is 4 bits a number,
    `{name: uniform, bits: 4, rounding: nearest}`, packed by `huffman`.
    """

    loc = ("compression", "down")


class CompressionSpec(CodecSpec):
    """How updates are made small on their way to the coordinator: `none`, `auto`, or stages by name.

    An update is shortened, then rounded, then packed, each by the method named here or by none. `auto` is `{round:
    sign}` with error feedback: 30 times fewer bytes than float32.
    """

    error_feedback: bool = Field(
        True,
        description="What is lost in one round is sent in the next: a site keeps it. Without, stages that can be are "
        "right in the mean instead.",
    )
    budget_mb: float | None = Field(
        None,
        gt=0,
        description="In place of stages: MB that a site may send in a round. Each update is coded by whichever of some "
        "twenty codecs stays within that and loses least of it.",
    )
    down: Annotated[DownSpec, BeforeValidator(_down)] = Field(
        default_factory=DownSpec, description="The other way: `none`, `auto`, or how the global tensors are made small."
    )

    @model_validator(mode="after")
    def _stages_or_a_budget(self) -> Self:
        stage = next((stage for stage in STAGES if getattr(self, stage).name != NO_STAGE), None)
        if stage and self.budget_mb is not None:
            raise ValueError(f"`budget_mb` chooses the stages by itself; remove it, or `{stage}`")
        return self

    @property
    def unbiased(self) -> bool:
        return not self.error_feedback

    @property
    def active(self) -> bool:
        """Whether updates are made small."""
        return self.budget_mb is not None or self.has_stages

    @property
    def loses(self) -> bool:
        """Whether what arrives may differ from what was sent; packing alone loses nothing."""
        return self.budget_mb is not None or any(stage.name != NO_STAGE for stage in (self.shorten, self.round))

    @property
    def not_summed(self) -> str:
        """Why updates that are made so cannot be added unseen; "": they can."""
        if self.budget_mb is not None:
            return (
                "by `compression.budget_mb` each site chooses a codec for itself, and what they write cannot be added"
            )
        if self.round.name != NO_STAGE:
            return (
                "what is added is rounded already, to the fixed point of the ring, and what `compression.round` writes "
                f"cannot be added; {_SUMMED_CODEC} can be"
            )
        if self.pack.name != NO_STAGE:
            return (
                "masked numbers are uniformly random, of which `compression.pack` makes no fewer bytes; "
                f"{_SUMMED_CODEC} does"
            )
        if self.shorten.name in (NO_STAGE, "random-k"):
            return ""
        why = {
            "top-k": "each site's top-k keeps numbers at other places, which would tell what it trained on",
            "low-rank": "each site's low-rank factors are its own, and their sum is not that of the products",
        }.get(self.shorten.name, "`compression.shorten` must keep numbers at the same places of every site's update")
        return f"{why}; {_SUMMED_CODEC} keeps the same places at all sites"

    @property
    def keeps_errors(self) -> bool:
        """Whether sites keep what was lost."""
        return self.error_feedback and self.loses


class OutputSpec(Section):
    """What a run's folder keeps."""

    keep_rounds: Literal["all"] | int = Field(
        "all", description="Global adapters kept under rounds/: `all`, or that many of the latest (at least 1)."
    )

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if isinstance(self.keep_rounds, int) and self.keep_rounds < 1:
            raise ValueError("keep_rounds must be at least 1: a run resumes from its latest round")
        return self


class Recipe(Section):
    """One run: what is trained, on what, by whom, and how it is judged."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the run and of its folder: letters, digits, `.`, `_`, `-`.",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Decides every random choice: the same seed gives the same bits on CPU."
    )
    model: ModelSpec = Field(default_factory=ModelSpec, description="Base model and adapter.")
    data: DataSpec = Field(default_factory=DataSpec, description="Rows, sites, held-out rows.")
    training: TrainingSpec = Field(default_factory=TrainingSpec, description="Local work.")
    federation: FederationSpec = Field(default_factory=FederationSpec, description="Rounds and strategy.")
    privacy: PrivacySpec = Field(default_factory=PrivacySpec, description="Differential privacy.")
    compression: Annotated[CompressionSpec, BeforeValidator(_compression)] = Field(
        default_factory=CompressionSpec, description="`none`, `auto`, or how updates are made small."
    )
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec, description="Controls and metrics.")
    engine: EngineSpec = Field(default_factory=EngineSpec, description="Where it runs.")
    output: OutputSpec = Field(default_factory=OutputSpec, description="What is kept.")

    @model_validator(mode="after")
    def _small_updates_are_whole(self) -> Self:
        if self.compression.active and self.federation.relays:
            raise ValueError(
                "a relay adds up updates, and those that `compression` has made small cannot be added; leave "
                "federation.relays or compression out"
            )
        if self.compression.active and self.model.adapter.shaped:
            raise ValueError(
                "`compression` makes updates of the whole adapter small, and model.adapter.sites or "
                "model.adapter.budget gives some sites a part; leave one of them out"
            )
        if self.compression.loses and self.privacy.dp == "site":
            raise ValueError(
                "privacy.dp site reckons with updates of norm `clip` at most, and a codec that rounds or leaves out "
                "changes an update after it was clipped; use compression: {pack: huffman}, which loses nothing, or none"
            )
        return self

    @model_validator(mode="after")
    def _private_sites_count_alike(self) -> Self:
        if self.privacy.dp == "site" and self.federation.weighting != "uniform":
            raise ValueError(
                f"privacy.dp site bounds what one site does to the sum, but federation.weighting "
                f"{self.federation.weighting} lets sites count for more; use weighting: uniform"
            )
        return self

    @model_validator(mode="after")
    def _a_sum_is_of_all_and_of_alike(self) -> Self:
        if self.privacy.summed and self.not_summed:
            named = f"privacy.secure_aggregation {self.privacy.secure_aggregation}"
            raise ValueError(f"{named}: {self.not_summed}; set it to off, or leave that out")
        if self.privacy.secure_group_size is not None and self.federation.over_selection > 1:
            raise ValueError(
                "federation.over_selection closes a round when enough sites have answered, with "
                "privacy.secure_group_size perhaps before any group is whole; leave one of them out"
            )
        return self

    @property
    def not_summed(self) -> str:
        """What in the recipe speaks against secure sums, whatever the strategy; "": nothing."""
        if self.federation.relays:
            return "a relay of federation.relays sees its sites' updates one by one"
        if self.privacy.adaptive_clip is not None:
            return "privacy.adaptive_clip counts the sites within the clipping norm, and a sum has no place for that"
        if self.model.adapter.shaped:
            return "rows of one length are added, and model.adapter gives some sites a part of it"
        if self.compression.active and self.privacy.secure_group_size is not None:
            return "rules over groups compare whole updates, which `compression` does not send"
        return self.compression.not_summed

    @model_validator(mode="after")
    def _private_examples_have_gradients_of_their_own(self) -> Self:
        adapter, training, dp = self.model.adapter, self.training, f"privacy.dp {self.privacy.dp}"
        if not self.privacy.noisy_steps:
            return self
        if adapter.kind not in PAIRED_KINDS:
            raise ValueError(
                f"{dp} needs each example's own gradient, which lora and rslora adapters have and "
                f"adapter.kind {adapter.kind} has not; use one of the two"
            )
        if adapter.shaped:
            raise ValueError(
                f"{dp} adds noise to the whole adapter, but model.adapter.sites or model.adapter.budget gives sites a "
                "part of it; leave them out"
            )
        if training.gradient_checkpointing:
            raise ValueError(
                f"{dp}: training.gradient_checkpointing runs layers a second time, behind the hooks that take down "
                "each example's gradient; use gradient_checkpointing: false, and micro_batch_size: 1 to save memory"
            )
        if self.federation.weighting == "tokens":
            raise ValueError(
                f"{dp} bounds what updates tell, but federation.weighting tokens needs the number of tokens drawn, "
                "which would tell more; use weighting: examples or uniform"
            )
        if self.privacy.dp == "group" and self.data.chunks:
            raise ValueError(
                "privacy.dp group: data.chunks joins rows of several groups into one piece; use chunks: false"
            )
        return self

    @model_validator(mode="after")
    def _packing_has_no_prompt_tokens(self) -> Self:
        if self.training.packing and self.model.adapter.kind in PROMPT_KINDS:
            raise ValueError(
                f"training.packing puts several examples in one sequence, but adapter.kind {self.model.adapter.kind} "
                "puts its learned tokens only in front of the first; use packing: false, or a lora adapter"
            )
        return self
