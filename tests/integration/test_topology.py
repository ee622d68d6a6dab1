"""Topology against real servers, the newest and the oldest that we support."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import nats
import pytest
from nats.aio.client import Client
from nats.errors import Error, NoRespondersError

from celery_jetstream.capabilities import ATOMIC_BATCHES, Feature
from celery_jetstream.exceptions import (
    DriftError,
    NotConnectedError,
    SubjectOverlapError,
    TopologyError,
)
from celery_jetstream.plans import Difference
from celery_jetstream.specs import ConsumerSpec, StreamSpec
from celery_jetstream.subjects import consume_subject, durable_name, publish_subject
from celery_jetstream.topology import ensure, plan
from tests.conftest import Names
from tests.servers import NatsServer

T = TypeVar("T")
SECOND = 1_000_000_000
APPS = 20


class Api:
    """The injected coroutine on a plain client; ``before`` and ``doctor`` play the others."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.calls: list[str] = []
        self.before: dict[str, Callable[[], Awaitable[object]]] = {}
        self.doctor: Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]] | None = None

    async def __call__(self, operation: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self.calls.append(operation)
        if hook := self.before.pop(verb(operation), None):
            await hook()
        answer = await self.ask(operation, body)
        return await self.doctor(verb(operation), answer) if self.doctor else answer

    async def ask(self, operation: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Ask as another application would: neither counted nor doctored."""
        payload = json.dumps(body).encode() if body else b""
        try:
            message = await self.client.request(f"$JS.API.{operation}", payload, timeout=5)
        except NoRespondersError:
            return {"error": {"code": 503, "description": "no responders"}}
        except Error as error:
            raise NotConnectedError(str(error)) from error
        answer: dict[str, Any] = json.loads(message.data)
        return answer

    async def do(self, operation: str, body: Mapping[str, Any]) -> dict[str, Any]:
        answer = await self.ask(operation, body)
        assert "error" not in answer, answer
        return answer

    async def stream(self, name: str) -> dict[str, Any]:
        config: dict[str, Any] = (await self.do(f"STREAM.INFO.{name}", {}))["config"]
        return config

    async def consumer(self, spec: ConsumerSpec) -> dict[str, Any]:
        answer = await self.do(f"CONSUMER.INFO.{spec.stream}.{spec.durable}", {})
        config: dict[str, Any] = answer["config"]
        return config

    async def make_stream(self, name: str, *subjects: str, **config: Any) -> None:
        wanted = {"name": name, "subjects": subjects, "retention": "workqueue", "storage": "file"}
        wanted |= config
        await self.do(f"STREAM.CREATE.{name}", {k: v for k, v in wanted.items() if v is not None})

    async def make_consumer(self, spec: ConsumerSpec, **config: Any) -> None:
        wanted = {"durable_name": spec.durable, "ack_policy": "explicit"}
        wanted |= {"filter_subject": spec.filter_subjects[0]} | config
        await self.do(
            f"CONSUMER.DURABLE.CREATE.{spec.stream}.{wanted['durable_name']}",
            {"stream_name": spec.stream, "config": {k: v for k, v in wanted.items() if v != ""}},
        )

    @property
    def writes(self) -> list[str]:
        return [verb(call) for call in self.calls if ".CREATE." in call or ".UPDATE." in call]


def verb(operation: str) -> str:
    return ".".join(operation.split(".")[:2])


def talk(server: NatsServer, body: Callable[[Api], Awaitable[T]], **options: Any) -> T:
    """Run ``body`` with a connection to the server."""

    async def main() -> T:
        client = await nats.connect(server.url, allow_reconnect=False, **options)
        try:
            return await body(Api(client))
        finally:
            await client.close()

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def _shorter_pauses(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_pauses" not in request.fixturenames:
        monkeypatch.setattr("celery_jetstream.topology._PAUSE", 0.01)


@pytest.fixture
def real_pauses() -> None:
    """For tests in which others are at work."""


@pytest.fixture(params=["nats_server", "old_nats_server"])
def server(request: pytest.FixtureRequest) -> NatsServer:
    either: NatsServer = request.getfixturevalue(request.param)
    return either


@pytest.fixture
def stream(names: Names) -> StreamSpec:
    subjects = (
        publish_subject(names.app_name, names.destination_app),
        consume_subject(names.app_name, names.destination_app),
    )
    return StreamSpec(name=names.stream_name, subjects=subjects)


@pytest.fixture
def consumer(names: Names) -> ConsumerSpec:
    return consumer_of(names.app_name, names.destination_app, names.stream_name)


def consumer_of(app_name: str, destination_app: str, stream: str) -> ConsumerSpec:
    return ConsumerSpec(
        stream=stream,
        durable=durable_name(app_name),
        filter_subjects=(consume_subject(app_name, destination_app),),
        ack_wait=30,
        max_ack_pending=1000,
    )


def with_settings(spec: StreamSpec, **settings: Any) -> StreamSpec:
    return StreamSpec(name=spec.name, subjects=spec.subjects, **settings)


# ── made, found, completed ───────────────────────────────────────────────────


def test_makes_what_is_missing(
    server: NatsServer, stream: StreamSpec, consumer: ConsumerSpec
) -> None:
    async def body(api: Api) -> None:
        done = await ensure(api, stream, consumer)

        assert [(c.kind, c.name, c.action) for c in done.changes] == [
            ("stream", stream.name, "create"),
            ("consumer", consumer.durable, "create"),
        ]
        made = await api.stream(stream.name)
        assert made["subjects"] == list(stream.subjects)
        assert (made["retention"], made["storage"]) == ("workqueue", "file")
        assert made["discard"] == "new"
        assert made["num_replicas"] == 1
        assert made["duplicate_window"] == 120 * SECOND
        made = await api.consumer(consumer)
        assert made["filter_subject"] == consumer.filter_subjects[0]
        assert made["ack_policy"] == "explicit"
        assert (made["ack_wait"], made["max_ack_pending"]) == (30 * SECOND, 1000)
        assert made["max_deliver"] == -1
        assert "backoff" not in made
        assert "deliver_subject" not in made

    talk(server, body)


def test_sends_nothing_when_all_is_there(
    server: NatsServer, stream: StreamSpec, consumer: ConsumerSpec
) -> None:
    async def body(api: Api) -> None:
        given = with_settings(stream, num_replicas=1, duplicate_window=60.5, max_age=0)
        await ensure(api, given, consumer)
        api.calls.clear()

        again = await ensure(api, given, consumer)

        assert [verb(call) for call in api.calls] == ["STREAM.INFO", "CONSUMER.INFO"]
        assert not again.changed
        assert again.lines() == [
            f"= stream {stream.name}: as wanted",
            f"= consumer {consumer.durable}: as wanted",
        ]

    talk(server, body)


def test_a_consumer_can_be_left_out(nats_server: NatsServer, stream: StreamSpec) -> None:
    async def body(api: Api) -> None:
        await ensure(api, stream)
        assert not [call for call in api.calls if call.startswith("CONSUMER.")]

    talk(nats_server, body)


def test_a_plan_changes_nothing(
    server: NatsServer, stream: StreamSpec, consumer: ConsumerSpec
) -> None:
    async def body(api: Api) -> None:
        empty = await plan(api, stream, consumer)
        assert str(empty).startswith(f"+ stream {stream.name}: create\n")
        assert f"  + subjects: {stream.subjects[0]}" in empty.lines()
        assert f"  + subjects: {stream.subjects[1]}" in empty.lines()
        assert "  + ack_wait: 30 s" in empty.lines()
        assert empty.summary(dry_run=True) == "2 to be made or changed"
        assert (await api.ask(f"STREAM.INFO.{stream.name}", {}))["error"]["err_code"] == 10059

        await api.make_stream(stream.name, *stream.subjects)
        await api.make_consumer(consumer, ack_wait=5 * SECOND, max_deliver=5, max_ack_pending=1000)
        before = await api.stream(stream.name), await api.consumer(consumer)
        planned = await plan(api, with_settings(stream, max_age=3600), consumer)

        assert planned.lines() == [
            f"~ stream {stream.name}: update",
            "  ~ max_age: 0 s -> 3600 s",
            f"~ consumer {consumer.durable}: update",
            "  ~ ack_wait: 5 s -> 30 s",
            "  ~ max_deliver: 5 -> -1",
        ]
        assert planned.changes[1].differences[0] == Difference("ack_wait", 5, 30)
        assert (await api.stream(stream.name), await api.consumer(consumer)) == before
        assert api.writes == []

    talk(server, body)


def test_adds_missing_subjects_and_keeps_the_others(
    server: NatsServer, stream: StreamSpec, names: Names
) -> None:
    foreign = f"{names.app_name}.other"

    async def body(api: Api) -> None:
        await api.make_stream(stream.name, foreign, stream.subjects[1])
        done = await ensure(api, stream)

        assert done.lines()[1:] == [f"  + subjects: {stream.subjects[0]}"]
        found = (await api.stream(stream.name))["subjects"]
        assert found == [foreign, stream.subjects[1], stream.subjects[0]]

    talk(server, body)


def test_a_subject_under_a_pattern_of_the_stream_is_there(
    server: NatsServer, stream: StreamSpec, names: Names
) -> None:
    async def body(api: Api) -> None:
        await api.make_stream(stream.name, f"{names.app_name}.>")
        await ensure(api, stream)  # the server would refuse the covered one: 10052
        found = (await api.stream(stream.name))["subjects"]
        assert found == [f"{names.app_name}.>", stream.subjects[1]]

    talk(server, body)


def test_settings_not_given_stay_as_found_and_given_ones_are_updated(
    server: NatsServer, stream: StreamSpec
) -> None:
    async def body(api: Api) -> None:
        await api.make_stream(
            stream.name, *stream.subjects, duplicate_window=7 * SECOND, max_age=70 * SECOND
        )
        assert not (await ensure(api, stream)).changed

        await ensure(api, with_settings(stream, duplicate_window=9, max_age=90))
        found = await api.stream(stream.name)
        assert (found["duplicate_window"], found["max_age"]) == (9 * SECOND, 90 * SECOND)

    talk(server, body)


def test_a_short_max_age_shortens_the_window_as_on_a_new_stream(
    server: NatsServer, stream: StreamSpec
) -> None:
    async def body(api: Api) -> None:
        await api.make_stream(stream.name, *stream.subjects)
        await ensure(api, with_settings(stream, max_age=10))  # alone it is refused: 10052
        found = await api.stream(stream.name)
        assert (found["duplicate_window"], found["max_age"]) == (10 * SECOND, 10 * SECOND)

    talk(server, body)


def test_the_consumer_is_brought_to_what_is_wanted(
    server: NatsServer, stream: StreamSpec, consumer: ConsumerSpec
) -> None:
    async def body(api: Api) -> None:
        await ensure(api, stream)
        await api.make_consumer(
            consumer,
            max_deliver=5,
            backoff=[1 * SECOND, 2 * SECOND],
            max_ack_pending=7,
            headers_only=True,
        )
        done = await ensure(api, stream, consumer)

        assert done.changes[1].lines()[1:] == [
            "  ~ ack_wait: 1 s -> 30 s",
            "  ~ max_ack_pending: 7 -> 1000",
            "  ~ max_deliver: 5 -> -1",
            "  ~ backoff: 1 s, 2 s -> not set",
            "  ~ headers_only: True -> not set",
        ]
        found = await api.consumer(consumer)
        assert (found["ack_wait"], found["max_ack_pending"]) == (30 * SECOND, 1000)
        assert found["max_deliver"] == -1
        assert "backoff" not in found
        assert "headers_only" not in found

    talk(server, body)


def test_a_consumer_gets_no_further_subject(
    server: NatsServer, stream: StreamSpec, consumer: ConsumerSpec
) -> None:
    """The server allows it, and then never delivers what the subject had before."""

    async def body(api: Api) -> None:
        await ensure(api, stream)
        await api.make_consumer(consumer, filter_subject=stream.subjects[0])
        with pytest.raises(DriftError) as caught:
            await ensure(api, stream, consumer)
        wanted, there = consumer.filter_subjects[0], stream.subjects[0]
        assert f"filter_subjects must be {wanted}, found {there} (it would" in str(caught.value)
        assert (await api.consumer(consumer))["filter_subject"] == there

    talk(server, body)


def test_several_filters_become_the_one(
    nats_server: NatsServer, stream: StreamSpec, consumer: ConsumerSpec
) -> None:
    async def body(api: Api) -> None:
        await ensure(api, stream)
        await api.make_consumer(consumer, filter_subject="", filter_subjects=stream.subjects)
        await ensure(api, stream, consumer)
        found = await api.consumer(consumer)
        assert found["filter_subject"] == consumer.filter_subjects[0]
        assert "filter_subjects" not in found

    talk(nats_server, body)


@pytest.mark.needs_nats(Feature("metadata and allow_msg_ttl", (2, 11, 0), ""))
def test_what_an_administrator_set_is_kept(
    nats_server: NatsServer, stream: StreamSpec, consumer: ConsumerSpec
) -> None:
    extra = {"description": "by hand", "metadata": {"owner": "ops"}}

    async def body(api: Api) -> None:
        await api.make_stream(
            stream.name, stream.subjects[1], allow_msg_ttl=True, max_bytes=1 << 30, **extra
        )
        await api.make_consumer(
            consumer, max_batch=64, inactive_threshold=3600 * SECOND, max_deliver=5, **extra
        )
        done = await ensure(api, with_settings(stream, max_age=3600), consumer)

        assert [change.action for change in done.changes] == ["update", "update"]
        found = await api.stream(stream.name)
        assert (found["description"], found["metadata"]["owner"]) == ("by hand", "ops")
        assert (found["allow_msg_ttl"], found["max_bytes"]) == (True, 1 << 30)
        found = await api.consumer(consumer)
        assert (found["description"], found["metadata"]["owner"]) == ("by hand", "ops")
        assert (found["max_batch"], found["inactive_threshold"]) == (64, 3600 * SECOND)
        assert found["max_deliver"] == -1

    talk(nats_server, body)


# ── what cannot be brought to what is wanted ─────────────────────────────────


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("other_subject", ["{subject}", "{app}.sync.*", "{app}.>"])
def test_overlap_names_both_streams_and_the_subject(
    server: NatsServer, stream: StreamSpec, names: Names, other_subject: str, exists: bool
) -> None:
    subject, other = stream.subjects[0], f"other-{names.stream_name}"

    async def body(api: Api) -> None:
        await api.make_stream(other, other_subject.format(app=names.app_name, subject=subject))
        if exists:
            await api.make_stream(stream.name, stream.subjects[1])
        with pytest.raises(SubjectOverlapError) as caught:
            await ensure(api, stream)

        error = caught.value
        assert (error.stream, error.other_stream, error.subject) == (stream.name, other, subject)
        assert all(word in str(error) for word in (repr(stream.name), repr(other), subject))
        assert api.writes == []

    talk(server, body)


def test_overlap_that_came_after_the_plan(
    server: NatsServer, stream: StreamSpec, names: Names
) -> None:
    other = f"other-{names.stream_name}"

    async def body(api: Api) -> None:
        api.before["STREAM.CREATE"] = lambda: api.make_stream(other, stream.subjects[1])
        with pytest.raises(SubjectOverlapError, match=other) as caught:
            await ensure(api, stream)
        assert caught.value.subject == stream.subjects[1]

    talk(server, body)


def test_overlap_is_found_beyond_the_first_page(
    nats_server: NatsServer, stream: StreamSpec, names: Names
) -> None:
    other = f"other-{names.stream_name}"

    pages = [[stream.name], [other], [], []]  # as a server with a limit of 1 would answer

    async def one_per_page(operation: str, answer: dict[str, Any]) -> dict[str, Any]:
        if operation == "STREAM.NAMES":
            answer |= {"total": 2, "streams": pages.pop(0)}
        return answer

    async def body(api: Api) -> None:
        api.doctor = one_per_page
        with pytest.raises(SubjectOverlapError, match=other):
            await plan(api, stream)

    talk(nats_server, body)


@pytest.mark.parametrize(
    ("field", "wanted", "found", "config"),
    [
        ("retention", "workqueue", "limits", {"retention": "limits"}),
        ("retention", "workqueue", "interest", {"retention": "interest"}),
        ("storage", "file", "memory", {"storage": "memory"}),
        ("no_ack", None, True, {"no_ack": True}),
        ("mirror", None, {"name": "m"}, {"mirror": {"name": "m"}, "subjects": None}),
    ],
)
def test_stream_drift_names_field_wanted_and_found(
    server: NatsServer, stream: StreamSpec, field: str, wanted: object, found: object, config: Any
) -> None:
    async def body(api: Api) -> None:
        await api.make_stream(stream.name, *stream.subjects, **config)
        with pytest.raises(DriftError) as caught:
            await ensure(api, stream)

        assert (field, wanted, found) in caught.value.differences
        text = str(caught.value)
        assert f"{field} must be {wanted or 'not set'}, found {found}" in text
        assert "jetstream_stream_name" in text
        assert api.writes == []
        await api.do(f"STREAM.DELETE.{stream.name}", {})  # a mirror takes another test's "m"

    talk(server, body)


def test_a_sealed_stream_is_drift(server: NatsServer, stream: StreamSpec) -> None:
    async def body(api: Api) -> None:
        await api.make_stream(stream.name, *stream.subjects)
        sealed = await api.stream(stream.name) | {"sealed": True}
        await api.do(f"STREAM.UPDATE.{stream.name}", sealed)
        with pytest.raises(DriftError, match="sealed must be not set, found True"):
            await ensure(api, stream)

    talk(server, body)


@pytest.mark.parametrize(
    ("field", "wanted", "found", "words"),
    [
        ("deliver_subject", None, "push.here", "push consumer"),
        ("replay_policy", "instant", "original", "replay_policy must be instant, found original"),
    ],
)
def test_consumer_drift_names_field_wanted_and_found(
    server: NatsServer,
    stream: StreamSpec,
    consumer: ConsumerSpec,
    field: str,
    wanted: object,
    found: object,
    words: str,
) -> None:
    async def body(api: Api) -> None:
        await ensure(api, stream)
        await api.make_consumer(consumer, **{field: found})
        before = await api.consumer(consumer)
        with pytest.raises(DriftError, match=words) as caught:
            await ensure(api, stream, consumer)

        assert caught.value.differences == ((field, wanted, found),)
        assert repr(consumer.durable) in str(caught.value)
        assert "delete the consumer" in str(caught.value)
        assert await api.consumer(consumer) == before

    talk(server, body)


@pytest.mark.parametrize("theirs", ["{filter}", ""])
def test_a_filter_that_another_consumer_has_names_that_one(
    server: NatsServer, stream: StreamSpec, consumer: ConsumerSpec, theirs: str
) -> None:
    async def body(api: Api) -> None:
        await ensure(api, stream)
        subject = theirs.format(filter=consumer.filter_subjects[0])
        await api.make_consumer(consumer, durable_name="rival", filter_subject=subject)
        with pytest.raises(TopologyError, match=r"'rival'.*jetstream_app_name") as caught:
            await ensure(api, stream, consumer)
        assert consumer.filter_subjects[0] in str(caught.value)

    talk(server, body)


def test_what_the_server_refuses_is_said_in_its_words(
    server: NatsServer, stream: StreamSpec
) -> None:
    async def body(api: Api) -> None:
        with pytest.raises(TopologyError, match=r"needs a cluster \(error 10074\)"):
            await ensure(api, with_settings(stream, num_replicas=3))
        with pytest.raises(TopologyError, match=r"duplicates window can not .* \(error 10052\)"):
            await ensure(api, with_settings(stream, duplicate_window=60, max_age=10))

    talk(server, body)


@pytest.mark.parametrize("removed", ["max_age", "ack_wait"])
def test_a_field_that_the_server_ignores_is_an_error(
    server: NatsServer, stream: StreamSpec, consumer: ConsumerSpec, removed: str
) -> None:
    async def ignore(_: str, answer: dict[str, Any]) -> dict[str, Any]:
        answer.get("config", {}).pop(removed, None)
        return answer

    async def body(api: Api) -> None:
        api.doctor = ignore
        level = (await api.do("INFO", {}))["api"].get("level")
        with pytest.raises(TopologyError, match=f"ignored {removed} of") as caught:
            await ensure(api, with_settings(stream, max_age=3600), consumer)
        expected = f"has API level {level}" if level else "older than 2.11"
        assert expected in str(caught.value)

    talk(server, body)


def test_atomic_batches_are_asked_for_and_not_insisted_on(
    server: NatsServer, stream: StreamSpec, consumer: ConsumerSpec
) -> None:
    async def body(api: Api) -> None:
        known = (await api.do("INFO", {}))["api"].get("level", 0) >= 2
        await ensure(api, stream, consumer)
        assert "allow_atomic" not in await api.stream(stream.name)
        await ensure(api, with_settings(stream, allow_atomic=True), consumer)
        assert (await api.stream(stream.name)).get("allow_atomic", False) is known
        await ensure(api, stream, consumer)  # another application, which does not ask for it
        assert (await api.stream(stream.name)).get("allow_atomic", False) is known

    talk(server, body)


@pytest.mark.needs_nats(ATOMIC_BATCHES)
def test_a_stream_that_cannot_have_atomic_batches_gets_the_rest(
    nats_server: NatsServer, stream: StreamSpec
) -> None:
    async def body(api: Api) -> None:
        await api.make_stream(stream.name, stream.subjects[0], persist_mode="async")
        await ensure(api, with_settings(stream, allow_atomic=True))
        made = await api.stream(stream.name)
        assert made["subjects"] == list(stream.subjects)
        assert "allow_atomic" not in made
        with pytest.raises(TopologyError, match="not supported on replicated"):
            await ensure(api, with_settings(stream, allow_atomic=True, num_replicas=3))

    talk(nats_server, body)


def test_no_jetstream_for_the_account(stream: StreamSpec) -> None:
    config = """
        jetstream: {}
        accounts: {
          with: { jetstream: enabled, users: [{user: with, password: secret}] }
          without: { users: [{user: without, password: secret}] }
        }
    """

    async def body(api: Api) -> None:
        with pytest.raises(TopologyError, match=r"not enabled for this account.*10039"):
            await ensure(api, stream)

    with NatsServer(config=config) as server:
        talk(server, body, user="without", password="secret")


def test_no_responders(stream: StreamSpec) -> None:
    async def no_responders(operation: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return {"error": {"code": 503, "description": "no responders"}}

    with pytest.raises(TopologyError, match="JetStream is not enabled on this server"):
        asyncio.run(ensure(no_responders, stream))


def test_three_silences_in_a_row_are_an_outage(stream: StreamSpec) -> None:
    calls = []

    async def unreachable(operation: str, body: Mapping[str, Any]) -> dict[str, Any]:
        calls.append(operation)
        raise NotConnectedError("no answer within 2 s")

    with pytest.raises(NotConnectedError, match="no answer within 2 s"):
        asyncio.run(ensure(unreachable, stream))
    assert calls == [f"STREAM.INFO.{stream.name}"] * 3


@pytest.mark.parametrize("lost", ["STREAM.CREATE", "STREAM.UPDATE", "CONSUMER.CREATE"])
def test_a_lost_answer_to_a_write_is_looked_up(
    server: NatsServer, stream: StreamSpec, consumer: ConsumerSpec, lost: str
) -> None:
    async def lose(operation: str, answer: dict[str, Any]) -> dict[str, Any]:
        if operation == lost:
            raise NotConnectedError("no answer within 2 s")
        return answer

    async def body(api: Api) -> None:
        if lost == "STREAM.UPDATE":
            await api.make_stream(stream.name, stream.subjects[0])
        api.doctor = lose
        await ensure(api, stream, consumer)
        assert (await api.stream(stream.name))["subjects"] == list(stream.subjects)
        assert api.writes.count(lost) == 1

    talk(server, body)


# ── others at work at the same time ──────────────────────────────────────────


def test_the_stream_is_deleted_between_plan_and_apply(
    server: NatsServer, stream: StreamSpec, consumer: ConsumerSpec
) -> None:
    async def body(api: Api) -> None:
        await api.make_stream(stream.name, stream.subjects[0])
        api.before["STREAM.UPDATE"] = lambda: api.do(f"STREAM.DELETE.{stream.name}", {})
        await ensure(api, stream, consumer)

        assert api.writes == ["STREAM.UPDATE", "STREAM.CREATE", "CONSUMER.CREATE"]
        assert set((await api.stream(stream.name))["subjects"]) == set(stream.subjects)
        assert (await api.consumer(consumer))["ack_wait"] == 30 * SECOND

    talk(server, body)


def test_the_stream_is_deleted_before_the_consumer_is_made(
    server: NatsServer, stream: StreamSpec, consumer: ConsumerSpec
) -> None:
    async def body(api: Api) -> None:
        api.before["CONSUMER.CREATE"] = lambda: api.do(f"STREAM.DELETE.{stream.name}", {})
        await ensure(api, stream, consumer)
        assert (await api.consumer(consumer))["filter_subject"] == consumer.filter_subjects[0]

    talk(server, body)


def test_another_creates_the_stream_first(
    server: NatsServer, stream: StreamSpec, names: Names
) -> None:
    foreign = f"{names.app_name}.other"

    async def body(api: Api) -> None:
        api.before["STREAM.CREATE"] = lambda: api.make_stream(stream.name, foreign)
        await ensure(api, stream)

        assert api.writes == ["STREAM.CREATE", "STREAM.UPDATE"]  # 10058 in between
        assert set((await api.stream(stream.name))["subjects"]) == {foreign, *stream.subjects}

    talk(server, body)


def test_another_creates_or_deletes_the_consumer_first(
    server: NatsServer, stream: StreamSpec, consumer: ConsumerSpec
) -> None:
    name = f"{consumer.stream}.{consumer.durable}"

    async def body(api: Api) -> None:
        api.before["CONSUMER.CREATE"] = lambda: api.make_consumer(consumer, max_deliver=5)
        await ensure(api, stream, consumer)  # 10148; 2.9 overwrites
        assert (await api.consumer(consumer))["max_deliver"] == -1

        await api.make_consumer(consumer, max_ack_pending=5)
        api.before["CONSUMER.CREATE"] = lambda: api.do(f"CONSUMER.DELETE.{name}", {})
        await ensure(api, stream, consumer)  # 10149; 2.9 creates
        assert (await api.consumer(consumer))["max_ack_pending"] == 1000

    talk(server, body)


def test_an_election_is_waited_out(nats_server: NatsServer, stream: StreamSpec) -> None:
    answers = 0

    async def elect(operation: str, answer: dict[str, Any]) -> dict[str, Any]:
        nonlocal answers
        answers += 1
        return {"error": {"code": 503, "err_code": 10008}} if answers in (1, 3) else answer

    async def body(api: Api) -> None:
        api.doctor = elect
        await ensure(api, stream)
        assert (await api.stream(stream.name))["subjects"] == list(stream.subjects)

    talk(nats_server, body)


def test_gives_up_at_the_deadline_when_another_keeps_undoing(
    nats_server: NatsServer, stream: StreamSpec
) -> None:
    async def body(api: Api) -> None:
        await api.make_stream(stream.name, stream.subjects[0])
        theirs = await api.stream(stream.name)

        async def undo(operation: str, answer: dict[str, Any]) -> dict[str, Any]:
            if operation == "STREAM.UPDATE":
                await api.do(f"STREAM.UPDATE.{stream.name}", theirs)
            return answer

        api.doctor = undo
        began = time.monotonic()
        with pytest.raises(TopologyError, match=r"after 0\.5 s: others undo this") as caught:
            await ensure(api, stream, deadline=0.5)
        assert time.monotonic() - began < 5
        assert f"+ subjects: {stream.subjects[1]}" in str(caught.value)

    talk(nats_server, body)


class Barrier:
    """Holds each of ``count`` applications at its first write until all are there."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.open = asyncio.Event()

    async def wait(self) -> None:
        self.count -= 1
        if self.count == 0:
            self.open.set()
        await self.open.wait()


async def naive(api: Api, stream: StreamSpec) -> None:
    config = await api.stream(stream.name)
    config["subjects"] += stream.subjects
    await api("STREAM.UPDATE." + stream.name, config)


async def start_together(
    server: NatsServer, stream: str, app_names: list[str], start: Callable[..., Awaitable[object]]
) -> None:
    """Start an application for each name, each with a connection of its own."""
    barrier = Barrier(len(app_names))
    clients = [await nats.connect(server.url) for _ in app_names]
    try:
        starts = []
        for client, app_name in zip(clients, app_names, strict=True):
            api = Api(client)  # whatever comes first: the stream may be there or not
            api.before = dict.fromkeys(("STREAM.CREATE", "STREAM.UPDATE"), barrier.wait)
            spec = StreamSpec(name=stream, subjects=(consume_subject(app_name, "hub"),))
            starts.append(start(api, spec))
        await asyncio.gather(*starts)
    finally:
        await asyncio.gather(*(client.close() for client in clients))


def apps(names: Names) -> list[str]:
    return [f"{names.app_name}-{number}" for number in range(APPS)]


def test_the_danger_is_real_a_plain_update_loses_subjects(server: NatsServer, names: Names) -> None:
    async def body(api: Api) -> None:
        await api.make_stream(names.stream_name, names.app_name)
        await start_together(server, names.stream_name, apps(names), naive)
        found = (await api.stream(names.stream_name))["subjects"]
        assert len(found) == 2  # the first one and the last writer's: 19 of 20 are lost

    talk(server, body)


@pytest.mark.usefixtures("real_pauses")
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("attempt", range(2))
def test_twenty_apps_that_start_together_have_all_their_subjects(
    server: NatsServer, names: Names, exists: bool, attempt: int
) -> None:
    async def start(api: Api, spec: StreamSpec) -> None:
        if not exists:  # a barrier on each would wait for the 19 that lost the race to create
            api.before.pop("STREAM.UPDATE")
        app_name = spec.subjects[0].split(".")[-1]
        consumer = consumer_of(app_name, "hub", spec.name)
        await ensure(api, spec, consumer)
        assert spec.subjects[0] in (await api.stream(spec.name))["subjects"]

    async def body(api: Api) -> None:
        foreign = [names.app_name] if exists else []
        if exists:
            await api.make_stream(names.stream_name, *foreign)
        await start_together(server, names.stream_name, apps(names), start)

        wanted = {*foreign, *(consume_subject(app_name, "hub") for app_name in apps(names))}
        assert set((await api.stream(names.stream_name))["subjects"]) == wanted
        listed = await api.do(f"CONSUMER.LIST.{names.stream_name}", {})
        assert {c["config"]["filter_subject"] for c in listed["consumers"]} == wanted - {*foreign}

    talk(server, body)
