"""The breaker: a pause after each failure, one question after each pause."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_jetstream.breaker import EVERYTHING, PAUSE, Breaker

LEAST, MOST = PAUSE


class Clock:
    """A clock that is told the time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock)


def test_what_never_failed_is_not_open(breaker: Breaker) -> None:
    assert not breaker.is_open("a")
    assert not breaker.is_trying("a")
    assert breaker.error("a") is None
    assert breaker.failing_for("a") == 0
    assert breaker.names == breaker.open_names == []


def test_what_failed_is_left_alone_and_then_tried(breaker: Breaker, clock: Clock) -> None:
    breaker.fail("a", "why")
    assert breaker.is_open("a")
    assert not breaker.is_trying("a")
    assert breaker.open_names == ["a"]
    clock.now += LEAST
    assert not breaker.is_open("a")
    assert breaker.is_trying("a")
    assert breaker.open_names == []
    assert breaker.names == ["a"]
    assert breaker.error("a") == "why"


def test_what_works_again_is_closed(breaker: Breaker) -> None:
    breaker.fail("a", "why")
    breaker.fail("b", "why")
    breaker.succeed("a")
    assert breaker.names == ["b"]
    breaker.reset()
    assert breaker.names == []
    assert breaker.error("b") is None


def test_the_server_as_a_whole_is_no_subject(breaker: Breaker) -> None:
    breaker.fail(EVERYTHING, "why")
    assert breaker.is_open(EVERYTHING)
    assert breaker.names == breaker.open_names == []


@given(times=st.integers(1, 200))
def test_the_pause_doubles_with_jitter_up_to_its_most(times: int) -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for number in range(times):
        breaker.fail("a", "why")
        pause = min(MOST, LEAST * 2.0 ** min(number, 30))
        clock.now += pause * 0.499
        assert breaker.is_open("a")
        clock.now += pause * 0.501
        assert breaker.is_trying("a")


def test_it_knows_since_when_it_fails(breaker: Breaker, clock: Clock) -> None:
    for _ in range(5):
        breaker.fail("a", "why")
        clock.now += 7
    assert breaker.failing_for("a") == pytest.approx(35)
    breaker.succeed("a")
    breaker.fail("a", "again")
    assert breaker.failing_for("a") == 0
