"""What a dead letter is made of."""

from __future__ import annotations

import gzip
import json
import random
from datetime import datetime, timezone
from typing import Any

import pytest

from celery_jetstream import deadletter
from celery_jetstream.deadletter import Original
from celery_jetstream.delivery import Delivery
from celery_jetstream.headers import wire_size
from celery_jetstream.settlement import DeadLetter

REPLY = "$JS.ACK.orders.desk-workers.3.42.99.1700000000000000000.0"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
BODY = json.dumps({"event_id": "e-1", "event_type": "order.created", "payload": {}}).encode()
END = DeadLetter("unrecoverable_error", "ValueError", "seven is no colour", "desk.order")
MIB = 1024**2


def build(
    body: bytes = BODY,
    headers: dict[str, str] | None = None,
    end: DeadLetter = END,
    limit: int = MIB,
) -> Any:
    original = Original("hub.sync.desk", body, headers or {})
    return deadletter.build(original, Delivery.from_reply(REPLY), end, limit, NOW)


def test_body_and_headers() -> None:
    body, headers = build(headers={"Nats-Msg-Id": "e-1", "nats-ttl": "5", "trail": "x"})
    assert body == BODY
    assert json.loads(headers.pop("x-dlq-context")) == {
        "event_id": "e-1",
        "error_class": "ValueError",
        "error_message": "seven is no colour",
        "handler": "desk.order",
        "original_subject": "hub.sync.desk",
        "stream": "orders",
        "stream_sequence": 42,
        "consumer": "desk-workers",
        "consumer_sequence": 99,
        "deliveries": 3,
        "redrives": 0,
        "timestamp": "2026-01-02T03:04:05+00:00",
    }
    assert headers == {
        "trail": "x",
        "x-dead-letter": "true",
        "x-dlq-reason": "unrecoverable_error",
        "x-deliveries": "3",
        "Nats-Msg-Id": "dlq-orders-42",
    }


@pytest.mark.parametrize("body", [b"not json", b"[1]", b"\xff", b"7", b"{}"])
def test_event_id_of_what_is_no_envelope_is_the_header(body: bytes) -> None:
    _, headers = build(body, {"nats-msg-id": "from-ruby"})
    assert json.loads(headers["x-dlq-context"])["event_id"] == "from-ruby"


def test_error_text_cannot_break_the_headers() -> None:
    _, headers = build(end=DeadLetter("rejected", "E", "a\r\nNats-Evil: 1\x00é\u2028"))
    assert all(value.isascii() and value.isprintable() for value in headers.values())
    assert json.loads(headers["x-dlq-context"])["error_message"] == "a\r\nNats-Evil: 1\x00é\u2028"


def test_long_error_text_is_cut() -> None:
    _, headers = build(end=DeadLetter("rejected", "E", "é" * 100_000))
    assert len(headers["x-dlq-context"]) <= deadletter.CONTEXT_LIMIT


def test_every_event_of_ours_fits_with_the_longest_context() -> None:
    """4 KiB are kept free for this: the event may be as large as ``payload_limit``."""
    body = b"x" * (MIB - 4096 - 200)
    end = DeadLetter("max_deliveries_exceeded", "E" * 5000, "é" * 100_000)
    built = build(body, {"trail": "y" * 100}, end)
    assert built is not None
    assert built[0] == body
    assert wire_size(*built) <= MIB


def test_too_big_loses_user_headers_first() -> None:
    body, headers = build(headers={"trail": "y" * 5000}, limit=2000)
    assert body == BODY
    assert "trail" not in headers
    assert json.loads(headers["x-dlq-context"])["error_message"] == "seven is no colour"


def test_then_the_error_text() -> None:
    end = DeadLetter("rejected", "E", "z" * 1000)
    _, headers = build(end=end, limit=800)
    assert json.loads(headers["x-dlq-context"])["error_message"] == ""


def test_then_it_is_packed() -> None:
    large = b"a" * 50_000
    body, headers = build(large, limit=2000)
    assert headers["x-dlq-encoding"] == "gzip"
    assert gzip.decompress(body) == large


def test_then_there_is_none() -> None:
    noise = random.Random(1).randbytes(50_000)
    assert build(noise, limit=2000) is None
