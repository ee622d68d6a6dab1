"""Handlers whose database is away: one probe at a time, until one ends well."""

from __future__ import annotations

from celery_jetstream.pauses import PATIENCE, Pauses


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def paused() -> tuple[Pauses, Clock]:
    clock = Clock()
    pauses = Pauses(clock)
    assert pauses.outage("pay", 1)
    return pauses, clock


def test_nobody_pauses_at_first() -> None:
    pauses = Pauses(Clock())
    assert not pauses
    assert pauses.admits("pay", 1)
    assert pauses.ended(1) is None


def test_a_handler_pauses_and_no_other() -> None:
    pauses, _ = paused()
    assert not pauses.admits("pay", 2)
    assert pauses.admits("ship", 3)
    assert pauses.names == ["pay"]


def test_the_outages_of_what_was_on_its_way_are_one() -> None:
    pauses, clock = paused()
    assert not any(pauses.outage("pay", number) for number in range(2, 100))
    clock.now += 1
    assert pauses.admits("pay", 200), "the pause was not made longer by each of them"


def test_one_probe_at_a_time() -> None:
    pauses, clock = paused()
    clock.now += 1
    assert pauses.may_try("pay")
    assert pauses.admits("pay", 2)
    assert not pauses.admits("pay", 3)
    assert pauses.admits("pay", 2), "the probe itself may be sent again"


def test_a_probe_that_ends_well_lets_all_go_on() -> None:
    pauses, clock = paused()
    clock.now += 1
    assert pauses.admits("pay", 2)
    assert pauses.ended(99) is None, "what was on its way before says nothing"
    assert pauses.ended(2) == "pay"
    assert pauses.admits("pay", 3)
    assert not pauses


def test_a_probe_that_fails_makes_the_pause_longer() -> None:
    pauses, clock = paused()
    for _ in range(8):
        clock.now += 10
        assert pauses.admits("pay", 2)
        assert not pauses.outage("pay", 2), "it is said once"
        assert not pauses.admits("pay", 3)
    clock.now += 4
    assert not pauses.may_try("pay")
    clock.now += 10
    assert pauses.may_try("pay")


def test_a_probe_of_which_nothing_is_heard_is_followed_by_another() -> None:
    pauses, clock = paused()
    clock.now += 1
    assert pauses.admits("pay", 2)
    clock.now += PATIENCE + 1
    assert pauses.admits("pay", 3)
    assert pauses.ended(3) == "pay"
