"""The parts of the chaos runs that decide: what is broken, what is wrong, what is reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.crash.chaos.account import DeadLetter, Found, violations
from tests.crash.chaos.report import account_of, rows_of, slowest, table
from tests.crash.chaos.run import Firing, Result
from tests.crash.chaos.schedule import Fault, plan, ways
from tests.crash.chaos.services import End, left_of
from tests.servers import wait_until

MODES = pytest.mark.parametrize("direct", [False, True])


@MODES
def test_a_seed_says_all_that_is_broken(direct: bool) -> None:
    assert plan(7, direct, 40) == plan(7, direct, 40)
    assert plan(7, direct, 40)[:7] == plan(7, direct, 7)
    assert plan(7, direct, 40) != plan(8, direct, 40)


@MODES
def test_a_long_run_breaks_all_there_is(direct: bool) -> None:
    injected = Counter(
        (fault.how, fault.what) for volley in plan(1, direct, 40) for fault in volley.faults
    )
    assert injected.keys() == set(ways(direct))
    assert max(injected.values()) - min(injected.values()) <= 1


# -- invariants ------------------------------------------------------------------------------------


def good() -> Found:
    """A run that ended well: an event of each kind."""
    handled = ["a", "b", "c", "d"]
    orders = dict(
        zip(handled, ["paid.order", "passed.on", "noted.order", "plain.order"], strict=True)
    )
    orders |= {"e": "poison.value", "f": "unknown.order"}
    return Found(
        orders=orders,
        outbox=dict.fromkeys(orders, "sent"),
        effects=Counter({"a": 1, "b": 1, "c": 2, "d": 1}),
        inbox={"a": "processed", "b": "processed", "c": "processed", "e": "failed"},
        passed_on={"b"},
        dead=[DeadLetter("e", "unrecoverable_error", 5), DeadLetter("f", "no_handler", 6)],
        consumer={"num_pending": 0, "num_ack_pending": 0},
    )


def test_a_run_that_ended_well_has_nothing_wrong() -> None:
    assert violations(good()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.outbox.pop("a"), "committed, and not in the outbox: a"),
        (lambda f: f.outbox.update(x="sent"), "in the outbox, and never committed: x"),
        (lambda f: f.effects.pop("d"), "lost: committed, no effect and no dead letter: d"),
        (lambda f: f.effects.update("x"), "an effect of an event that was never committed: x"),
        (lambda f: f.effects.update("a"), "more than one effect: a"),
        (lambda f: f.effects.update("e"), "an effect of an event that failed: e"),
        (lambda f: f.passed_on.clear(), "handled, and not passed on: b"),
        (lambda f: f.passed_on.add("x"), "passed on, and not handled: x"),
        (lambda f: f.dead.append(DeadLetter("a", "rejected", 1)), "a dead letter of a good event"),
        (lambda f: f.dead.append(f.dead[0]), "two dead letters of one message"),
        (lambda f: f.dead.pop(), "no dead letter of a bad event"),
        (lambda f: f.inbox.update(x="failed"), "an inbox row of an event that was never"),
        (lambda f: f.inbox.update(a="failed"), "an inbox row that says failed: a"),
        (lambda f: f.inbox.pop("a"), "handled, and not processed by the inbox: a"),
        (lambda f: f.inbox.update(e="processed"), "its inbox row does not say failed: e"),
        (lambda f: f.inbox.update(a="processing"), "1 inbox rows that are open"),
        (lambda f: f.outbox.update(a="exception"), "1 outbox rows that are not sent"),
        (lambda f: setattr(f, "leases", 2), "2 leases of the outbox"),
        (lambda f: setattr(f, "holds", 2), "2 keys held in the outbox"),
        (lambda f: setattr(f, "stored", 2), "2 messages for the bank in the stream"),
        (lambda f: f.consumer.update(num_ack_pending=3), "3 num_ack_pending of the consumer"),
        (lambda f: f.queues.update(bank=4), "4 messages in Redis's bank"),
    ],
)
def test_what_is_wrong_is_said(change: Callable[[Found], Any], said: str) -> None:
    found = good()
    change(found)
    assert any(said in sentence for sentence in violations(found)), violations(found)


@pytest.mark.parametrize(
    ("status", "signals", "ready", "wrong"),
    [
        (0, [signal.SIGTERM], True, False),
        (1, [signal.SIGTERM], True, True),
        (-signal.SIGTERM, [signal.SIGTERM], False, False),
        (-signal.SIGTERM, [signal.SIGTERM], True, True),
        (-signal.SIGKILL, [signal.SIGTERM, signal.SIGKILL], True, False),
        (-signal.SIGKILL, [], True, True),
        (1, [], False, False),
        (1, [signal.SIGSTOP, signal.SIGCONT], True, True),
    ],
)
def test_how_a_process_may_end(status: int, signals: list[int], ready: bool, wrong: bool) -> None:
    end = End("bridge", 1, status, signals, ready, Path(os.devnull))
    assert bool(end.wrong) is wrong


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_that_is_left_running_is_found() -> None:
    mark = f"CHAOS_RUN={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    with subprocess.Popen(["sleep", "60"], env={**os.environ, name: value}) as process:
        wait_until(lambda: left_of(mark) == [f"{process.pid}: sleep 60 "], 10, "it to be found")
        process.kill()
    assert left_of(mark) == []


def test_a_known_defect_of_celerys_is_not_held_against_us() -> None:
    log = Path(os.devnull)
    assert End("worker", 1, 1, [], True, log).wrong
    assert not End("worker", 1, 1, [], True, log, celerys_own=True).wrong


# -- report ----------------------------------------------------------------------------------------


def ran() -> Result:
    """Two volleys; an event handled before the first, one in between, one lost after."""
    result = Result("bridge", 7, 2)
    kill, stop = Fault("SIGKILL", "worker"), Fault("SIGSTOP", "Redis", lasts=2)
    result.firings = [Firing(10, 11, 12, [kill]), Firing(20, 24, 26, [kill, stop])]
    result.written = [("a", 1.0), ("b", 9.0), ("c", 19.0)]
    result.effects = [("a", 2.0), ("b", 11.5), ("b", 25.0)]
    result.found.orders = dict.fromkeys("abc", "paid.order")
    result.found.effects = Counter({"a": 1, "b": 2})
    return result


def test_a_fault_is_charged_with_what_was_in_flight() -> None:
    kill, stop, whole = rows_of(ran())
    assert kill["times"] == 2
    assert kill["events"] == 2  # b in the first volley, c in the second
    assert kill["lost"] == stop["lost"] == whole["lost"] == 1
    assert kill["doubled"] == 1
    assert stop["doubled"] == 0
    assert whole["events"] == 3


def test_a_stall_is_the_longest_time_without_an_effect() -> None:
    kill, stop, _ = rows_of(ran())
    assert kill["stall"] == 1.5
    assert kill["stall_with_others"] == stop["stall_with_others"] == 5.0
    assert stop["stall"] == 0


def test_a_handler_that_stood_still_shows_in_the_slowest_events() -> None:
    assert slowest(ran(), 1) == [(2.5, "b", "paid.order")]


def test_rounds_add_up_in_one_table() -> None:
    rows = [row for _ in range(2) for row in account_of(ran())["faults"]]
    head, kill, stop, whole = table(rows)
    assert kill.split()[:5] == ["SIGKILL", "worker", "4", "4", "2"]
    assert stop.startswith("SIGSTOP Redis")
    assert whole.startswith("all of it")
    assert head.startswith("fault")
