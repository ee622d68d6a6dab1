"""Work aside: in order, in one thread, whatever fails; and leases that are renewed meanwhile."""

from __future__ import annotations

import logging
import os
import threading
import warnings

import pytest

from celery_jetstream.aside import Aside
from celery_jetstream.exceptions import InboxUnavailableError
from celery_jetstream.inbox_leases import Leases


def test_work_is_done_in_order_by_one_thread() -> None:
    aside, done = Aside(), list[tuple[int, int]]()
    for number in range(50):
        aside.put(lambda n=number: done.append((n, threading.get_ident())))  # type: ignore[misc]
    assert aside.drain(10) == 0
    assert [number for number, _ in done] == list(range(50))
    assert len({thread for _, thread in done}) == 1
    assert done[0][1] != threading.get_ident()


def test_what_fails_is_logged_and_the_rest_is_done(caplog: pytest.LogCaptureFixture) -> None:
    aside, done = Aside(), list[str]()

    def fail() -> None:
        raise ValueError("no good")

    aside.put(fail)
    aside.put(lambda: done.append("after"))
    assert aside.drain(10) == 0
    assert done == ["after"]
    assert "no good" in caplog.text


def test_a_drain_is_bounded_and_says_what_is_left() -> None:
    aside, go_on = Aside(), threading.Event()

    def wait() -> None:
        go_on.wait(30)

    aside.put(wait)
    aside.put(lambda: None)
    assert aside.drain(0.05) == 2
    go_on.set()
    assert aside.drain(10) == 0


def fork() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, from Python 3.12
        child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def test_no_child_is_forked_in_the_middle_of_work() -> None:
    """In the child what the work had locked would be locked for ever."""
    aside, working, go_on = Aside(), threading.Event(), threading.Event()

    def work() -> None:
        working.set()
        go_on.wait(30)

    aside.put(work)
    assert working.wait(10)
    forking = threading.Thread(target=fork)
    forking.start()
    forking.join(0.2)
    assert forking.is_alive()
    go_on.set()
    forking.join(10)
    assert not forking.is_alive()
    aside.put(fork)  # in the thread itself it does not wait for itself
    assert aside.drain(10) == 0


def test_a_fork_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("celery_jetstream.aside.FORK_PATIENCE", 0.05)
    aside, working, go_on = Aside(), threading.Event(), threading.Event()

    def work() -> None:
        working.set()
        go_on.wait(30)

    aside.put(work)
    assert working.wait(10)
    fork()
    assert "while a database hangs" in caplog.text
    go_on.set()
    assert aside.drain(10) == 0


def test_all_leases_are_renewed_together_while_they_are_held() -> None:
    renewed: list[set[str]] = []
    twice = threading.Event()

    def renew(owners: set[str]) -> None:
        renewed.append(owners)
        if len(renewed) == 2:
            twice.set()

    leases = Leases(renew, 0.03)
    with leases.held("one"), leases.held("other"):
        assert twice.wait(10)
    assert renewed[0] == {"one", "other"}
    leases.close(10)


def test_a_lease_that_cannot_be_renewed_is_tried_on(caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []
    again = threading.Event()

    def renew(_: set[str]) -> None:
        tries.append(1)
        if len(tries) > 2:
            again.set()
        raise InboxUnavailableError("the database is away")

    caplog.set_level(logging.WARNING)
    leases = Leases(renew, 0.03)
    with leases.held("one"):
        assert again.wait(10)
    leases.close(10)
    assert "the database is away" in caplog.text


def test_closed_leases_may_be_used_again() -> None:
    renewed = threading.Event()
    leases = Leases(lambda _: renewed.set(), 0.03)
    leases.close(1)
    with leases.held("one"):
        assert renewed.wait(10)
    leases.close(10)
