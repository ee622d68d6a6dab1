"""The settlement table of the design, row by row."""

from __future__ import annotations

import ssl
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from billiard.exceptions import Terminated
from celery.exceptions import (
    Ignore,
    MaxRetriesExceededError,
    Reject,
    Retry,
    SoftTimeLimitExceeded,
    TimeLimitExceeded,
    WorkerLostError,
)
from hypothesis import given
from hypothesis import strategies as st

from celery_jetstream.settlement import HAND_BACKS, Ack, DeadLetter, End, Nak, Policy, decide

POLICY = Policy(
    limit=5,
    backoff=(1.0, 5.0, 15.0),
    ack_wait=30.0,
    outages=(ConnectionError,),
    handler="shop.pay",
)
NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
GONE = ConnectionResetError("away")


def reason(settlement: Any) -> str:
    assert isinstance(settlement, DeadLetter)
    return settlement.reason


@pytest.mark.parametrize(
    ("end", "attempt", "expected"),
    [
        (End.RETURNED, 1, Ack()),
        (Ignore(), 1, Ack()),
        (Retry(when=7), 1, Nak(7.0)),
        (Retry(when=0), 4, Nak(0.0)),
        (Retry(when=-1), 1, Nak(0.0)),
        (Retry(), 2, Nak(5.0)),
        (Retry(when=NOW + timedelta(seconds=9)), 1, Nak(9.0)),
        (Retry(when=NOW - timedelta(seconds=9)), 1, Nak(0.0)),
        (Reject(requeue=True), 1, Nak(1.0)),
        (Reject(requeue=True), 99, Nak(15.0)),
        (RuntimeError(), 1, Nak(1.0)),
        (RuntimeError(), 2, Nak(5.0)),
        (RuntimeError(), 4, Nak(15.0)),
        (WorkerLostError(), 1, Nak(1.0)),
        (TimeLimitExceeded(3), 4, Nak(15.0)),
        (SoftTimeLimitExceeded(), 1, Nak(1.0)),
        (SystemExit(3), 1, Nak(1.0)),
        (MemoryError(), 1, Nak(1.0)),
        (ssl.SSLCertVerificationError("a ValueError, and an OSError"), 1, Nak(1.0)),
        (End.UNKNOWN_TASK, 1, Nak(1.0)),
        (End.UNKNOWN_TASK, 99, Nak(15.0)),
        (End.DUPLICATE, 99, Nak(30.0)),
        (End.NOT_BEGUN, 99, Nak(0.0)),
        (End.CUT_OFF, 99, Nak(0.0)),
        (End.CONFLICT, 99, Nak(15.0)),
        (End.OUTAGE, 99, Nak(15.0, pause="shop.pay")),
        (End.EXPIRED, 99, None),
        (Nak(3.5), 99, Nak(3.5)),
    ],
)
def test_table(end: Any, attempt: int, expected: object) -> None:
    assert decide(end, POLICY, attempt, now=NOW) == expected


@pytest.mark.parametrize(
    ("end", "attempt", "expected"),
    [
        (Retry(when=7), 5, "max_deliveries_exceeded"),
        (RuntimeError(), 5, "max_deliveries_exceeded"),
        (RuntimeError(), 6, "max_deliveries_exceeded"),
        (WorkerLostError(), 5, "max_deliveries_exceeded"),
        (TimeLimitExceeded(3), 5, "max_deliveries_exceeded"),
        (MaxRetriesExceededError(), 5, "max_deliveries_exceeded"),
        (Reject("no", requeue=False), 1, "rejected"),
        (ValueError(), 1, "unrecoverable_error"),
        (TypeError(), 1, "unrecoverable_error"),
        (AttributeError(), 1, "unrecoverable_error"),
        (NameError(), 1, "unrecoverable_error"),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "a ValueError"), 1, "unrecoverable_error"),
        (End.REVOKED, 1, "revoked"),
        (Terminated(15), 1, "revoked"),
    ],
)
def test_dead_letters(end: Any, attempt: int, expected: str) -> None:
    assert reason(decide(end, POLICY, attempt)) == expected


def test_dead_letter_tells_the_error() -> None:
    dead = decide(ValueError("seven"), POLICY, 1)
    assert dead == DeadLetter("unrecoverable_error", "ValueError", "seven")
    dead = decide(Reject("why", requeue=False), POLICY, 1)
    assert dead == DeadLetter("rejected", "Reject", "why")
    dead = decide(Retry(exc=OSError("the cause")), POLICY, 5)
    assert dead == DeadLetter("max_deliveries_exceeded", "OSError", "the cause")


@pytest.mark.parametrize("end", [ValueError("seven"), End.REVOKED, DeadLetter("mine")])
def test_dead_letter_names_the_handler(end: Any) -> None:
    dead = decide(end, Policy(handler="shop.pay"), 1)
    assert isinstance(dead, DeadLetter)
    assert dead.handler == "shop.pay"


def test_what_autoretry_gave_up_on_is_a_dead_letter_also_when_unrecoverable() -> None:
    dead = decide(ValueError("last"), POLICY, 2, exhausted=True)
    assert reason(dead) == "max_deliveries_exceeded"


@given(st.integers(1, 10**6), st.floats(0, 1), st.booleans())
def test_an_outage_is_never_a_dead_letter(attempt: int, jitter: float, exhausted: bool) -> None:
    settlement = decide(GONE, POLICY, attempt, exhausted=exhausted, jitter=jitter)
    assert isinstance(settlement, Nak)
    full = POLICY.delay(attempt)
    assert full / 2 <= settlement.delay <= full


@given(st.integers(1, 10**6))
def test_no_limit_means_no_dead_letter_for_trying(attempt: int) -> None:
    assert isinstance(decide(RuntimeError(), Policy(limit=None), attempt), Nak)


@given(st.integers(1, 20), st.integers(1, 20))
def test_limit_is_exact(limit: int, attempt: int) -> None:
    policy = Policy(limit=limit)
    settlement = decide(RuntimeError(), policy, attempt)
    assert isinstance(settlement, Nak if attempt < limit else DeadLetter)


def test_asking_twice_answers_the_same() -> None:
    assert decide(RuntimeError(), POLICY, 2) == decide(RuntimeError(), POLICY, 2)


def test_given_up_unrun_only_beyond_the_hand_backs() -> None:
    policy = Policy(limit=5)
    assert not policy.spent(5 + HAND_BACKS)
    assert policy.spent(6 + HAND_BACKS)
    assert not Policy(limit=None).spent(10**6)
    with_inbox = Policy(limit=5, hand_backs=100)
    assert not with_inbox.spent(105)
    assert with_inbox.spent(106)
