"""A site's own settings, `site.yaml`: which coordinator it dials, where its rows are, what it works with.

What may leave the site is not decided here but in `policy.yaml` (`policy.py`). A job's recipe says how rows become
examples; where they lie, and what their columns are called here, only this file says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, Field, model_validator

from ..errors import PolicyError, RecipeError, StateError
from ..federation.folder import write_text
from ..recipe.problems import validate
from ..recipe.schema import DEMO_DATA, DataSpec, Section
from ..recipe.source import Source, read_source

SETTINGS_FILE = "site.yaml"
POLICY_FILE = "policy.yaml"
MAX_BYTES = 1 << 20

NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
ADDRESS = r"^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$"

_LAYOUTS = ("prompt", "completion", "messages", "text")
_OVERRIDES = ("format", "split", *_LAYOUTS, "paragraphs", "pattern", "options", "answer")

M = TypeVar("M", bound=BaseModel)


class DataSettings(Section):
    """Where this site's rows are, and what is different about them from what a recipe expects."""

    path: str | None = Field(
        None,
        min_length=1,
        description=f"A file or a folder of files, seen from the site's folder; or the built-in `{DEMO_DATA}`. Null: "
        "only the purposes in `by_purpose` have data.",
    )
    by_purpose: dict[str, str] = Field(
        default_factory=dict, description="Other paths for jobs of these purposes: {purpose: path}."
    )
    partition: str | None = Field(
        None,
        min_length=1,
        description="The rows hold several sites': this site is the one of this name under the recipe's `data.sites`. "
        "Null: all rows are this site's.",
    )
    format: Literal["auto", "json", "jsonl", "csv", "parquet", "text", "dataset"] | None = Field(
        None, description="In place of the recipe's `data.format`."
    )
    split: str | None = Field(None, description="In place of the recipe's `data.split`.")
    prompt: str | None = Field(None, description="In place of the recipe's `data.prompt`, with this site's fields.")
    completion: str | None = Field(None, description="In place of the recipe's `data.completion`.")
    messages: str | None = Field(None, description="In place of the recipe's `data.messages`.")
    text: str | None = Field(None, description="In place of the recipe's `data.text`.")
    paragraphs: Literal["line", "blank-line", "file"] | None = Field(
        None, description="In place of the recipe's `data.paragraphs`."
    )
    pattern: str | None = Field(None, description="In place of the recipe's `data.pattern`.")
    options: str | None = Field(None, description="In place of the recipe's `data.options`.")
    answer: str | None = Field(None, description="In place of the recipe's `data.answer`.")

    @model_validator(mode="after")
    def _some_data(self) -> Self:
        if self.path is None and not self.by_purpose:
            raise ValueError("give `path`, or a path for each purpose in `by_purpose`: this site has no data")
        return self


class KeepSettings(Section):
    """What stays on this site's disk when a run has ended."""

    runs: int = Field(5, ge=0, description="Folders of ended runs kept under runs/; older ones are deleted.")


class SiteSettings(Section):
    """One site: a data owner's machine that takes part in runs."""

    name: str = Field(
        pattern=NAME, description="The site's name, as it was enrolled: small letters, digits, `.`, `_`, `-`."
    )
    address: str = Field(pattern=ADDRESS, description="The coordinator's host:port, to which this site dials out.")
    data: DataSettings = Field(description="Where this site's rows are.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto`: a GPU if there is one.")
    threads: Literal["auto"] | int = Field(
        "auto", description="Threads of local training on CPU. `auto`: one for each core that this process may use."
    )
    keep: KeepSettings = Field(default_factory=KeepSettings, description="What stays when a run has ended.")

    @model_validator(mode="after")
    def _within_bounds(self) -> Self:
        if isinstance(self.threads, int) and self.threads < 1:
            raise ValueError(f"threads {self.threads} must be at least 1, or auto")
        if not 1 <= int(self.address.rpartition(":")[2]) <= 65535:
            raise ValueError(f"address {self.address} has no port between 1 and 65535")
        return self

    def data_path(self, purpose: str = "") -> str:
        """Where the rows for a job of this purpose are.

        Raises:
            PolicyError: this site has no data for that purpose.
        """
        path = self.data.by_purpose.get(purpose, self.data.path)
        if path is None:
            known = ", ".join(sorted(self.data.by_purpose))
            raise PolicyError(
                f"this site has no data for the purpose {purpose!r}: data.by_purpose has {known}",
                hint="the site's owner may add the purpose to site.yaml, or the lead may name another",
            )
        return path

    def data_spec(self, spec: DataSpec, purpose: str = "") -> DataSpec:
        """The recipe's data section as it holds at this site: its own path and its own names of fields.

        `sites` is left as the recipe has it; without `data.partition`, all rows are this site's, whatever it says.

        Raises:
            PolicyError: no data for this purpose.
            RecipeError: the overrides contradict the recipe.
        """
        own = {name: value for name in _OVERRIDES if (value := getattr(self.data, name)) is not None}
        cleared = _LAYOUTS if set(own) & set(_LAYOUTS) else ()
        values = {key: value for key, value in spec.model_dump(mode="json").items() if key not in cleared}
        return validate(DataSpec, Source(values | own | {"path": self.data_path(purpose)}), ("data",))


