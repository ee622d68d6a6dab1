"""Typed payloads and upcasts: what is read, what is refused, and where."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import pickle
from collections.abc import Iterator
from datetime import date, datetime, time, timezone
from decimal import Decimal
from typing import Any, Literal, NewType, TypedDict
from uuid import UUID

import msgspec
import pydantic
import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st

from celery_jetstream import Event, JetStream, jetstream_handler, upcast, upcasts
from celery_jetstream.exceptions import ConfigurationError, PayloadError, SubjectError
from celery_jetstream.payloads import payload_type
from celery_jetstream.settlement import DeadLetter, Policy, decide

ID = "6f9619ff-8b86-d011-b42d-00cf4fc964ff"


class Colour(enum.Enum):
    RED = "red"
    ONE = 1


UserId = NewType("UserId", int)


@dataclasses.dataclass
class Address:
    zip: str
    lines: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class User:
    id: UserId
    name: str | None
    address: Address
    score: float = 0.0
    others: dict[str, Address] = dataclasses.field(default_factory=dict)
    parent: User | None = None


@dataclasses.dataclass
class Everything:
    moment: datetime
    day: date
    hour: time
    amount: Decimal
    key: UUID
    colour: Colour
    kind: Literal["a", 1]
    pair: tuple[int, str]
    many: tuple[int, ...]
    some: set[int]
    anything: Any
    flag: bool
    nothing: None
    plain: dict


class Typed(TypedDict, total=False):
    id: int
    tags: list[str]


class Model(pydantic.BaseModel):
    id: int
    address: Address


class Struct(msgspec.Struct):
    id: int
    tags: list[str] = []


def errors(kind: Any, value: Any) -> dict[str, str]:
    with pytest.raises(PayloadError) as caught:
        payload_type(kind).read(value)
    return dict(caught.value.errors)


def test_a_dataclass_is_read_with_what_is_in_it() -> None:
    read = payload_type(User).read
    user = read(
        {
            "id": 1,
            "name": None,
            "address": {"zip": "1", "lines": ["a"], "unknown": 1},
            "score": 2,
            "others": {"x": {"zip": "2"}},
            "parent": {"id": 2, "name": "b", "address": {"zip": "3"}},
        }
    )
    parent = User(UserId(2), "b", Address("3"))
    assert user == User(UserId(1), None, Address("1", ["a"]), 2.0, {"x": Address("2")}, parent)
    assert type(user.score) is float


def test_every_type_that_json_has_not() -> None:
    value = {
        "moment": "2026-01-31T12:00:00Z",
        "day": "2026-01-31",
        "hour": "12:00:00",
        "amount": "1.10",
        "key": ID,
        "colour": "red",
        "kind": 1,
        "pair": [1, "x"],
        "many": [1, 2],
        "some": [1, 1],
        "anything": {"a": [None]},
        "flag": True,
        "nothing": None,
        "plain": {"a": 1},
    }
    assert payload_type(Everything).read(value) == Everything(
        moment=datetime(2026, 1, 31, 12, tzinfo=timezone.utc),
        day=date(2026, 1, 31),
        hour=time(12),
        amount=Decimal("1.10"),
        key=UUID(ID),
        colour=Colour.RED,
        kind=1,
        pair=(1, "x"),
        many=(1, 2),
        some={1},
        anything={"a": [None]},
        flag=True,
        nothing=None,
        plain={"a": 1},
    )
    faults = errors(Everything, dict.fromkeys(value, "odd"))
    assert faults.keys() == {f"payload.{name}" for name in value} - {"payload.anything"}
    assert faults["payload.colour"] == "must be one of 'red', 1, and is str"
    assert errors(Everything, {**value, "pair": [1]})["payload.pair"].startswith(
        "must be a list of 2"
    )
    assert errors(Everything, {**value, "some": [{}]}).keys() == {"payload.some[0]"}


def test_each_fault_has_its_path() -> None:
    faults = errors(
        User,
        {
            "id": "7",
            "address": {"zip": 5, "lines": ["a", None]},
            "score": True,
            "others": {"x": []},
            "parent": 1,
        },
    )
    assert faults == {
        "payload.id": "must be a whole number, and is str",
        "payload.name": "is missing",
        "payload.address.zip": "must be text, and is int",
        "payload.address.lines[1]": "must be text, and is null",
        "payload.score": "must be a number, and is bool",
        "payload.others.x": "must be an object, and is list",
        "payload.parent": "must be User or null, and is int",
    }


@pytest.mark.parametrize("value", [None, 1, "x", [], True])
def test_what_is_no_object_is_refused(value: Any) -> None:
    for kind in (User, Typed):
        assert list(errors(kind, value)) == ["payload"]
    for kind in (Model, Struct):
        assert len(errors(kind, value)) == 1


def test_a_typed_dict_keeps_what_it_does_not_know() -> None:
    assert payload_type(Typed).read({"id": 1, "more": 2}) == {"id": 1, "more": 2}
    assert payload_type(Typed).read({}) == {}
    assert errors(Typed, {"id": 1.5, "tags": "a"}).keys() == {"payload.id", "payload.tags"}


def test_a_refusal_of_the_class_itself_is_a_fault() -> None:
    @dataclasses.dataclass
    class Positive:
        n: int

        def __post_init__(self) -> None:
            if self.n < 1:
                raise ValueError("n must be positive")

    assert payload_type(Positive).read({"n": 1}).n == 1
    assert errors(Positive, {"n": 0}) == {"payload": "is refused: n must be positive"}


def test_libraries_read_their_own_classes() -> None:
    model = payload_type(Model).read({"id": 1, "address": {"zip": "1"}})
    assert (type(model), model.address.zip) == (Model, "1")
    assert errors(Model, {"id": "x", "address": {"zip": "1"}}).keys() == {"payload.id"}
    assert payload_type(Struct).read({"id": 1}) == Struct(1)
    assert errors(Struct, {"id": 1, "tags": [1]}) == {
        "payload.tags[0]": "Expected `str`, got `int`"
    }
    assert payload_type(Model).schema()["required"] == ["id", "address"]
    assert "Struct" in payload_type(Struct).schema()["$defs"]


def test_a_schema_says_what_is_read() -> None:
    schema = payload_type(User).schema()
    assert schema["required"] == ["id", "name", "address"]
    assert schema["properties"]["name"] == {"anyOf": [{"type": "string"}, {"type": "null"}]}
    assert schema["properties"]["parent"] == {"anyOf": [{}, {"type": "null"}]}
    assert schema["properties"]["others"]["additionalProperties"]["title"] == "Address"
    assert payload_type(Everything).schema()["properties"]["pair"]["prefixItems"]
    assert payload_type(Typed).schema()["required"] == []
    assert json.dumps(payload_type(Everything).schema())


@pytest.mark.parametrize("kind", [int, dict, "User", None, User(UserId(1), "", Address(""))])
def test_other_kinds_are_refused_where_they_are_given(kind: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"payload=.* is none of"):
        jetstream_handler("a", payload=kind)


def test_a_field_that_cannot_be_read_is_said_at_start() -> None:
    @dataclasses.dataclass
    class Odd:
        raw: bytes

    with pytest.raises(ConfigurationError, match="cannot be read as bytes"):
        payload_type(Odd).schema()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(JSON)
def test_whatever_comes_is_read_or_refused(value: Any) -> None:
    for kind in (User, Typed, Model, Struct):
        with contextlib.suppress(PayloadError):
            payload_type(kind).read(value)


def test_a_payload_error_is_capped_and_survives_a_pipe() -> None:
    error = PayloadError([(f"payload.f{n}", "x" * 500) for n in range(50)])
    assert str(error).endswith("and 40 more")
    assert pickle.loads(pickle.dumps(error)).errors == error.errors


def test_what_does_not_fit_is_a_dead_letter_at_once() -> None:
    end = decide(PayloadError([("payload.id", "is missing")]), Policy(limit=None), 1)
    assert end == DeadLetter("invalid_payload", "PayloadError", "payload.id: is missing")


# ── upcasts ──────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def _no_upcasters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {pattern: dict(steps) for pattern, steps in upcasts._upcasters.items()}
    upcasts._upcasters.clear()
    yield
    upcasts._upcasters.clear()
    upcasts._upcasters.update(before)


def event(version: Any = "1.0", event_type: str = "user.created", **payload: Any) -> Event:
    envelope = {"event_id": "e", "event_type": event_type, "payload": payload}
    return Event.from_envelope({**envelope, "schema_version": version})


def test_versions_are_led_up_step_by_step() -> None:
    @upcast("user.created", from_version="1.0")
    def first(payload: dict[str, Any]) -> dict[str, Any]:
        payload["name"] = f"{payload.pop('first')} {payload.pop('last')}"
        return payload

    @upcast("user.created", from_version=2, to_version="2.1")
    def second(payload: dict[str, Any]) -> dict[str, Any]:
        return {**payload, "active": True}

    for version in ("1.0", 1, "1"):
        came = event(version, first="A", last="B")
        found = upcasts.upcasted(came)
        assert found.payload == {"name": "A B", "active": True}
        assert found.schema_version == "2.1"
        assert came.envelope["payload"] == {"first": "A", "last": "B"}
        assert found.envelope is came.envelope
    assert upcasts.upcasted(event("2.1")).schema_version == "2.1"
    assert upcasts.upcasted(event("odd")).schema_version == "odd"
    assert upcasts.upcasted(event(event_type="order.created")).payload == {}
    assert [step.from_version for step in upcasts.upcasters_of("user.*")] == ["1.0", "2.0"]


def test_the_most_specific_pattern_upcasts() -> None:
    @upcast("user.*", from_version="1.0")
    def general(payload: Any) -> Any:
        return {"by": "general"}

    @upcast("user.created", from_version="1.0")
    def special(payload: Any) -> Any:
        return {"by": "special"}

    assert upcasts.upcasted(event()).payload == {"by": "special"}
    assert upcasts.upcasted(event(event_type="user.gone")).payload == {"by": "general"}


def test_what_an_upcaster_raises_names_it() -> None:
    @upcast("user.created", from_version="1.0")
    def broken(payload: Any) -> Any:
        raise KeyError("first")

    with pytest.raises(PayloadError, match=r"broken from 1.0 failed: KeyError\('first'\)"):
        upcasts.upcasted(event())


def test_what_cannot_be_upcast_is_said_where_it_is_written() -> None:
    def step(payload: Any) -> Any:
        return payload

    def other(payload: Any) -> Any:
        return payload

    upcast("user.created", from_version="1.0")(step)
    upcast("user.created", from_version="1.0")(step)  # a module that is imported twice
    with pytest.raises(ConfigurationError, match="two upcasters"):
        upcast("user.created", from_version="1.0")(other)
    for versions in (("2.0", "1.0"), ("3.0", "3.0")):
        with pytest.raises(ConfigurationError, match="circle"):
            upcast("user.created", from_version=versions[0], to_version=versions[1])(other)
    with pytest.raises(ConfigurationError, match="give to_version"):
        upcast("user.created", from_version="beta")
    with pytest.raises(SubjectError):
        upcast("user..created", from_version="1.0")


def test_a_circle_over_two_patterns_ends() -> None:
    upcast("user.*", from_version="1.0", to_version="2.0")(lambda payload: payload)
    upcast("user.created", from_version="2.0", to_version="1.0")(lambda payload: payload)
    with pytest.raises(PayloadError, match="circle"):
        upcasts.upcasted(event())


# ── handlers ─────────────────────────────────────────────────────────────────


@jetstream_handler("typed.user", name="tests.typed_user", payload=User)
def typed_user(event: Event) -> Any:
    return event.payload.address.zip, event.schema_version, event.envelope["payload"]["name"]


def test_a_handler_gets_it_typed_however_it_is_called() -> None:
    @upcast("typed.user", from_version="1.0")
    def zipped(payload: dict[str, Any]) -> dict[str, Any]:
        return {**payload, "address": {"zip": payload["zip"]}}

    app = Celery("typed", broker="memory://", set_as_current=False)
    app.conf.update(jetstream_app_name="a", jetstream_destination_app="b", task_always_eager=True)
    JetStream(app)
    app.finalize()
    task = app.tasks["tests.typed_user"]
    good = {"event_type": "typed.user", "payload": {"id": 1, "name": "n", "zip": "z"}}
    for call in (task, lambda value: task.delay(value).get(), lambda v: task.apply((v,)).get()):
        assert tuple(call(good)) == ("z", "2.0", "n")
    bad = {"event_type": "typed.user", "payload": {"id": 1, "zip": 5}}
    with pytest.raises(PayloadError, match=r"payload.name: is missing; payload.address.zip"):
        task(bad)
    assert task.apply((bad,)).state == "FAILURE"
    assert app.jetstream.check().tasks
