"""What a run keeps for later and what it may throw away: accepted updates of the open round, sites' private state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..model.tensors import Layout
from ..strategies.update import Update
from .folder import RunFolder, read_tensors, up_to_round, write_tensors
from .journal import Journal
from .messages import Completed, TrainTask
from .tally import Sites

#: an accepted update that took its site longer than this is kept on disk until its round commits; others are redone
KEEP_UPDATES_OVER_S = 1.0


class Shelf(Protocol):
    """What the loop asks of a shelf."""

    def kept(self, round: int) -> set[str]:
        """Sites whose updates for an open round a killed process had accepted and kept."""

    def take(self, task: TrainTask) -> Completed:
        """A kept update."""

    def keep(self, update: Update) -> None:
        """Keep an accepted update if redoing it would be dear."""

    def site_file(self, site: str, round: int) -> str:
        """The name of a site's private state after a round."""

    def forget(self, round: int, answered: Sequence[str]) -> None:
        """Throw away what the commit of `round`, which these sites answered, has made rubbish."""


class FolderShelf:
    """A shelf in the run's folder."""

    def __init__(
        self, folder: RunFolder, journal: Journal, sites: Sites, layout: Layout, *, site_state: bool, keep_rounds: Any
    ) -> None:
        self.folder, self.journal, self.sites, self.layout = folder, journal, sites, layout
        self.site_state, self.keep_rounds = site_state, keep_rounds
        self._records: Mapping[str, Mapping[str, Any]] = {}

    def kept(self, round: int) -> set[str]:
        self._records = self.journal.kept_updates(round)
        return set(self._records)

    def take(self, task: TrainTask) -> Completed:
        record = self._records[task.site]
        numbers = {key: value for key, value in record.items() if key not in ("sha256", "metrics")}
        file = self.folder.update_file(task.round, self.sites.place(task.site))
        channels = read_tensors(file, self.layout, sha256=record["sha256"])
        metrics = {**record["metrics"], "kept": 1.0}
        return Completed(task, Update(task.site, task.round, channels, metrics=metrics, **numbers))

    def keep(self, update: Update) -> None:
        if update.metrics.get("seconds", 0.0) <= KEEP_UPDATES_OVER_S or update.metrics.get("kept"):
            return
        file = self.folder.update_file(update.round, self.sites.place(update.site))
        sha256 = write_tensors(file, update.channels)
        numbers = {
            "weight": update.weight,
            "num_examples": update.num_examples,
            "num_label_tokens": update.num_label_tokens,
            "num_steps": update.num_steps,
            "cluster": update.cluster,
            "num_bytes": update.num_bytes,
            "codec": update.codec,
            "metrics": dict(update.metrics),
        }
        self.journal.keep_update(update.round, update.site, {"sha256": sha256, **numbers})

    def site_file(self, site: str, round: int) -> str:
        return self.folder.site_file(self.sites.place(site), round)

    def forget(self, round: int, answered: Sequence[str]) -> None:
        self.folder.forget_before(round, self.keep_rounds)
        for site in answered if self.site_state else ():
            current = self.folder.path / self.site_file(site, round)
            for file in up_to_round(current.parent, round):
                if file != current:
                    file.unlink(missing_ok=True)
