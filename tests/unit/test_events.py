"""Events: build → encode → decode, tolerant reading, and every bad input refused by name."""

from __future__ import annotations

import copy
import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils import json as kombu_json

from celery_jetstream import envelopes, jsontext
from celery_jetstream.delivery import Delivery
from celery_jetstream.events import Event, build, decode, encode
from celery_jetstream.exceptions import DecodeError, EncodeError, EventError
from celery_jetstream.headers import Headers, validate_headers, wire_size

NAIVE = datetime(2026, 1, 2, 3, 4, 5)  # noqa: DTZ001
MOMENT = NAIVE.replace(tzinfo=timezone.utc)
AN_ID = UUID("12345678-1234-5678-1234-567812345678")

# As the Ruby gem 7.1.4 wrote it (seen on the wire).
GEM_BODY = (
    '{"event_id":"fixed-1","schema_version":1,"event_type":"user.created","producer":"rb_a",'
    '"resource_id":"1","occurred_at":"2026-11-23T07:01:05Z","trace_id":"tr-1",'
    '"resource_type":"user","payload":{"id":1,"price":"1.5","nilv":null,"u":"é€"}}'
).encode()

SHORT_REPLY = "$JS.ACK.orders.worker-workers.3.42.57.1767322985123456789.7"
DOMAIN_REPLY = "$JS.ACK.hub.AbCdEf.orders.worker-workers.3.42.57.1767322985123456789.7"


def envelope(**changes: Any) -> dict[str, Any]:
    return {"event_type": "user.created", "payload": {"id": 1}} | changes


def built(payload: Any = None, **changes: Any) -> Event:
    given = {"event_type": "user.created", "payload": payload or {"id": 1}, "producer": "api"}
    return build(**(given | changes))


