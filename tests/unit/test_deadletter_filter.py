"""Which dead letters a filter admits, and how one is read. Pure."""

from __future__ import annotations

import gzip
import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_jetstream.deadletter_filter import (
    EVERY_LETTER,
    DeadLetterCounts,
    DeadLetterFilter,
    counted,
)
from celery_jetstream.exceptions import EventError, SubjectError
from celery_jetstream.letters import StoredDeadLetter, read_letter
from celery_jetstream.redrive import message_of

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
CONTEXT = {
    "event_id": "e-1",
    "error_class": "ValueError",
    "error_message": "Seven is no colour",
    "handler": "shop.pay",
    "original_subject": "hub.sync.desk",
    "stream_sequence": 42,
    "consumer": "desk-workers",
    "timestamp": "2026-01-02T03:03:05+00:00",
}
BODY = b'{"event_id":"e-1","event_type":"order.placed","payload":{"id":1},"producer":"hub"}'


def letter(
    body: bytes = BODY, context: Any = CONTEXT, sequence: int = 7, **headers: str
) -> StoredDeadLetter:
    found = {
        "Nats-Msg-Id": "dlq-orders-42",
        "x-dlq-reason": "unrecoverable_error",
        "x-deliveries": "3",
        "x-dlq-context": context if isinstance(context, str) else json.dumps(context),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    return read_letter(sequence, "desk.sync.dlq", found, body, NOW, NOW)


@pytest.mark.parametrize(
    ("fits", "fits_not"),
    [
        ({"reason": "unrecoverable_error"}, {"reason": "rejected"}),
        ({"reason": "unrecoverable"}, {"reason": ""}),
        ({"event_type": "order.*"}, {"event_type": "order.*.*"}),
        ({"event_type": "order.placed"}, {"event_type": "order"}),
        ({"event_type": ">"}, {"event_type": "user.>"}),
        ({"source": "hub"}, {"source": "desk"}),
        ({"handler": "shop.pay"}, {"handler": "shop"}),
        ({"error": "valueerror"}, {"error": "TypeError"}),
        ({"error": "IS NO"}, {"error": "is not"}),
        ({"error": "ValueError: seven"}, {"error": "seven: ValueError"}),
        ({"older_than": 60}, {"older_than": 61}),
        ({"newer_than": 60}, {"newer_than": 59}),
        ({"ids": ("e-1",)}, {"ids": ("e",)}),
        ({"ids": ("7",)}, {"ids": ("42",)}),
        ({"ids": ("x", "7")}, {"ids": ("x", "8")}),
        ({"handler": "shop.pay", "source": "hub"}, {"handler": "shop.pay", "source": "x"}),
    ],
)
def test_what_a_filter_admits(fits: dict[str, Any], fits_not: dict[str, Any]) -> None:
    assert DeadLetterFilter(**fits).admits(letter())
    assert not DeadLetterFilter(**fits_not).admits(letter())


def test_nothing_given_admits_everything_and_is_empty() -> None:
    assert EVERY_LETTER.is_empty
    assert EVERY_LETTER.admits(letter(b"", "{"))
    for name in ("reason", "error"):
        assert not DeadLetterFilter(**{name: ""}).is_empty


def test_a_type_that_is_no_subject_is_found_as_it_is_and_under_no_pattern() -> None:
    odd = letter(b'{"event_type": "a..b"}')
    assert not DeadLetterFilter(event_type=">").admits(odd)
    with pytest.raises(SubjectError):
        DeadLetterFilter(event_type="a..b")


def test_of_an_id_of_a_mapping_and_of_itself() -> None:
    assert DeadLetterFilter.of(7) == DeadLetterFilter(ids=("7",))
    assert DeadLetterFilter.of("e-1").sequences is None
    assert DeadLetterFilter.of({"ids": [9, "7"]}).sequences == (7, 9)
    assert DeadLetterFilter.of({"reason": "odd"}) == DeadLetterFilter(reason="odd")
    assert DeadLetterFilter.of(EVERY_LETTER) is EVERY_LETTER
    with pytest.raises(TypeError):
        DeadLetterFilter.of({"colour": "blue"})


def test_counts_add_up_most_frequent_first() -> None:
    first = counted([letter(), letter(BODY, {**CONTEXT, "handler": "b"})], DeadLetterCounts())
    both = counted([letter(BODY, {**CONTEXT, "handler": "b"})], first)
    assert both.total == 3
    assert list(both.by_handler.items()) == [("b", 2), ("shop.pay", 1)]
    assert (both.oldest, both.newest) == (60, 60)
    assert json.loads(json.dumps(both.as_dict()))["by_error"] == {"ValueError": 3}


@given(
    st.binary(max_size=40),
    st.dictionaries(
        st.sampled_from(
            ["x-dlq-context", "x-dlq-reason", "x-deliveries", "x-redrives", "x-dlq-encoding"]
        ),
        st.text(max_size=40) | st.from_regex(r'\{"[a-z_]{1,9}": [0-9]{1,30}\}', fullmatch=True),
    ),
)
def test_whatever_somebody_wrote_is_read_and_written_as_json(
    body: bytes, headers: dict[str, str]
) -> None:
    found = read_letter(1, "desk.sync.dlq", headers, body, NOW, NOW)
    assert EVERY_LETTER.admits(found)
    assert json.loads(json.dumps(found.as_record()))["sequence"] == 1
    repr(found)


@pytest.mark.parametrize("name", [*CONTEXT, "redrives", "sequence", "published_at", "deliveries"])
@pytest.mark.parametrize(
    "value",
    [
        *(None, 7, 1.5, True, [], {}, "x", "", {"stream": "x"}, "\ud800"),
        *("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"),
    ],
)
def test_a_context_may_hold_anything(name: str, value: Any) -> None:
    found = letter(BODY, {**CONTEXT, name: value})
    assert found.event_id == "e-1"
    assert isinstance(found.original_subject, str)
    assert found.original_sequence is None or isinstance(found.original_sequence, int)
    DeadLetterFilter(error="x", handler="y").admits(found)
    assert json.dumps(found.as_record(), ensure_ascii=False).encode()


def test_a_body_that_swells_is_not_unpacked() -> None:
    bomb = gzip.compress(b"0" * (64 * 1024 * 1024 + 1))
    assert "cannot be unpacked" in letter(bomb, x_dlq_encoding="gzip").problems[0]
    assert letter(gzip.compress(BODY), x_dlq_encoding="gzip").body == BODY
    assert letter(gzip.compress(BODY)[:-3], x_dlq_encoding="gzip").problems


def sent(found: StoredDeadLetter, **options: Any) -> Any:
    return message_of(found, "orders", "desk", "ada", now=NOW, **options)


def test_the_id_follows_from_the_letter_and_what_is_sent() -> None:
    ids = [
        sent(one, edited=edited).headers["Nats-Msg-Id"]
        for one, edited in [
            (letter(), False),
            (letter(), False),
            (letter(sequence=8), False),
            (letter(x_redrives="1"), False),
            (letter(), True),
            (letter(BODY + b" "), True),
        ]
    ]
    assert ids[0] == ids[1] == "redrive-orders-7-1"
    assert ids[3] == "redrive-orders-7-2"
    assert len(set(ids)) == 5


def test_of_the_headers_the_users_are_left() -> None:
    found = letter(trail="x", traceparent="00-1", nats_ttl="5", X_DLQ_Mine="y", x_redrives="4")
    assert sent(found).headers == {
        "trail": "x",
        "traceparent": "00-1",
        "x-redrives": "5",
        "x-redriven-at": "2026-01-02T03:04:05Z",
        "x-redriven-by": "ada",
        "Nats-Msg-Id": "redrive-orders-7-5",
    }
    assert sent(found, to_gem=True).headers["nats-msg-id"] == "e-1"


@pytest.mark.parametrize(
    "subject",
    ["$JS.API.STREAM.DELETE.x", "desk.sync.dlq", "hub.sync.other", "a.b.sync.desk", "*.sync.desk"],
)
def test_only_subjects_of_the_app_are_sent_to(subject: str) -> None:
    found = letter(BODY, {**CONTEXT, "original_subject": subject})
    with pytest.raises(SubjectError, match="--subject"):
        sent(found)
    assert sent(found, subject="a.b").subject == "a.b"


def test_what_cannot_be_sent_says_why() -> None:
    with pytest.raises(EventError, match="cannot be unpacked"):
        sent(letter(x_dlq_encoding="zstd"))
    with pytest.raises(SubjectError, match="not known"):
        sent(letter(b"{}", "{}"))


def test_ages_count_from_when_it_was_given_up() -> None:
    late = NOW + timedelta(hours=1)
    noted = read_letter(1, "s", {"x-dlq-context": json.dumps(CONTEXT)}, BODY, NOW, late)
    assert noted.age == 3660
    assert read_letter(1, "s", {}, BODY, NOW, late).age == 3600
