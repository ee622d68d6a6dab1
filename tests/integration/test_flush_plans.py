"""The databases find what a flush asks for by its index, however long the backlog is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.plans import analyze, fill, plans
from tests.flushing import Flushing


@pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)
def test_no_plan_reads_or_sorts_the_backlog(make_flushing: Callable[..., Flushing]) -> None:
    """Also where the planner last looked while nothing was pending."""
    flushing = make_flushing()
    fill(flushing, 50_000)
    found = plans(flushing, "idle")
    analyze(flushing)
    found += plans(flushing, "new")
    assert len(found) == 20
    assert [fault for plan in found for fault in plan.faults()] == []
