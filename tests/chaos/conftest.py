"""Fixtures of the chaos suite, and the table of measured recovery times at its end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .nursery import Nursery
from .world import World

#: (what was measured, seconds, the bound that is claimed)
Measured = Callable[[str, float, float], None]
_KEY = "recovery"
#: bounds are claimed for a machine that has nothing else to do
_BUSY = 2.0


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


@pytest.fixture
def make_world(nursery: Nursery, tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Makes federations that are gone after the test."""
    worlds: list[World] = []

    def make(**options: Any) -> World:
        worlds.append(World(nursery, tmp_path / f"federation-{len(worlds)}", **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.__exit__()


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Measured:
    """Keeps a time for the table, and holds it against its bound."""

    def measure(what: str, seconds: float, bound: float) -> None:
        record_property(_KEY, (what, seconds, bound))
        assert seconds <= bound * _BUSY, f"{what}: {seconds:.1f} s, claimed are {bound:g} s"

    return measure


def pytest_terminal_summary(terminalreporter: Any) -> None:
    times: dict[tuple[str, float], list[float]] = defaultdict(list)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for key, value in report.user_properties:
                    if key == _KEY:
                        what, seconds, bound = value
                        times[what, bound].append(seconds)
    if times:
        terminalreporter.section("recovery, in seconds")
        terminalreporter.write_line(f"{'what':64} {'times':>5} {'median':>7} {'worst':>7} {'claimed':>8}")
        for (what, bound), found in sorted(times.items()):
            found.sort()
            median = found[len(found) // 2]
            terminalreporter.write_line(f"{what:64} {len(found):5} {median:7.2f} {found[-1]:7.2f} {bound:8g}")
