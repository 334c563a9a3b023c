"""A whole federation on one machine, as it would be deployed: a coordinator, a lead, and a process for each site.

Nothing is simulated but the distance: every party enrols with a one-time token, speaks mutual TLS over the loopback and
keeps its own folder, and each site has a policy. The rows are divided by the recipe's own `data.sites`, a part for each
site. So the adapter is that of `commonweight run`, bit for bit on CPU.

    <folder>/coordinator/   lead/   relays/<relay>/   sites/<site>/   logs/
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from .coordinator import folder as coordinator_folder
from .coordinator.settings import FILE, CoordinatorSettings, settings_text
from .data.names import listed, require_sites
from .data.sites import load_sites
from .errors import CommonweightError, RecipeError, RoundError, UnreachableError
from .evaluate.report import read_metrics
from .federation.asynchronous import check_asynchronous
from .federation.cohort import check_cohort, check_separation
from .federation.events import Listener
from .federation.folder import storage_errors, write_text
from .identity.enrol import enrol
from .identity.folder import IdentityFolder
from .lead.client import Client
from .lead.fetch import check_end, fetch
from .lead.submit import networked, prepare
from .model.base import load_tokenizer
from .recipe.load import check_methods
from .recipe.schema import DEMO_DATA, Method, Recipe
from .registry import BUILT_IN, built_in
from .relay.settings import write_settings as write_relay_settings
from .site.policy import Policy, policy_text
from .site.settings import POLICY_FILE, SETTINGS_FILE

LEAD, PURPOSE = "lead", "sandbox"

_HOST = "127.0.0.1"
_COUNTED = ("iid", "dirichlet", "shards", "quantity")
_READY_S = 120.0
_LOOK_S = 0.5
_STOP_S = 15.0
_TAIL_LINES = 12


def partitioned(recipe: Recipe, sites: int | None = None) -> tuple[Recipe, dict[str, str], list[str]]:
    """A recipe as a sandbox carries it out, and its sites.

    Args:
        sites: how many there are to be; None: as the recipe's data fall.

    Returns:
        The recipe, which names sites as they enrol; the parts of its data by site, in the order of folding; a sentence
        for each thing left out.

    Raises:
        RecipeError: the data fall to another number of sites, or are in no file.
        CommonweightError: as `load_sites` and `check_cohort`.
    """
    recipe, left_out = networked(recipe)
    spec = recipe.data.sites
    if sites is not None and spec.scheme in _COUNTED:
        data = recipe.data.model_copy(update={"sites": spec.model_copy(update={"count": sites})})
        recipe = recipe.model_copy(update={"data": data})
    check_methods(recipe, network=True)
    if recipe.data.path != DEMO_DATA and not Path(recipe.data.path).exists():
        raise RecipeError(
            f"there is no {recipe.data.path}", hint="a site's rows are in a file or a folder: set data.path to one"
        )
    found, _ = load_sites(
        recipe.data,
        seed=recipe.seed,
        tokenizer=load_tokenizer(recipe.model),
        max_tokens=recipe.training.max_tokens,
        owner=recipe.privacy.by,
    )
    names = [site.name for site in found]
    if sites is not None and len(names) != sites:
        raise RecipeError(
            f"--sites {sites}, but the recipe's data fall to {len(names)} sites: {listed(names)}",
            hint="leave --sites out; or keep fewer by --set data.sites.largest=N",
        )
    check_cohort(len(names), recipe.federation)
    check_separation(len(names), recipe)
    check_asynchronous(recipe, len(names))
    require_sites(recipe.federation.relay_of, names, "federation.relays")
    enrolled = site_names(names)
    recipe = _by_enrolled_name(recipe, dict(zip(names, enrolled, strict=True)))
    return recipe, dict(zip(enrolled, names, strict=True)), left_out


def _by_enrolled_name(recipe: Recipe, enrolled: Mapping[str, str]) -> Recipe:
    """What a recipe says of single sites, said of them under the names by which they enrol; unknown ones stay."""

    def renamed(by_site: Mapping[str, Any]) -> dict[str, Any]:
        return {enrolled.get(name, name): value for name, value in by_site.items()}

    adapter, training = recipe.model.adapter, recipe.training
    training = training.model_copy(update={"budget": renamed(training.budget)})
    parts = {"sites": renamed(adapter.sites), "budget": renamed(adapter.budget)}
    model = recipe.model.model_copy(update={"adapter": adapter.model_copy(update=parts)})
    relays = {relay: [enrolled.get(name, name) for name in sites] for relay, sites in recipe.federation.relays.items()}
    federation = recipe.federation.model_copy(update={"relays": relays})
    return recipe.model_copy(update={"model": model, "training": training, "federation": federation})


def site_names(parts: Sequence[str]) -> list[str]:
    """Names under which sites enrol, one for each part of the data, all different."""
    taken: list[str] = []
    for part in parts:
        slug = re.sub(r"[^a-z0-9._-]+", "-", re.sub(r"['’]", "", part.lower())).strip("-._")[:56] or "site"
        numbers = (f"{slug}-{number}" for number in range(2, len(parts) + 2))
        taken.append(slug if slug not in taken else next(name for name in numbers if name not in taken))
    return taken


@dataclass
class _Process:
    """A part of the federation.

    Args:
        log: what it prints.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def tail(self) -> Iterator[str]:
        """The last lines of its log."""
        with suppress(OSError):
            yield from self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]


