"""The global model of a run: what the strategy carries from round to round, and how a round changes it.

`MemoryModel` holds it in this process, and its files lie in the run's folder. A coordinator's model lies in files only
and is worked on piece by piece (`coordinator/stored_model.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..codec.down import Down, num_bytes
from ..errors import RoundError
from ..model.clusters import channel_of
from ..model.moved_base import MovedBase
from ..model.tensors import Layout, NamedTensors, first_non_finite
from ..privacy.secure_aggregation.rows import Totals
from ..recipe.schema import FederationSpec
from ..strategies.base import Fold, ServerState, Strategy, SumStrategy, WeightedSum
from ..strategies.clusters.sketch import sketches_of
from ..strategies.individuals import Kept
from ..strategies.side_by_side import InMemory
from ..strategies.update import Update, check
from .clusters import save_models
from .folder import RunFolder, read_tensors, write_tensors
from .messages import Engine
from .private_rounds import PrivateRounds
from .relays import merge_partials
from .residuals import Residual, Residuals
from .secure_rounds import GroupTotals, mean_of_group
from .simulated_sums import SimulatedSums

#: in a state's file, beside the strategy's slots: what sites were not sent yet
_LATE = "slot/late-theta"


class GlobalModel(Protocol):
    """What the loop asks of a global model.

    Args:
        clusters: the cluster that each site was last in, where the strategy keeps several models.
    """

    clusters: dict[str, int]

    private: PrivateRounds | None
    #: what the round just closed says of all its sites together, where updates are seen in sums alone
    totals: Totals | None
    #: why groups whose sums were opened have nothing in it, by their places
    spoilt: Mapping[int, str]

    @property
    def layout(self) -> Layout:
        """Of the global tensors."""

    def first(self) -> dict[str, Any]:
        """Begin with the initial tensors; what the journal keeps of them as round 0."""

    def restore(self, round: int, record: Mapping[str, Any]) -> None:
        """Take up the state that `record` names, as a round's commit left it."""

    def announce(self, engine: Engine) -> None:
        """Make it what the engine's participants start from."""

    def open(self) -> None:
        """Begin a round."""

    def check(self, update: Update) -> None:
        """Raises UpdateRefused: the update breaks its contract."""

    def fold(self, update: Update) -> None:
        """Take in one checked update."""

    def relay(self, update: Update) -> str:
        """The relay by whose sum an update comes in; "": it comes by itself."""

    def close(self, round: int) -> dict[str, Any]:
        """End a round with what was folded; what the journal keeps of the new state, which is on disk.

        Raises:
            RoundError: the result is not finite; the last committed state is untouched.
        """

    def committed(self, round: int) -> None:
        """The journal has the commit of `round`: nothing will be asked of it again."""


