"""What the loop knows of the sites, and the figures of a round."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..model.tensors import Layout
from ..privacy.secure_aggregation.rows import Totals
from ..strategies.base import Strategy
from ..strategies.update import Update

#: what stands in the place of a codec's name for tensors as they are
PLAIN = "none"


@dataclass(frozen=True)
class Sites:
    """The sites of a run, in the order of folding.

    Args:
        names: all of them.
        steps: optimizer steps a round, by site.
        groups: the group (patient, disease …) of each held-out row, by site.
        bytes_up, bytes_down: bytes of one copy of the tensors that a site sends and fetches, by site, where that is
            less than the whole.
        units: training examples, or with privacy of groups groups of them, by site, as far as it is known.
    """

    names: tuple[str, ...]
    steps: Mapping[str, int]
    groups: Mapping[str, list[str]]
    bytes_up: Mapping[str, int] = field(default_factory=dict)
    bytes_down: Mapping[str, int] = field(default_factory=dict)
    units: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def place(self, site: str) -> int:
        """A site's place in the order: its name in file names."""
        return self._places[site]


@dataclass
class Timing:
    """Where a round's seconds went. What is neither folding, committing nor waiting for an evaluation is training."""

    started: float = field(default_factory=time.perf_counter)
    fold: float = 0.0
    trained_at: float = field(default_factory=time.perf_counter)

    def seconds(self, evaluated_at: float, committed_at: float) -> dict[str, float]:
        return {
            "train": self.trained_at - self.started - self.fold,
            "fold": self.fold,
            "evaluate": evaluated_at - self.trained_at,
            "commit": committed_at - evaluated_at,
        }


@dataclass
class Tally:
    """A round's figures for people, added up as updates are folded.

    Args:
        layout: of the global tensors.
        sites: those that send or fetch less say so.
        channels: of an update.
        copies_down: of its tensors that a site fetches: the strategy's other channels are of the same size.
        fetched: what each site of the cohort fetches, if that is something else than copies.
        codecs: how many updates came in how many bytes, by the name of what made them so (`PLAIN`: nothing).
        sent: bytes by site.
    """

    lr: float
    layout: Layout
    sites: Sites
    copies_down: int = 1
    fetched: Mapping[str, int] = field(default_factory=dict)
    channels: int = 1
    updates: int = 0
    bytes_up: int = 0
    steps: int = 0
    examples: int = 0
    label_tokens: int = 0
    nats: float = 0.0
    late: list[str] = field(default_factory=list)
    codecs: dict[str, list[int]] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    relays: dict[str, int] = field(default_factory=dict)

    def add(self, update: Update, *, relay: str = "") -> None:
        """Count an update; `relay`: by whose sum it came in."""
        self.updates += 1
        self.hear(update)
        if relay:
            self.relays[relay] = self.relays.get(relay, 0) + 1
        self.steps += update.num_steps
        self.examples += update.num_examples
        self.label_tokens += update.num_label_tokens
        self.nats += update.metrics.get("loss", 0.0) * update.num_label_tokens

    def hear(self, update: Update) -> None:
        """Count the bytes of an update, taken in or not."""
        num_bytes = self.bytes_of(update)
        self.bytes_up += num_bytes
        self.sent[update.site] = self.sent.get(update.site, 0) + num_bytes
        kind = update.codec or PLAIN
        so_far = self.codecs.setdefault(kind, [0, 0])
        so_far[0] += 1
        so_far[1] += num_bytes

    def take(self, totals: Totals) -> None:
        """The figures of updates that were seen in sums alone."""
        self.examples, self.label_tokens, self.nats = totals.examples, totals.label_tokens, totals.nats

    def bytes_of(self, update: Update) -> int:
        """What an update's site has sent."""
        copy = self.sites.bytes_up.get(update.site, self.layout.num_bytes)
        return update.num_bytes or copy * self.channels

    def bytes_told(self, update: Update) -> dict[str, Any]:
        """What an event says of an update's bytes, and of those of its task."""
        codec = update.codec or PLAIN
        return {"bytes_up": self.bytes_of(update), "bytes_down": self.bytes_to(update.site), "codec": codec}

    def bytes_to(self, site: str) -> int:
        """What a site fetches for its task."""
        return self.fetched.get(site, self.sites.bytes_down.get(site, self.layout.num_bytes) * self.copies_down)

    def record(self, cohort: Iterable[str], strategy: Strategy, *, relays: bool = False) -> dict[str, Any]:
        """`bytes_up`: what sites send, `bytes_down`: what they fetch. With relays, `bytes_received`: what reaches the
        coordinator, which is one sum a region, in float32 at least, and the updates that came by themselves.
        `train_loss` is None where sites do not say what they trained on. `codecs`, `site_bytes`: as `metrics.json` has
        them (`record.py`).

        Args:
            cohort: the sites that were given a task, one as often as it was.
        """
        down = {site: times * self.bytes_to(site) for site, times in Counter(cohort).items()}
        copy, channels = self.layout.num_bytes, len(strategy.update_channels)
        received = (self.updates - sum(self.relays.values())) * copy + len(self.relays) * self.layout.num_wide_bytes
        return {
            "lr": self.lr,
            "train_loss": self.nats / self.label_tokens if self.label_tokens else None,
            "steps": self.steps,
            "examples": self.examples,
            "label_tokens": self.label_tokens,
            "bytes_up": self.bytes_up,
            "bytes_down": sum(down.values()),
            "codecs": self.codecs,
            "site_bytes": {site: [self.sent.get(site, 0), fetched] for site, fetched in down.items()},
            **({"bytes_received": received * channels} if relays else {}),
        }