class Sandbox:
    """A federation at work; a context, which leaves no process behind. Several runs may be carried out in it.

    Args:
        folder: where it lives: a new or empty one.
        names: the parts of the data by site, as `partitioned` gives them.
        tell: told, for people, how it gets on.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        names: Mapping[str, str],
        *,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder, self.names, self.tell = folder.absolute(), dict(names), tell
        self.data, self.device = recipe.data.path, recipe.engine.device
        self.strategies = _methods("strategy", recipe.federation.strategy)
        self.relays = list(recipe.federation.relays)
        self.coordinator, self.lead = self.folder / "coordinator", self.folder / "lead"
        self.logs = self.folder / "logs"
        self._coordinator: list[_Process] = []
        self._relays: list[_Process] = []
        self._sites: list[_Process] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- starting and stopping

    def _start(self) -> None:
        with storage_errors(self.logs):
            self.logs.mkdir(parents=True)
        anywhere = f"{_HOST}:0"
        settings = CoordinatorSettings(
            listen=anywhere,
            listen_enrolment=anywhere,
            listen_http=anywhere,
            address=anywhere,
            address_enrolment=anywhere,
            strategies=self.strategies,
        )
        coordinator_folder.init(self.coordinator, settings, ["localhost", _HOST])
        ready = self.folder / "ready.json"
        self._coordinator.append(
            self._run("coordinator", "coordinator", "serve", str(self.coordinator), "--ready-file", str(ready))
        )
        ports = self._ports(ready)
        write_text(self.coordinator / FILE, settings_text(settings.model_copy(update=_at(ports))))
        self.tell(f"the coordinator serves on port {ports['services']}")
        self._enrol(LEAD, "lead", self.lead)
        for relay in self.relays:
            self._add_relay(relay)
        for site in self.names:
            self._add_site(site, f"{_HOST}:{ports['services']}")
        self.tell(f"a lead has joined, and {'1 site' if len(self.names) == 1 else f'{len(self.names)} sites'}")

    def _ports(self, ready: Path) -> dict[str, int]:
        """The coordinator's ports, once they are open."""
        ends = time.monotonic() + _READY_S
        while not ready.exists():
            self.check()
            if time.monotonic() > ends:
                raise UnreachableError(f"the coordinator was not ready within {_READY_S:.0f} s", hint=self.tails())
            time.sleep(0.02)
        ports: dict[str, int] = yaml.safe_load(ready.read_text(encoding="utf-8"))
        return ports

    def _enrol(self, name: str, role: str, into: Path) -> None:
        enrol(coordinator_folder.enroll(self.coordinator, name, role, by="sandbox").to_text(), into)

    def _add_site(self, site: str, address: str) -> None:
        folder = self.folder / "sites" / site
        self._enrol(site, "site", folder / "identity")
        path = self.data if self.data == DEMO_DATA else str(Path(self.data).absolute())
        settings = {
            "name": site,
            "address": address,
            "data": {"path": path, "partition": self.names[site]},
            "device": self.device,
            "threads": 1,
        }
        write_text(folder / SETTINGS_FILE, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        self._sites.append(self._run(f"site-{site}", "site", "run", str(folder)))

    def _add_relay(self, relay: str) -> None:
        folder, anywhere = self.folder / "relays" / relay, f"{_HOST}:0"
        self._enrol(relay, "relay", folder / "identity")
        address = IdentityFolder.open(folder / "identity").address
        write_relay_settings(folder, relay, address, listen=anywhere, reached_at=anywhere)
        self._relays.append(self._run(f"relay-{relay}", "relay", "run", str(folder)))

    def _run(self, name: str, *arguments: str) -> _Process:
        """Start a part, in a session of its own: Ctrl-C comes to us, and we stop the parts in order."""
        log = self.logs / f"{name}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with storage_errors(log), log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "commonweight", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )
        return _Process(name, process, log)

    def stop(self) -> None:
        """End every part: the sites, the relays, then the coordinator. What does not end is killed."""
        everything = [*self._sites, *self._relays, *self._coordinator]
        try:
            for group in (self._sites, self._relays, self._coordinator):
                for part in group:
                    part.process.terminate()
                ends = time.monotonic() + _STOP_S
                for part in group:
                    with suppress(subprocess.TimeoutExpired):
                        part.process.wait(max(0.0, ends - time.monotonic()))
        finally:
            for part in everything:
                if not part.ended:
                    part.process.kill()
                part.process.wait()

    # --- what goes wrong

    def check(self) -> None:
        """Raises RoundError: a part has ended before its time; with the end of its log."""
        for part in (*self._coordinator, *self._relays, *self._sites):
            if part.ended:
                raise RoundError(
                    f"the process {part.name} has ended, with code {part.process.returncode}", hint=self.tails([part])
                )

    def tails(self, parts: Sequence[_Process] | None = None) -> str:
        """The last lines of logs, for an error's hint."""
        lines = [f"the logs are in {self.logs}"]
        for part in (*self._coordinator, *self._relays, *self._sites) if parts is None else parts:
            lines += [f"the end of {part.log.name}:", *(f"    {line}" for line in part.tail())]
        return "\n".join(lines)

    # --- a run

    def carry_out(
        self, recipe: Recipe, output: Path, listener: Listener = lambda event, fields: None
    ) -> dict[str, Any]:
        """Submit a recipe as the lead, follow the run, and bring its result into a folder; returns its metrics.

        Args:
            recipe: over the same data and sites as the sandbox's.
            listener: told of the run's events.

        Raises:
            CommonweightError: the run failed, or a process ended; with the logs' place and ends in the hint.
        """
        prepared = prepare(recipe, IdentityFolder.open(self.lead), sites=list(self.names), purpose=PURPOSE)
        self._allow(recipe, prepared.model)
        with Client(self.lead) as client:
            run = client.submit(prepared.signed, prepared.tensors, prepared.frame)
            self.tell(f"submitted as run {run[:8]}")
            self._follow(client, run, listener)
            try:
                check_end(client.run(run))
            except CommonweightError as error:
                error.hint = "\n".join(filter(None, [error.hint, self.tails(self._sites[:5])]))
                raise
            fetch(client, run, output)
        return read_metrics(output)

    def _allow(self, recipe: Recipe, model: str) -> None:
        """Every site's policy: this model, this lead, and what the recipe needs; nothing else."""
        lead = IdentityFolder.open(self.lead).holder.signing_key.hex()
        values = {
            "models": [model],
            "signers": [lead],
            "kinds": ["train", "evaluate"],
            "purposes": [PURPOSE],
            "strategies": _methods("strategy", recipe.federation.strategy),
            "objectives": _methods("objective", recipe.training.objective),
            "relays": list(self.relays),
            "min_cohort": 1,
            "max_rounds": recipe.federation.rounds,
            "max_bytes_per_round": "1 TiB",
            "max_bytes_total": "1000 TiB",
            "privacy": {
                "dp_required": False,
                "max_epsilon": None,
                "budget": None,
                "secure_aggregation_required": False,
                "own_noise_required": False,
            },
            "remote_code": False,
            "approval": "none",
            "share": {"scores": "rows", "samples": True},
        }
        text = policy_text(Policy.model_validate(values))
        for site in self.names:
            write_text(self.folder / "sites" / site / POLICY_FILE, text)

    def _follow(self, client: Client, run: str, listener: Listener) -> None:
        """Hear a run's events to its end, and look after the processes meanwhile."""
        heard: queue.Queue[dict[str, Any] | Exception | None] = queue.Queue()
        threading.Thread(target=_hear, args=(client, run, heard), name="events", daemon=True).start()
        while True:
            try:
                event = heard.get(timeout=_LOOK_S)
            except queue.Empty:
                self.check()
                continue
            if event is None:
                return
            if isinstance(event, Exception):
                self.check()
                raise event
            fields = {key: value for key, value in event.items() if key not in ("t", "event")}
            listener(event["event"], fields)


def _at(ports: Mapping[str, int]) -> dict[str, str]:
    """Settings by which a coordinator is found where it serves now, also when it is started again."""
    services, enrolment = f"{_HOST}:{ports['services']}", f"{_HOST}:{ports['enrolment']}"
    return {
        "listen": services,
        "address": services,
        "listen_enrolment": enrolment,
        "address_enrolment": enrolment,
        "listen_http": f"{_HOST}:{ports['http']}",
    }


def _methods(kind: str, method: Method) -> list[str]:
    return [BUILT_IN] if method.name in built_in(kind) else [method.name]


def _hear(client: Client, run: str, heard: queue.Queue[dict[str, Any] | Exception | None]) -> None:
    try:
        for event in client.events(run, follow=True):
            heard.put(event)
    except Exception as error:  # whatever it is, it belongs to the thread that waits
        heard.put(error)
    heard.put(None)
