"""SIGKILL at each step of a private round: its cost, its noise and its result are as if nothing had been."""

from __future__ import annotations

import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from commonweight.federation.ledger_file import LedgerFile
from commonweight.privacy.accounting import Releases, epsilon
from commonweight.privacy.spending import Budget
from commonweight.recipe import Recipe
from tests.processes import Death, Nursery
from tests.unit.test_private_runs import PRIVATE, private, theta_of

MakeRecipe = Callable[..., Recipe]
KILLED = -signal.SIGKILL
#: in the order in which a round comes to them; what each leaves behind is resumed, and dies at the next
STEPS = (
    Death("ledger.charge", "before"),
    Death("ledger.charge", "after"),
    Death("private.mean", "before"),
    Death("private.mean", "after"),  # the noise is drawn and journalled
    Death("write_state", "before"),
    Death("write_state", "after"),  # the noisy mean is on the disk
    Death("journal.commit", "before"),
    Death("journal.commit", "after"),
    Death("journal.drop", "before"),
    Death("journal.drop", "after"),
)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("nursery") / "log") as nursery:
        yield nursery


def kept(folder: Path) -> tuple[int, list[str]]:
    """The last committed round, and the keys of noise in the journal."""
    with closing(sqlite3.connect(folder / "state.sqlite")) as database:
        (last,) = database.execute("SELECT max(round) FROM commits").fetchone()
        keys = database.execute("SELECT record FROM results WHERE key LIKE 'noise/%' ORDER BY key").fetchall()
    return int(last or 0), [key for (key,) in keys]


def charged(ledger: Path) -> dict[str, int]:
    with LedgerFile(ledger) as file:
        return {line.site: line.spend.count for line in file.lines()}


@pytest.mark.parametrize(
    "privacy",
    [PRIVATE, {**PRIVATE, "mechanism": {"name": "banded-toeplitz", "min_separation": 3}}],
    ids=["gaussian", "banded-toeplitz"],
)
def test_every_step_of_a_private_round_may_be_the_last(
    make_recipe: MakeRecipe, tmp_path: Path, nursery: Nursery, privacy: dict[str, Any]
) -> None:
    apart = "mechanism" in privacy
    federation = {"rounds": 2, "weighting": "uniform", **({"cohort": 1} if apart else {})}
    recipe = private(make_recipe, federation=federation, privacy=privacy, training={"steps": 1})
    folder, ledger, twin = tmp_path / "run", tmp_path / "ledger", tmp_path / "twin"
    with LedgerFile(ledger) as file:  # just what the run needs: whoever pays twice is refused
        file.set_budget(Budget(unit="site", epsilon=epsilon(Releases(0.3, 1 if apart else 2), 1e-5), delta=1e-5))

    def live(where: Path, book: Path, death: Death | None) -> None:
        begun = (where / "state.sqlite").exists()
        pid = nursery.start(recipe, where, resume=begun, death=death, ledger=book, keep_updates_over_s=0.0)
        assert nursery.wait(pid) == (KILLED if death else 0), (death, nursery.log.read_text())

    keys: list[list[str]] = []
    for step in STEPS:
        live(folder, ledger, step)
        last, noise = kept(folder)
        keys.append(noise)
        assert last == (0 if STEPS.index(step) < 7 else 1 if step.place != "journal.drop" or not apart else 2)
    assert keys[:3] == [[], [], []]
    assert len(keys[3]) == 1
    assert all(noise == keys[3] for noise in keys[4:8]), "the noise is never drawn again"

    shutil.copytree(folder, twin)
    shutil.copy(ledger, tmp_path / "book")
    live(folder, ledger, None)
    live(twin, tmp_path / "book", None)
    assert kept(folder) == kept(twin) == (2, [])
    first = theta_of(folder, 1)
    assert all(torch.equal(tensor, first[name]) for name, tensor in theta_of(twin, 1).items())
    counts = charged(ledger)
    assert sum(counts.values()) == (2 if apart else 6)
    assert set(counts.values()) == {1 if apart else 2}


@pytest.mark.kills
def test_a_killed_round_is_released_with_the_noise_that_was_journalled(
    make_recipe: MakeRecipe, tmp_path: Path, nursery: Nursery
) -> None:
    """Two copies of what a kill left behind come to the same model, which is not that of another drawing."""
    recipe = private(make_recipe, federation={"rounds": 1, "weighting": "uniform"}, training={"steps": 1})
    results = {}
    for name, death in (("one", Death("write_state", "after", 2)), ("other", None)):
        pid = nursery.start(recipe, tmp_path / name, death=death)
        assert nursery.wait(pid) == (KILLED if death else 0), nursery.log.read_text()
    shutil.copytree(tmp_path / "one", tmp_path / "twin")
    for name in ("one", "twin"):
        assert nursery.wait(nursery.start(recipe, tmp_path / name, resume=True)) == 0, nursery.log.read_text()
    results = {name: theta_of(tmp_path / name, 1) for name in ("one", "twin", "other")}
    assert all(torch.equal(tensor, results["twin"][name]) for name, tensor in results["one"].items())
    assert any((tensor != results["other"][name]).any() for name, tensor in results["one"].items())
