"""What becomes of a row that was not stored: the decision, as tables and properties."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_jetstream.config import Config
from celery_jetstream.outcomes import Verdict
from celery_jetstream.recorder import NO_STREAM_PAUSE, next_step
from celery_jetstream.rows import Failure, backoff
from celery_jetstream.sqltypes import ERROR_CAP, kept

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)
CONFIG = Config(
    app_name="hub",
    destination_app="desk",
    outbox_max_attempts=3,
    outbox_max_age=100,
    outbox_no_stream_grace=60,
)
REFUSED, NO_STREAM, UNKNOWN = Verdict.REFUSED, Verdict.NO_STREAM, Verdict.UNKNOWN
LATER = "later"


def step(
    verdict: Verdict, attempts: int, failing_for: float, missing_for: float = 0.0
) -> str | timedelta:
    failure = Failure(1, attempts, failing_for, NOW)
    return next_step(verdict, failure, CONFIG, missing_for=missing_for, jitter=0.5)


@pytest.mark.parametrize(
    ("verdict", "attempts", "failing_for", "missing_for", "expected"),
    [
        (REFUSED, 0, 0, 0, "failed"),
        (REFUSED, 7, 9999, 0, "failed"),
        (UNKNOWN, 0, 0, 0, LATER),
        (UNKNOWN, 1, 9999, 0, LATER),  # too old, but not tried often enough
        (UNKNOWN, 2, 99, 0, LATER),  # tried often enough, but not old enough
        (UNKNOWN, 2, 100, 0, "exception"),
        (UNKNOWN, 2000, 99, 0, LATER),
        (UNKNOWN, 2000, 100, 0, "exception"),
        (NO_STREAM, 0, 0, 0, LATER),
        (NO_STREAM, 2000, 59, 59, LATER),
        (NO_STREAM, 0, 60, 0, "failed"),  # the row remembers, though the process is new
        (NO_STREAM, 0, 0, 60, "failed"),  # the process remembers, though the row is new
    ],
)
def test_the_next_step(
    verdict: Verdict, attempts: int, failing_for: float, missing_for: float, expected: str
) -> None:
    found = step(verdict, attempts, failing_for, missing_for)
    assert isinstance(found, timedelta) if expected == LATER else found == expected


def test_a_missing_stream_is_looked_for_often() -> None:
    most = timedelta(seconds=NO_STREAM_PAUSE)
    assert step(NO_STREAM, 2000, 0) == most
    assert step(NO_STREAM, 0, 0) == timedelta(seconds=0.5)


@pytest.mark.parametrize(
    ("attempts", "most"), [(0, 1), (1, 2), (5, 32), (8, 256), (9, 300), (2000, 300), (10**9, 300)]
)
def test_the_backoff_doubles_up_to_five_minutes(attempts: int, most: float) -> None:
    assert backoff(attempts, 1.0) == timedelta(seconds=most)
    assert backoff(attempts, 0.0) == timedelta(seconds=0.05)


@given(attempts=st.integers(0, 10**12), jitter=st.floats(0, 1))
def test_the_backoff_is_a_part_of_its_most(attempts: int, jitter: float) -> None:
    delay = backoff(attempts, jitter)
    assert timedelta(seconds=0.05) <= delay <= timedelta(seconds=300)
    assert delay <= backoff(attempts + 1, jitter)


@given(
    verdict=st.sampled_from([REFUSED, NO_STREAM, UNKNOWN]),
    attempts=st.integers(0, 10**9),
    failing_for=st.floats(0, 10**9),
    missing_for=st.floats(0, 10**9),
)
def test_a_row_is_given_up_or_tried_again_and_nothing_else(
    verdict: Verdict, attempts: int, failing_for: float, missing_for: float
) -> None:
    found = step(verdict, attempts, failing_for, missing_for)
    assert isinstance(found, timedelta) or found in ("failed", "exception")
    assert (found == "exception") <= (verdict is UNKNOWN)


@given(error=st.text(st.characters(exclude_categories=[])))
def test_what_is_kept_of_an_error_is_text_for_every_database(error: str) -> None:
    text = kept(error * 3)
    assert "\0" not in text
    assert len(text) <= ERROR_CAP
    text.encode()


def test_what_is_kept_of_an_error_is_capped() -> None:
    assert kept("x" * 10_000) == "x" * ERROR_CAP
