"""One coordinator for a module of tests, with a lead, an admin and an auditor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .federations import Coordinator, Hand


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with Coordinator(tmp_path_factory.mktemp("federation")) as coordinator:
        yield coordinator


@pytest.fixture(scope="module")
def lead(coordinator: Coordinator) -> Hand:
    return coordinator.hand("lena", "lead")


@pytest.fixture(scope="module")
def admin(coordinator: Coordinator) -> Hand:
    return coordinator.hand("ada", "admin")


@pytest.fixture(scope="module")
def auditor(coordinator: Coordinator) -> Hand:
    return coordinator.hand("otto", "auditor")
