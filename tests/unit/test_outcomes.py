"""What the server's answers, and what is raised instead of one, say of a message."""

from __future__ import annotations

import json
from typing import Any

import pytest

from celery_jetstream import outcomes, publisher, session
from celery_jetstream.exceptions import (
    ConnectionRefusedByServer,
    EventError,
    NoResponders,
    NotConnectedError,
    PublishError,
)
from celery_jetstream.outcomes import Message, PublishResult, Verdict, answered, failed, verdict_of

MESSAGE = Message("e1", "hub.sync.desk", b"{}", {"Nats-Msg-Id": "e1"})


def said(code: object, error_code: object = None) -> PublishResult:
    error = {"code": code, "err_code": error_code, "description": "so it is"}
    return answered(MESSAGE, json.dumps({"stream": "s", "seq": 0, "error": error}).encode())


def test_a_stored_message() -> None:
    result = answered(MESSAGE, b'{"stream":"orders", "seq":7}')
    assert result == PublishResult(
        True, "e1", "hub.sync.desk", stream="orders", sequence=7, verdict=Verdict.STORED
    )
    assert result.raise_for_error() is result


def test_a_message_that_the_stream_had_is_stored() -> None:
    result = answered(MESSAGE, b'{"stream":"orders", "seq":7,"duplicate": true}')
    assert (result.verdict, result.duplicate, result.success) == (Verdict.STORED, True, True)


@pytest.mark.parametrize(
    ("code", "error_code", "verdict"),
    [
        (400, 10002, Verdict.OUTAGE),
        (503, 10008, Verdict.OUTAGE),
        (500, 10009, Verdict.OUTAGE),
        (503, 10023, Verdict.OUTAGE),
        (500, 10028, Verdict.OUTAGE),
        (500, 10047, Verdict.OUTAGE),
        (400, 10054, Verdict.REFUSED),
        (404, 10059, Verdict.NO_STREAM),
        (400, 10060, Verdict.REFUSED),
        (503, 10063, Verdict.OUTAGE),
        (400, 10070, Verdict.REFUSED),
        (400, 10071, Verdict.REFUSED),
        (503, 10076, Verdict.OUTAGE),
        (503, 10077, Verdict.OUTAGE),
        (400, 10109, Verdict.REFUSED),
        (500, 10111, Verdict.REFUSED),
        (500, 10118, Verdict.OUTAGE),
        (400, 10120, Verdict.OUTAGE),
        (409, 10158, Verdict.OUTAGE),
        (429, 10167, Verdict.OUTAGE),
        (500, 10194, Verdict.OUTAGE),
        # not in the table: by the status
        (400, 19999, Verdict.REFUSED),
        (412, 10180, Verdict.REFUSED),
        (404, 19999, Verdict.NO_STREAM),
        (408, None, Verdict.OUTAGE),
        (429, None, Verdict.OUTAGE),
        (503, None, Verdict.OUTAGE),
        (500, 10051, Verdict.UNKNOWN),
        (409, 19999, Verdict.UNKNOWN),
        (None, None, Verdict.UNKNOWN),
        ("503", "10077", Verdict.UNKNOWN),
    ],
)
def test_an_error_of_the_server(code: object, error_code: object, verdict: Verdict) -> None:
    assert verdict_of(code, error_code) is verdict
    result = said(code, error_code)
    assert (result.success, result.verdict) == (False, verdict)
    assert result.error_code == (error_code if isinstance(error_code, int) else None)
    assert f"so it is (error {error_code or '?'})" == result.error


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"+ACK", b"\xff", b"[]", b"7", b"null", b"{}", b'{"ok": true}', b'{"stream":"s"}',
        b'{"stream":"s","seq":"1"}', b'{"error":"full"}', b'{"stream":"s","seq":1,"error":"x"}',
    ],
)  # fmt: skip
def test_an_answer_that_is_no_pub_ack(answer: bytes) -> None:
    result = answered(MESSAGE, answer)
    assert (result.success, result.verdict) == (False, Verdict.UNKNOWN)
    assert (result.error, result.transient) == ("the answer is no PubAck", False)


@pytest.mark.parametrize(
    ("raised", "verdict"),
    [
        (NotConnectedError("lost"), Verdict.OUTAGE),
        (ConnectionRefusedByServer("wrong password"), Verdict.OUTAGE),
        (NoResponders("nobody"), Verdict.NO_STREAM),
        (EventError("too large"), Verdict.REFUSED),
    ],
)
def test_what_was_raised(raised: Exception, verdict: Verdict) -> None:
    result = failed(MESSAGE, raised)
    assert (result.success, result.verdict, result.error_code) == (False, verdict, None)
    expected = "no stream takes the subject hub.sync.desk"
    assert str(result.error).startswith(expected if verdict is Verdict.NO_STREAM else str(raised))


@pytest.mark.parametrize("verdict", Verdict)
def test_what_is_sent_again(verdict: Verdict) -> None:
    result = failed(MESSAGE, verdict, "why")
    again = {Verdict.OUTAGE, Verdict.NO_STREAM, Verdict.BEHIND}
    assert result.transient is (verdict in again)
    with pytest.raises(
        PublishError, match=r"e1 was not published to hub\.sync\.desk: why"
    ) as caught:
        result.raise_for_error()
    assert caught.value.transient is result.transient


@pytest.mark.parametrize(
    "result",
    [
        answered(MESSAGE, b'{"stream":"orders","seq":7}'),
        said(400, 10054),
        failed(MESSAGE, Verdict.BEHIND, "why"),
        PublishResult(True, "e1", "hub.sync.desk", queued=True),
    ],
)
def test_a_result_as_plain_values(result: PublishResult) -> None:
    plain = result.as_dict()
    assert {type(value) for value in plain.values()} <= {str, int, bool, type(None)}
    assert (plain["verdict"], plain["transient"]) == (result.verdict.value, result.transient)
    assert json.loads(json.dumps(plain)) == plain


def test_a_row_of_the_outbox_is_a_success_without_a_verdict() -> None:
    result = PublishResult(True, "e1", "hub.sync.desk", queued=True)
    assert (bool(result), result.verdict, result.transient) == (True, Verdict.UNKNOWN, False)
    assert result.raise_for_error() is result


@pytest.mark.parametrize("name", ["Message", "PublishResult"])
def test_the_publisher_has_them_too(name: str) -> None:
    here: Any = getattr(outcomes, name)
    assert getattr(publisher, name) is here


def test_no_responders_can_be_imported_from_the_session() -> None:
    assert session.NoResponders is NoResponders
