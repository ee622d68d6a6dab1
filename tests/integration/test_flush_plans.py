"""The databases find what a flush asks for by its index, however long the backlog is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.plans import analyze, fill, plans
from tests.conftest import Names
from tests.databases import Database
from tests.flushing import Flushing
from tests.servers import NatsServer


@pytest.fixture
def flushing(nats_server: NatsServer, database: Database, names: Names) -> Iterator[Flushing]:
    flushing = Flushing(nats_server.url, database, names).prepare()
    yield flushing
    flushing.close()


@pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)
def test_no_plan_reads_or_sorts_the_backlog(flushing: Flushing) -> None:
    """Also where the planner last looked while nothing was pending."""
    fill(flushing, 50_000)
    found = plans(flushing, "idle")
    analyze(flushing)
    found += plans(flushing, "new")
    assert len(found) == 20
    assert [fault for plan in found for fault in plan.faults()] == []