def load_settings(folder: Path) -> SiteSettings:
    """Read `site.yaml` of a site's folder; paths come out absolute.

    Raises:
        RecipeError: it is missing or unreadable, or a key is wrong: named, with its line.
    """
    settings = read_section(SiteSettings, folder / SETTINGS_FILE)
    data = settings.data
    own = {
        "path": None if data.path is None else _seen_from(folder, data.path),
        "by_purpose": {purpose: _seen_from(folder, path) for purpose, path in data.by_purpose.items()},
    }
    return settings.model_copy(update={"data": data.model_copy(update=own)})


def read_section(model: type[M], path: Path) -> M:
    """Read a YAML file of a site's folder, by the recipe's strict rules: no unknown, doubled or missing key.

    Raises:
        RecipeError: what is wrong, and where.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"there is no {path}", hint="`commonweight site join` writes one to start from") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from None
    return parse_section(model, raw, path)


def parse_section(model: type[M], raw: bytes, path: Path) -> M:
    """`read_section` for bytes that were read already; `path` is for messages."""
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path.name} is larger than 1 MiB", hint="it is a few dozen lines of `field: value`")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path.name} is not UTF-8 text, at line {line}", hint="save it as UTF-8") from None
    try:
        source = read_source(text, path.name)
    except RecipeError as error:
        about_recipes = "recipe" in error.hint or "commonweight init" in error.hint
        hint = "it is lines of `field: value`; `commonweight site join` writes one to start from"
        raise RecipeError(error.message, hint=hint if about_recipes else error.hint) from None
    return validate(model, source)


def write_starter(folder: Path, name: str, address: str, data_path: str | Path) -> None:
    """Write a commented `site.yaml` and a `policy.yaml` that denies everything until its owner has filled it in.

    Args:
        address: the coordinator's host:port.
        data_path: a file or folder, seen from where the command runs; written as an absolute path.

    Raises:
        StateError: one of the two is there already; neither is touched.
        RecipeError: the name or the address is none.
        StorageError: they cannot be written.
    """
    settings, policy = folder / SETTINGS_FILE, folder / POLICY_FILE
    for path in (settings, policy):
        if path.exists():
            raise StateError(f"{path} is there already", hint="edit it, or choose another folder")
    data = str(data_path)
    text = starter_settings(name, address, data if data == DEMO_DATA else str(Path(data).absolute()))
    parse_section(SiteSettings, text.encode(), settings)
    write_text(settings, text)
    write_text(policy, starter_policy())


def starter_settings(name: str, address: str, path: str) -> str:
    """A commented `site.yaml`."""
    values = {"name": name, "address": address, "path": path}
    return _SITE.format(**{key: json.dumps(value, ensure_ascii=False) for key, value in values.items()})


def starter_policy() -> str:
    """A commented `policy.yaml` that denies every job."""
    return _POLICY


def _seen_from(folder: Path, path: str) -> str:
    return path if path == DEMO_DATA else str((folder / Path(path).expanduser()).absolute())


_SITE = """\
# This site's settings. What may leave the site is decided in policy.yaml, beside this file.
name: {name}
address: {address}

data:
  path: {path}     # a file, or a folder of files; it is read here and is never sent
  # by_purpose: {{triage: triage.jsonl}}  # other rows for jobs of this purpose
  # format: csv                         # if the file's ending does not say it
  # prompt: "Question: {{frage}}\\nAnswer:" # if this site's columns have other names than the recipe's
  # completion: " {{antwort}}"

device: auto                            # cpu, cuda, or auto: a GPU if there is one
threads: auto                           # or a number
keep:
  runs: 5                               # folders of ended runs that stay under runs/
"""

_POLICY = """\
# What this site lets happen. It is checked here, at the site, before each task and before anything is sent; no job and
# no coordinator can change it. Every field must be there; an empty list allows nothing. A change takes effect at the
# next task. If this file is missing, damaged, or has a key that is not known, everything is denied.
#
# As it stands it denies every job: fill in models, signers and purposes.

models: []                  # SHA-256 of base weights: a run's metrics.json has it as model.digest; or ["any"]
signers: []                 # leads who may submit jobs: names (lena) or signing keys (64 hex digits); or ["any"]
kinds: [train, evaluate]    # train: local training, whose updates leave. evaluate: the model is scored on held-out rows
purposes: []                # what this site's data may be used for, in the job's words: [triage]; or ["any"]
strategies: [built-in]      # how updates are combined: built-in, and names of others that are installed here
objectives: [built-in]      # what is trained on: built-in; code of one's own by its whole name: mypackage.loss:MyLoss

relays: []                  # relays that may see this site's update, to add it to its region's sum: names; or ["any"]
min_cohort: 3               # a round must combine the updates of at least so many sites
max_rounds: 50              # rounds of one run
max_bytes_per_round: 64 MiB # that may leave in one round of a run: the update, scores, and what is sent again
max_bytes_total: 4 GiB      # that may ever leave, in all runs together

privacy:
  dp_required: false        # true: only jobs with differential privacy
  max_epsilon: null         # a number: only jobs that state an epsilon of at most so much
  budget: null              # {unit: site, epsilon: 8, delta: 1e-5}: what this site's updates of all runs may cost
  secure_aggregation_required: false   # true: only jobs that reveal no single site's update to the coordinator
  own_noise_required: false   # true: only jobs whose noise this site adds itself

remote_code: false          # always false: code from a model's folder is never run
approval: every-run         # every-run: a person says `commonweight site approve DIR RUN`. first-run, none
share:
  scores: total             # of held-out rows: rows (each row's loss), total (their sum), none
  samples: false            # true: the model's answers to this site's held-out prompts may leave, prompts included
"""