# -- round trip ------------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
JSON = st.recursive(
    SCALARS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
EVENT_TYPES = st.lists(st.text("abé-_9", min_size=1), min_size=1, max_size=4).map(".".join)
TIMES = st.datetimes(
    datetime(1, 1, 3), datetime(9999, 12, 29), timezones=st.sampled_from(  # noqa: DTZ001
        [timezone.utc, timezone(timedelta(hours=-9, minutes=-30)), timezone(timedelta(hours=14))]
    )
)  # fmt: skip


@given(EVENT_TYPES, JSON.filter(lambda value: value is not None), TIMES)
def test_what_is_built_is_read_back(event_type: str, payload: Any, moment: datetime) -> None:
    event = build(event_type=event_type, payload=payload, producer="api", produced_at=moment)
    read = decode(encode(event))
    assert read == event
    assert read.payload == payload
    assert read.produced_at == moment
    assert read.event_id == event.event_id
    assert read.resource_type == event_type.split(".")[0]
    assert json.loads(encode(event)) == event.envelope


@given(JSON, st.dictionaries(st.text(), JSON, max_size=3))
def test_any_envelope_that_is_read_can_be_written_again(payload: Any, more: dict[str, Any]) -> None:
    given_envelope = {**{f"x-{name}": value for name, value in more.items()}, **envelope()}
    given_envelope["payload"] = payload
    event = decode(json.dumps(given_envelope).encode())
    assert event.envelope == given_envelope
    assert decode(encode(event)) == event


@given(JSON)
def test_the_slow_walk_and_the_fast_path_agree(payload: Any) -> None:
    """A tuple around it makes the walk look at everything."""
    walked = encode(built({"items": (payload,)}, event_id="1", trace_id="t", produced_at=MOMENT))
    fast = encode(built({"items": [payload]}, event_id="1", trace_id="t", produced_at=MOMENT))
    assert walked == fast


def test_the_wire_format_is_the_contract() -> None:
    event = build(
        event_type="user.created",
        payload={"id": 1, "name": "Zoë"},
        producer="api",
        event_id=AN_ID,
        trace_id="t",
        produced_at=MOMENT,
    )
    assert encode(event).decode() == (
        '{"event_id":"12345678-1234-5678-1234-567812345678","event_type":"user.created",'
        '"resource_type":"user","resource_id":"1","payload":{"id":1,"name":"Zoë"},'
        '"produced_at":"2026-01-02T03:04:05.000000Z","producer":"api","schema_version":"1.0",'
        '"trace_id":"t","occurred_at":"2026-01-02T03:04:05.000000Z"}'
    )


# -- reading ---------------------------------------------------------------------------------


def test_an_event_of_the_gem_is_read() -> None:
    event = decode(GEM_BODY, {"nats-msg-id": "fixed-1"})
    assert (event.event_id, event.event_type, event.producer) == ("fixed-1", "user.created", "rb_a")
    assert (event.resource_type, event.resource_id) == ("user", "1")
    assert (event.schema_version, event.trace_id) == ("1", "tr-1")
    assert event.produced_at == datetime(2026, 11, 23, 7, 1, 5, tzinfo=timezone.utc)
    assert event.payload == {"id": 1, "price": "1.5", "nilv": None, "u": "é€"}
    assert event.headers["Nats-Msg-Id"] == "fixed-1"
    assert event.envelope == json.loads(GEM_BODY)


def test_the_least_envelope_gets_defaults() -> None:
    event = Event.from_envelope({"event_type": "user.created", "payload": None})
    assert (event.event_id, event.resource_type, event.resource_id) == ("", "user", "")
    assert (event.producer, event.schema_version) == ("", "1.0")
    assert event.payload is event.produced_at is event.trace_id is event.delivery is None
    assert dict(event.headers) == {}


@pytest.mark.parametrize("payload", [None, False, 0, "", "text", 1.5, [], {}, [{"a": [None]}]])
def test_a_payload_is_of_any_type(payload: Any) -> None:
    assert decode(json.dumps(envelope(payload=payload)).encode()).payload == payload


@pytest.mark.parametrize(
    ("field", "value", "read"),
    [
        ("event_id", 7, "7"),
        ("event_id", None, ""),
        ("event_id", "order/7 é", "order/7 é"),
        ("event_id", "é" * 127, "é" * 127),
        ("resource_id", 7, "7"),
        ("resource_id", 1.5, "1.5"),
        ("resource_id", None, ""),
        ("resource_type", None, "user"),
        ("schema_version", 1, "1"),
        ("schema_version", 2.5, "2.5"),
        ("schema_version", "3", "3"),
        ("trace_id", "", None),
        ("event_type", "no dots or rules: *", "no dots or rules: *"),
    ],
)
def test_tolerant_reading(field: str, value: Any, read: Any) -> None:
    assert getattr(Event.from_envelope(envelope(**{field: value})), field) == read


UTC_CASES = {
    "2026-01-02T03:04:05Z": MOMENT,
    "2026-01-02T03:04:05z": MOMENT,
    "2026-01-02 03:04:05 UTC": MOMENT,
    "2026-01-02 03:04:05 +0000": MOMENT,
    "2026-01-02T03:04:05": MOMENT,
    "2026-01-02T03:04Z": MOMENT.replace(second=0),
    "2026-01-02T05:04:05+02:00": MOMENT,
    "2026-01-02T05:04:05+02": MOMENT,
    "2026-01-01T17:34:05-0930": MOMENT,
    "2026-01-02T03:04:05.5Z": MOMENT.replace(microsecond=500_000),
    "2026-01-02T03:04:05,123Z": MOMENT.replace(microsecond=123_000),
    "2026-01-02T03:04:05.123456789+00:00": MOMENT.replace(microsecond=123_456),
}


@pytest.mark.parametrize("text", UTC_CASES)
@pytest.mark.parametrize("field", ["produced_at", "occurred_at"])
def test_times_are_read_in_every_usual_form(field: str, text: str) -> None:
    produced_at = Event.from_envelope(envelope(**{field: text})).produced_at
    assert produced_at == UTC_CASES[text]
    assert produced_at.utcoffset() is not None


@pytest.mark.parametrize(
    "text",
    ["", "yesterday", "2026-13-01T00:00:00Z", "2026-01-02T03:04:60Z", "1767322985",
     "٢026-01-02T03:04Z"],
)  # fmt: skip
def test_a_text_that_is_no_time_is_no_error(text: str) -> None:
    event = Event.from_envelope(envelope(produced_at=text))
    assert event.produced_at is None
    assert event.envelope["produced_at"] == text


def test_produced_at_comes_before_occurred_at() -> None:
    both = envelope(produced_at="2026-01-02T03:04:05Z", occurred_at="2020-01-01T00:00:00Z")
    assert Event.from_envelope(both).produced_at == MOMENT
    assert Event.from_envelope(both | {"produced_at": None}).produced_at.year == 2020


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"event_type": None}, "no 'event_type'"),
        ({"event_type": ""}, "no 'event_type'"),
        ({"event_type": 5}, r"'event_type' is int \(5\), not text"),
        ({"event_type": ["a"]}, "'event_type' is list"),
        ({"event_type": "a\nb"}, "'event_type'.*control"),
        ({"event_type": "a\x00"}, "'event_type'.*control"),
        ({"event_type": "a\ud800"}, "'event_type'.*control"),
        ({"event_id": 1.5}, "'event_id' is float"),
        ({"event_id": True}, "'event_id' is bool"),
        ({"event_id": {}}, "'event_id' is dict"),
        ({"event_id": "a\x00"}, "'event_id'.*control"),
        ({"event_id": "é" * 128}, "'event_id'.*256 bytes"),
        ({"resource_type": 1}, "'resource_type' is int"),
        ({"resource_id": []}, "'resource_id' is list"),
        ({"resource_id": True}, "'resource_id' is bool"),
        ({"producer": {}}, "'producer' is dict"),
        ({"schema_version": False}, "'schema_version' is bool"),
        ({"trace_id": 1}, "'trace_id' is int"),
        ({"produced_at": 1767322985}, "'produced_at' is int"),
        ({"occurred_at": []}, "'occurred_at' is list"),
    ],
)
def test_a_bad_envelope_is_refused_by_field_and_type(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(DecodeError, match=named) as caught:
        Event.from_envelope(envelope(**bad))
    assert caught.value.reason == "invalid_envelope"


def test_the_payload_must_be_there() -> None:
    with pytest.raises(DecodeError, match="no 'payload'") as caught:
        decode(b'{"event_type":"a"}')
    assert caught.value.reason == "invalid_envelope"


def test_a_refusal_does_not_repeat_a_long_value() -> None:
    with pytest.raises(DecodeError) as caught:
        Event.from_envelope(envelope(event_id=["x" * 1_000_000]))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("body", [b"[]", b"null", b"5", b'"text"', b"true", b"[{}]"])
def test_json_that_is_no_object(body: bytes) -> None:
    with pytest.raises(DecodeError, match="not an object") as caught:
        decode(body)
    assert caught.value.reason == "invalid_envelope"


MALFORMED = {
    "empty": b"",
    "text": b"hello",
    "cut off": GEM_BODY[:-1],
    "more than one": GEM_BODY + b"{}",
    "single quotes": b"{'event_type': 'a'}",
    "not UTF-8": b'{"event_type":"\xff","payload":1}',
    "UTF-16": '{"event_type":"a","payload":1}'.encode("utf-16"),
    "a surrogate in UTF-8": b'{"event_type":"a","payload":"\xed\xa0\x80"}',
    "NaN": b'{"event_type":"a","payload":NaN}',
    "Infinity": b'{"event_type":"a","payload":-Infinity}',
    "raw control": b'{"event_type":"a","payload":"\x00"}',
    "huge number": b'{"event_type":"a","payload":' + b"9" * 5000 + b"}",
    "bomb": b"[" * 100_000,
    "closed bomb": b'{"event_type":"a","payload":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "object bomb": b'{"a":' * 100_000,
    "too deep": b'{"event_type":"a","payload":' + b"[" * 200 + b"]" * 200 + b"}",
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_a_body_that_is_not_json(body: bytes) -> None:
    with pytest.raises(DecodeError, match="the body is") as caught:
        decode(body)
    assert caught.value.reason == "malformed_json"
    assert len(str(caught.value)) < 200


def test_many_brackets_side_by_side_are_not_deep() -> None:
    payload = [[{}]] * 1000
    assert decode(encode(built(payload))).payload == payload


def test_a_byte_order_mark_and_white_space_are_tolerated() -> None:
    assert decode(b"\xef\xbb\xbf \r\n" + GEM_BODY + b"\n") == decode(GEM_BODY)


def test_a_body_of_two_megabytes_is_read() -> None:
    body = json.dumps(envelope(payload="x" * 2**21)).encode()
    event = decode(body)
    assert len(event.payload) == 2**21
    assert len(repr(event)) < 100


# -- the event -------------------------------------------------------------------------------


def test_items_are_attributes_and_raw_keys() -> None:
    event = Event.from_envelope(envelope(resource_id=7, occurred_at="2026-01-02T03:04:05Z", mine=1))
    for name in envelopes.FIELDS:
        assert event[name] == getattr(event, name)
        assert name in event
    assert (event["resource_id"], event["produced_at"]) == ("7", MOMENT)
    assert (event["mine"], event["occurred_at"]) == (1, "2026-01-02T03:04:05Z")
    assert "mine" in event
    assert "yours" not in event
    assert (event.get("mine"), event.get("yours"), event.get("yours", 2)) == (1, None, 2)
    with pytest.raises(KeyError, match="yours"):
        event["yours"]
    with pytest.raises(KeyError):
        event["delivery"]


def test_an_event_is_immutable_and_keeps_its_own_envelope() -> None:
    given = envelope(event_id="1")
    event = Event.from_envelope(given)
    given["event_id"] = "2"
    assert event.envelope["event_id"] == "1"
    with pytest.raises(AttributeError):
        event.event_id = "2"
    with pytest.raises(TypeError):
        event["event_id"] = "2"


def test_equality_is_that_of_the_envelope() -> None:
    event = decode(GEM_BODY)
    same = decode(GEM_BODY, {"x": "y"}, Delivery.from_reply(SHORT_REPLY))
    assert event == same
    assert hash(event) == hash(same)
    assert event != Event.from_envelope(event.envelope | {"more": 1})
    assert event != event.envelope


def test_repr_shows_no_payload_and_no_header_values() -> None:
    delivery = Delivery.from_reply(SHORT_REPLY, {"Authorization": "secret"})
    event = Event.from_envelope(envelope(event_id="1", payload={"id": "secret"}), delivery=delivery)
    assert repr(event) == "<Event user.created 1 of user: at orders-42>"
    assert repr(event.headers) == "<Headers Authorization>"
    assert "secret" not in repr(delivery)
    assert "secret" not in repr(replace(delivery, headers={"Authorization": "secret"}))


def test_an_event_survives_pickle_and_copy() -> None:
    event = decode(GEM_BODY, delivery=Delivery.from_reply(SHORT_REPLY, {"X-Tenant": "acme"}))
    for again in (pickle.loads(pickle.dumps(event)), copy.deepcopy(event)):
        assert again == event
        assert again.delivery == event.delivery
        assert again.headers["x-tenant"] == "acme"
        assert again.produced_at == event.produced_at


def test_kombu_serializes_an_event_as_its_envelope() -> None:
    assert kombu_json.loads(kombu_json.dumps([decode(GEM_BODY)])) == [json.loads(GEM_BODY)]


def test_headers_are_found_in_any_case() -> None:
    headers = Headers({"traceParent": "00-1", "X": ""})
    assert headers["TRACEPARENT"] == headers.get("traceparent") == "00-1"
    assert "x" in headers
    assert headers.get("y") is None
    assert headers == {"traceParent": "00-1", "X": ""}


def test_headers_come_with_the_delivery_unless_given() -> None:
    delivery = Delivery.from_reply(SHORT_REPLY, {"a": "1"})
    assert Event.from_envelope(envelope(), delivery=delivery).headers == {"a": "1"}
    assert Event.from_envelope(envelope(), delivery=delivery, headers={}).headers == {}


# -- deliveries ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply", [SHORT_REPLY, DOMAIN_REPLY, DOMAIN_REPLY + ".random", DOMAIN_REPLY + ".random.more"]
)
def test_an_ack_subject_is_read(reply: str) -> None:
    delivery = Delivery.from_reply(reply)
    assert (delivery.stream, delivery.consumer) == ("orders", "worker-workers")
    assert (delivery.sequence, delivery.num_delivered, delivery.consumer_sequence) == (42, 3, 57)
    assert delivery.timestamp == datetime(2026, 1, 2, 3, 3, 5, 123456, tzinfo=timezone.utc)
    assert (delivery.task_id, delivery.reply) == ("orders-42", reply)


@pytest.mark.parametrize(
    "reply",
    ["", "_INBOX.x.1", "$JS.ACK", SHORT_REPLY[:-2], SHORT_REPLY + ".1", "$JS.NAK" + SHORT_REPLY[7:],
     SHORT_REPLY.replace(".42.", ".x."), SHORT_REPLY.replace(".42.", ".-42."),
     SHORT_REPLY.replace(".42.", "..4"), SHORT_REPLY.replace(".42.", ".²."), DOMAIN_REPLY[:-2]],
)  # fmt: skip
def test_what_is_no_ack_subject(reply: str) -> None:
    with pytest.raises(ValueError, match="not a JetStream ack subject"):
        Delivery.from_reply(reply)


COUNTS = st.integers(0, 2**64 - 1)


@given(st.text("aZ-_", min_size=1), COUNTS, COUNTS, st.dictionaries(st.text("aB-"), st.text()))
def test_the_task_header_brings_a_delivery_back(
    name: str, sequence: int, delivered: int, headers: dict[str, str]
) -> None:
    reply = f"$JS.ACK.{name}.{name}-workers.{delivered}.{sequence}.1.1767322985000000000.0"
    delivery = Delivery.from_reply(reply, headers)
    assert (delivery.stream, delivery.sequence, delivery.num_delivered) == (
        name,
        sequence,
        delivered,
    )
    header = json.loads(json.dumps(delivery.to_header()))
    assert set(header) == {"stream", "sequence", "num_delivered", "consumer", "reply", "headers"}
    assert Delivery.from_header(header | {"of a later release": 1}) == delivery


@pytest.mark.parametrize(
    "change", [{"stream": ...}, {"reply": ...}, {"sequence": "x"}, {"num_delivered": None},
               {"headers": 5}, {"headers": {5: ""}}]
)  # fmt: skip
def test_a_task_header_that_is_none(change: dict[str, Any]) -> None:
    header = Delivery.from_reply(SHORT_REPLY).to_header() | change
    with pytest.raises(ValueError, match="not a jetstream header"):
        Delivery.from_header({key: value for key, value in header.items() if value is not ...})


def test_deliveries_are_values() -> None:
    delivery = Delivery.from_reply(SHORT_REPLY, {"a": "1"})
    assert delivery == Delivery.from_reply(SHORT_REPLY, {"a": "1"})
    assert delivery != replace(delivery, num_delivered=4)
    assert len({delivery, Delivery.from_reply(SHORT_REPLY, {"a": "1"})}) == 1


# -- building --------------------------------------------------------------------------------


def test_defaults_of_a_built_event() -> None:
    before = datetime.now(timezone.utc)
    event = built({"name": "Ada"})
    assert UUID(event.event_id).version == 4
    assert len(bytes.fromhex(event.trace_id)) == 16
    assert (event.resource_type, event.resource_id) == ("user", "")
    assert before <= event.produced_at <= datetime.now(timezone.utc)
    assert event.envelope["produced_at"] == event.envelope["occurred_at"]
    assert list(event.envelope) == [*envelopes.FIELDS, "occurred_at"]
    assert event.event_id != built().event_id


class Color(str, Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class ObjectId:
    """An id as document databases have it: a type of its own, with a text."""

    def __str__(self) -> str:
        return "65a1f0"


@pytest.mark.parametrize(
    ("given", "text"),
    [("x", "x"), (0, "0"), ("", ""), (1.5, "1.5"), (True, "true"), (False, "false"),
     (AN_ID, str(AN_ID)), (Decimal("1.50"), "1.50"), (Color.RED, "red"), (Level.HIGH, "3"),
     (ObjectId(), "65a1f0"), ((1, 2), "(1, 2)"), ("a\nb\x00", "a\nb\x00")],
)  # fmt: skip
def test_resource_ids_of_any_type(given: object, text: str) -> None:
    event = decode(encode(built(resource_id=given)))
    assert event.resource_id == text


@pytest.mark.parametrize(
    ("payload", "text"),
    [({"id": 0, "resource_id": 5}, "0"), ({"id": AN_ID}, str(AN_ID)),
     ({"id": None, "resource_id": "r"}, "r"),
     ({"resource_id": 5}, "5"), ({"id": {"a": 1}}, "{'a': 1}"), ({"x": 1}, ""), ([{"id": 1}], ""),
     ("id", "")],
)  # fmt: skip
def test_the_resource_id_is_taken_from_the_payload(payload: Any, text: str) -> None:
    assert built(payload).resource_id == text
    assert built(payload, resource_id="given").resource_id == "given"


@pytest.mark.parametrize("event_id", ["1", "order/7 paid", "é" * 127, "a:b", AN_ID, "x" * 255])
def test_event_ids_need_not_be_uuids(event_id: object) -> None:
    assert decode(encode(built(event_id=event_id))).event_id == str(event_id)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"event_id": ""}, "event_id '' is empty"),
        ({"event_id": "a\r\nNats-Rollup: all"}, "event_id .* control"),
        ({"event_id": "a\x00"}, "event_id .* control"),
        ({"event_id": "a\ud800"}, "event_id .* control"),
        ({"event_id": " a"}, "event_id .* whitespace"),
        ({"event_id": "é" * 128}, "event_id .* 256 bytes"),
        ({"event_id": 5}, "event_id is int"),
        ({"event_type": ""}, "event_type '' is not legal.*empty"),
        ({"event_type": "user.*"}, "event_type .*wildcards"),
        ({"event_type": "user.>"}, "event_type .*wildcards"),
        ({"event_type": "user created"}, "event_type .*whitespace"),
        ({"event_type": "user..created"}, "event_type .*empty"),
        ({"event_type": "a" * 256}, "event_type .*255"),
        ({"event_type": None}, "event_type None"),
        ({"resource_type": 5}, "resource_type is int"),
        ({"resource_id": b"1"}, "resource_id is bytes"),
        ({"producer": None}, "producer is null"),
        ({"schema_version": 1}, "schema_version is int"),
        ({"trace_id": 5}, "trace_id is int"),
        ({"produced_at": NAIVE}, "produced_at .* no offset"),
        ({"produced_at": "2026-01-02T03:04:05"}, "produced_at .* no offset"),
        ({"produced_at": "soon"}, "produced_at 'soon' is neither"),
        ({"produced_at": 5}, "produced_at 5 is neither"),
        ({"produced_at": date(2026, 1, 2)}, "produced_at .* neither"),
        ({"produced_at": "0001-01-01T00:00:00+14:00"}, "produced_at .* outside"),
    ],
)
def test_bad_arguments_are_refused_by_name(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(EventError, match=rf"(?s)^{named}"):
        built(**bad)


def test_a_payload_of_none_is_refused() -> None:
    with pytest.raises(EventError, match="payload is None"):
        build(event_type="a", payload=None, producer="api")


def test_times_are_written_in_utc() -> None:
    east = MOMENT.astimezone(timezone(timedelta(hours=5, minutes=30)))
    for moment in (east, "2026-01-02T05:04:05+02:00", MOMENT):
        assert built(produced_at=moment).envelope["produced_at"] == "2026-01-02T03:04:05.000000Z"


# -- encoding --------------------------------------------------------------------------------


@dataclass
class Line:
    sku: str
    price: Decimal


class Model:
    """What pydantic's BaseModel looks like from outside."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        assert mode == "json"
        return {"id": 9, "at": "2026-01-02"}


USUAL_VALUES = [
    (MOMENT, "2026-01-02T03:04:05Z"),
    (MOMENT.replace(microsecond=5), "2026-01-02T03:04:05.000005Z"),
    (MOMENT.astimezone(timezone(timedelta(hours=2))), "2026-01-02T05:04:05+02:00"),
    (NAIVE, "2026-01-02T03:04:05"),
    (date(2026, 1, 2), "2026-01-02"),
    (time(3, 4), "03:04:00"),
    (Decimal("1.50"), "1.50"),
    (AN_ID, str(AN_ID)),
    (Color.RED, "red"),
    (Level.HIGH, 3),
    ((1, (2,)), [1, [2]]),
    (Line("a", Decimal(1)), {"sku": "a", "price": "1"}),
    (Model(), {"id": 9, "at": "2026-01-02"}),
    (OrderedDict(a=1), {"a": 1}),
    (MappingProxyType({"a": Color.RED}), {"a": "red"}),
    ({1: "a", "2": "b", Color.RED: "c"}, {"1": "a", "2": "b", "red": "c"}),
    ({Level.HIGH: "d"}, {"3": "d"}),
    ("nul \x00 in text", "nul \x00 in text"),
    ({"\x00": 1}, {"\x00": 1}),
    (2**64, 2**64),
    ("\u2028 😀 </script>", "\u2028 😀 </script>"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "read"), USUAL_VALUES)
def test_usual_values_are_encoded_as_the_field_expects(value: object, read: object) -> None:
    event = built({"list": [value], "deep": {"deeper": value}})
    assert event.payload == {"list": [read], "deep": {"deeper": read}}
    assert decode(encode(event)).payload == event.payload
    assert decode(encode(Event.from_envelope(envelope(payload=value)))).payload == read


def test_a_model_as_payload_gives_the_resource_id() -> None:
    assert built(Model()).resource_id == "9"
    assert built(Model()).payload == {"id": 9, "at": "2026-01-02"}


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), float("-inf"), Decimal("NaN"), b"bytes", bytearray(b"x"), {1, 2},
     frozenset(), object(), lambda: 1, Line, Color, 1j, range(3), timedelta(1), 10**5000,
     "lone \ud800 surrogate"],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_the_rest_is_refused_with_the_path(value: object) -> None:
    payload = {"id": 1, "items": [0, {"price": 1}, {"unit price": [value]}]}
    with pytest.raises(EncodeError) as caught:
        encode(built(payload))
    assert caught.value.path == "payload.items[2]['unit price'][0]"
    assert str(caught.value).startswith(caught.value.path)
    assert len(str(caught.value)) < 200
    with pytest.raises(EncodeError, match=r"^payload\.a "):
        encode(Event.from_envelope(envelope(payload={"a": value})))


@pytest.mark.parametrize("key", [1.5, None, True, (1, 2), b"a", MOMENT, "\ud800"])
def test_keys_are_text_or_integers(key: object) -> None:
    with pytest.raises(EncodeError, match=r"^payload\.items\[0\]"):
        encode(built({"items": [{key: 1}]}))


def test_keys_must_stay_apart() -> None:
    with pytest.raises(EncodeError, match=r"^payload\.a .*read alike"):
        encode(built({"a": {1: "x", "1": "y"}}))


def test_fields_of_the_envelope_lead_to_their_name() -> None:
    with pytest.raises(EncodeError) as caught:
        encode(built(producer="\ud800"))
    assert caught.value.path == "producer"


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def test_depth_is_limited_alike_on_both_ways() -> None:
    deepest = built(nested(jsontext.MAX_DEPTH - 1))
    assert decode(encode(deepest)) == deepest
    for payload in (nested(jsontext.MAX_DEPTH), nested(100_000)):
        with pytest.raises(EncodeError, match=r"nested deeper than 200 levels"):
            encode(built(payload))


def test_cycles_are_refused() -> None:
    ring: list[Any] = []
    ring += [ring, ring]
    circle: dict[str, Any] = {"a": (1,)}
    circle["again"] = circle
    for payload in (ring, circle, {"x": [circle]}):
        with pytest.raises(EncodeError, match="contains itself"):
            encode(built(payload))


def test_a_value_met_often_is_no_cycle() -> None:
    shared = {"a": [1]}
    assert decode(encode(built([shared, shared, [shared]]))).payload == [shared, shared, [shared]]


# -- headers ---------------------------------------------------------------------------------


def test_headers_become_text() -> None:
    given = {
        "X-Tenant": "acme",
        "retries": 3,
        "ratio": 0.5,
        "vip": True,
        "traceparent": "00-é",
        "e": "",
    }
    assert validate_headers(given) == {
        "X-Tenant": "acme", "retries": "3", "ratio": "0.5", "vip": "true", "traceparent": "00-é",
        "e": "",
    }  # fmt: skip
    assert validate_headers(None) == {}


@pytest.mark.parametrize(
    "name",
    ["", "a b", "a:", ":", "é", "a\r\nb", "a\x00", "a\t", " a", 5, None, "Nats-Msg-Id", "nats-ttl",
     "NATS-Expected-Stream", "Nats-", "\ud800"],
)  # fmt: skip
def test_bad_header_names(name: str) -> None:
    with pytest.raises(EventError, match=r"^header "):
        validate_headers({"ok": "1", name: "v"})


@pytest.mark.parametrize(
    "value",
    ["secret\r\nNats-Rollup: all", "secret\n", "secret\r", "secret\x00", "secret\t", " secret",
     "secret ", "secret\x85", "secret\ud800", b"secret", None, ["secret"], {"a": "secret"}],
)  # fmt: skip
def test_bad_header_values_are_refused_but_not_shown(value: object) -> None:
    with pytest.raises(EventError, match=r"^header 'Authorization' ") as caught:
        validate_headers({"Authorization": value})
    assert "secret" not in str(caught.value)


@given(st.dictionaries(st.text("aB-", min_size=1), st.text("xé€ "), max_size=3), st.binary())
def test_wire_size_is_the_length_of_what_is_sent(headers: Mapping[str, str], body: bytes) -> None:
    block = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    sent = f"NATS/1.0\r\n{block}\r\n".encode() + body if headers else body
    assert wire_size(body, headers) == len(sent)


def test_without_headers_there_is_no_block() -> None:
    assert wire_size(b"12345", None) == wire_size(b"12345", {}) == 5
    assert wire_size(b"", {"a": "é"}) == len("NATS/1.0\r\na: é\r\n\r\n".encode())