class MemoryModel:
    """A global model in this process's memory.

    Args:
        theta: the initial global tensors, owned from now on; a resumed run takes their layout only.
        save_adapter: writes global tensors into a folder as an adapter that others can open.
        spec: names the relays, if there are any.
        private: makes rounds' sums private; None: they are not.
        base: what the participants' models compute with under the adapter, if the strategy adds to it.
        secure: adds updates up where nobody sees one alone; None: they are folded as they are.
        down: makes what a round has changed small on its way to the sites, who then hold what is coded, and that is
            the model; None: it is sent as it is.
    """

    def __init__(
        self,
        strategy: Strategy,
        theta: NamedTensors,
        folder: RunFolder,
        save_adapter: Callable[[NamedTensors, Path], None],
        spec: FederationSpec | None = None,
        private: PrivateRounds | None = None,
        base: MovedBase | None = None,
        secure: SimulatedSums | None = None,
        down: Down | None = None,
    ) -> None:
        if strategy.moves_base and base is None:
            raise ValueError(f"{strategy.name} adds to the base, and there is none to add to")
        self.strategy, self.folder, self._theta, self._save_adapter = strategy, folder, theta, save_adapter
        self._base, self.residuals = base, Residuals(folder.path)
        self.clusters: dict[str, int] = {}
        self.state: ServerState
        self.private, self.secure, self.down = private, secure, down
        self._late = None if down is None else NamedTensors.zeros(theta.layout, wide=True)
        self.totals: Totals | None = None
        self.spoilt: Mapping[int, str] = {}
        self._relays = () if spec is None else tuple(spec.relays)
        self._relay_of = {} if spec is None else spec.relay_of
        self._folds: dict[str, Fold] = {}
        self._kept: Kept | None = None
        self._of: dict[str, int] = {}
        self._round = 0

    @property
    def layout(self) -> Layout:
        return self._theta.layout

    def first(self) -> dict[str, Any]:
        self.state = self.strategy.init(self._theta)
        return self._write(0)

    def restore(self, round: int, record: Mapping[str, Any]) -> None:
        groups = read_tensors(self.folder.state_file(round), self.layout, sha256=record["sha256"])
        self._late = groups.pop(_LATE, None)
        slots = {name.removeprefix("slot/"): t for name, t in groups.items() if name != "theta"}
        self.state, self._round = ServerState(groups["theta"], slots, dict(record.get("numbers", {}))), round
        if "residual" in record:
            self.residuals.check(round, record["residual"]["sha256"])
            for residual in self.residuals.read(round):
                self._move(residual)
        self.committed(round)  # a kill may have come between the commit and this

    def announce(self, engine: Engine) -> None:
        slots = self.state.slots
        engine.broadcast(self.state.theta, {name: slots[name] for name in self.strategy.broadcast_channels})

    def open(self) -> None:
        self._folds = {"": self.strategy.open(self.state)}
        self._kept = Kept() if self._round + 1 == self.strategy.grouping_round else None
        self._of = {}

    def check(self, update: Update) -> None:
        check(update, round=self._round + 1, layout=self.layout, channels=self.strategy.update_channels)
        if self.secure is not None:
            self.secure.check(update)

    def fold(self, update: Update) -> None:
        if self.secure is not None:
            self.secure.add(update)
            return
        if self._kept is not None:
            self._kept.add(update)
            return
        self._of[update.site] = update.cluster
        relay = self.relay(update)
        if relay not in self._folds:
            self._folds[relay] = self.strategy.open(self.state)
        self._folds[relay].add(update)

    def relay(self, update: Update) -> str:
        return self._relay_of.get(update.site, "")

    def _group(self, kept: Kept) -> None:
        """Fold a round's updates, now that all of them are there to be put into clusters."""
        self._kept = None
        clusters = self.strategy.grouped(sketches_of(InMemory(self.state, kept.updates)))
        for update in kept.updates:
            self.fold(replace(update, cluster=clusters[update.site]))

    def close(self, round: int) -> dict[str, Any]:
        if self._kept is not None and self._kept.updates:
            self._group(self._kept)
        whole = self._folds.pop("")
        merge_partials(whole, [self._folds.pop(relay) for relay in self._relays if relay in self._folds])
        if self.secure is not None:
            self._take_sums(self.secure, whole)
        if self.private is not None:
            assert isinstance(self.strategy, SumStrategy)
            self.strategy.private = self.private.mean(round)
        before = self.state.theta.clone() if self.down is not None else None
        self.state = self.strategy.close(self.state, whole)
        bad = first_non_finite(self.state.theta)
        if bad is not None:
            raise RoundError(
                f"round {round}: {self.strategy.name}'s step made {bad!r} non-finite; the round was not committed",
                hint="lower the strategy's lr or the sites' training.lr",
            )
        sent = None if before is None else self._follow(round, before)
        self._round = round
        if 0 < self.strategy.grouping_round <= round:
            self.clusters.update(self._of)
        folder = self.folder.round_folder(round)
        self.save_models(folder, folder, self.clusters)
        record = self._write(round)
        if sent is not None:
            record["down"] = {"bytes": sent}
        if self.strategy.moves_base:
            record["residual"] = self.residuals.write(round, self.state.residual)
            self._move(self.state.residual)
        return record

    def _follow(self, round: int, before: NamedTensors) -> int:
        """Make of what the round's step has left what sites will hold; returns the bytes that they are sent."""
        assert self.down is not None
        assert self._late is not None
        coded = self.down.follow(round, before, self.state.theta, self._late)
        return num_bytes([len(one.payload) for one in coded])

    def _take_sums(self, secure: SimulatedSums, whole: Fold) -> None:
        """Fold what was opened: the one sum, or each group's mean as if it were an update."""
        if isinstance(whole, WeightedSum):
            ((_, one),) = secure.opened
            self.totals = one.into(whole)
            return
        groups = GroupTotals()
        for place, one in secure.opened:
            fold = WeightedSum(self.layout, ("delta",))
            totals = groups.read(place, partial(one.into, fold))
            mean = fold.sums["delta"] if totals is None else fold.mean()
            whole.add(mean_of_group(place, self._round + 1, totals, {"delta": mean}))
        self.totals, self.spoilt = groups.sum, groups.spoilt

    def _move(self, residual: Residual) -> None:
        assert self._base is not None
        self._base.add({module: (factors.B, factors.A) for module, factors in residual.items()})

    def committed(self, round: int) -> None:
        if self.private is not None:
            self.private.committed(round)

    def model_of(self, cluster: int) -> NamedTensors:
        """A cluster's tensors, in the model's own dtypes."""
        if not cluster:
            return self.state.theta
        narrow = NamedTensors.empty(self.layout)
        return narrow.copy_(self.state.slots[channel_of(cluster)])

    def save_models(
        self,
        adapter: Path,
        root: Path,
        clusters: Mapping[str, int],
        save: Callable[[NamedTensors, Path], None] | None = None,
    ) -> None:
        """Write the model as adapters, as `clusters.py` says."""
        models = {cluster: self.model_of(cluster) for cluster in {0, *clusters.values()}}
        save_models(adapter, root, models, clusters, save or self._save_adapter)

    def _write(self, round: int) -> dict[str, Any]:
        state = self.state
        groups = {"theta": state.theta, **{f"slot/{name}": slot for name, slot in state.slots.items()}}
        if self._late is not None:
            groups[_LATE] = self._late
        file = self.folder.state_file(round)
        record = {"file": file.name, "sha256": write_tensors(file, groups)}
        return {**record, "numbers": dict(state.numbers)} if state.numbers else record
