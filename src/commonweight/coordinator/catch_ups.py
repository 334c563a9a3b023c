"""Which coded differences lead a site from the global tensors that it holds to those that a task names."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from ..federation.catch_up import chain, sizes_of, still_of_use
from .store import Store

#: runs whose versions are kept in mind
_KEPT = 64


class CatchUps:
    """Answers for all runs, from their journals: each record is read once, for nothing that was committed changes."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._known: OrderedDict[str, dict[int, dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def frames(self, run: str, held: str, wanted: str, whole: int) -> list[str]:
        """The frames of the differences, in order; []: there are none, or they are no fewer bytes than the tensors.

        Args:
            held, wanted: digests of two of the run's bases.
            whole: bytes of the tensors.
        """
        states = self._states(run)
        # a round may have changed nothing: of equal bases those count that are nearest to each other
        to = next((round for round in sorted(states) if states[round]["base"] == wanted), None)
        before = [round for round in states if states[round]["base"] == held and to is not None and round < to]
        if to is None or not before:
            return []
        sizes = sizes_of({round: {"state": state} for round, state in states.items()})
        there = {round: sizes[round] for round in still_of_use(sizes, whole)}
        rounds = chain(there, whole, max(before), to)
        return [states[round]["down"]["frame"] for round in rounds or ()]

    def _states(self, run: str) -> dict[int, dict[str, Any]]:
        with self._lock:
            known = self._known.setdefault(run, {})
            self._known.move_to_end(run)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        fresh = self.store.commits(run, max(known, default=-1))
        known.update({round: record["state"] for round, record in fresh.items()})
        return dict(known)
