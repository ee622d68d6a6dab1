"""``celery -A … jetstream status``, and what ``health_check()`` finds of NATS, and how soon."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from celery_jetstream import JetStream
from celery_jetstream.capabilities import ATOMIC_BATCHES
from celery_jetstream.testing import NatsServer
from tests.conftest import Names
from tests.servers import need
from tests.stack import Stack

MakeStack = Callable[..., Stack]
MakeApp = Callable[..., JetStream]


@pytest.fixture
def make_app(nats_server: NatsServer, names: Names) -> Iterator[MakeApp]:
    apps: list[JetStream] = []

    def make(url: str = "", **settings: Any) -> JetStream:
        app = Celery("desk", broker="memory://", set_as_current=False)
        app.conf.update(
            jetstream_nats_urls=url or nats_server.url,
            jetstream_app_name=names.app_name,
            jetstream_destination_app=names.destination_app,
            jetstream_stream_name=names.stream_name,
            **settings,
        )
        apps.append(JetStream(app))
        return apps[-1]

    yield make
    for app in apps:
        app.close()


def api(app: JetStream, operation: str, **request: Any) -> dict[str, Any]:
    answer: dict[str, Any] = app.connection.run(app._api, operation, request)
    assert "error" not in answer, answer
    return answer


# -- the command -----------------------------------------------------------------------------------


def status(stack: Stack, *arguments: str, expected: int = 0) -> str:
    process = stack.celery("jetstream", "status", *arguments)
    assert process.wait(30) == expected, process.text()
    return process.text()


def test_all_is_well(make_stack: MakeStack, names: Names) -> None:
    stack = make_stack()
    assert stack.celery("jetstream", "provision").wait(30) == 0
    found = json.loads(status(stack, "--json"))
    assert found["healthy"] is True
    assert found["problems"] == found["warnings"] == []
    (consumer,) = found["consumers"]
    assert consumer["filter_subjects"] == [f"{names.destination_app}.sync.{names.app_name}"]
    assert (consumer["stuck"], consumer["max_deliver"]) == (0, None)
    assert (found["stream"]["retention"], found["stream"]["replicas"]) == ("workqueue", 1)
    said = status(stack)
    assert f"consumer    {names.app_name}-workers: 0 pending" in said
    assert said.endswith("\nhealthy\n")


def test_without_a_server_it_says_so(make_stack: MakeStack) -> None:
    stack = make_stack()
    stack.settings["jetstream_nats_urls"] = "nats://desk:seCret@127.0.0.1:1"
    said = status(stack, "--timeout", "1", expected=1)
    assert "unhealthy: no connection to NATS at nats://***@127.0.0.1:1" in said
    assert said.endswith("\nunhealthy\n")
    found = json.loads(status(stack, "--json", "--timeout", "0.5", expected=1).splitlines()[-1])
    assert found["connection"]["connected"] is False
    assert found["server"]["version"] is None
    assert "seCret" not in said + json.dumps(found)


def test_wrong_settings_are_said(make_stack: MakeStack) -> None:
    stack = make_stack(jetstream_ack_wait="soon")
    said = status(stack, "--json", expected=1)
    assert "jetstream_ack_wait" in json.loads(said)["problems"][0]


# -- what it finds ---------------------------------------------------------------------------------


def test_what_is_not_there_is_a_problem(make_app: MakeApp, names: Names) -> None:
    found = make_app().health_check(fresh=True)
    assert found["healthy"] is False
    assert (found["stream"]["exists"], found["consumers"][0]["exists"]) == (False, False)
    assert f"stream {names.stream_name}: stream not found" in found["problems"]


def test_a_stream_without_our_subjects_is_a_problem(make_app: MakeApp, names: Names) -> None:
    app = make_app()
    app.connection.connect()
    api(app, f"STREAM.CREATE.{names.stream_name}", name=names.stream_name, subjects=["other"])
    problems = app.health_check(fresh=True)["problems"]
    assert sum("does not take" in problem for problem in problems) == 4
    assert any("is no work queue" in problem for problem in problems)


def test_without_a_server_it_ends_in_time(make_app: MakeApp) -> None:
    app = make_app("nats://127.0.0.1:1")
    began = time.monotonic()
    assert app.health_check(fresh=True, timeout=0.5)["connection"]["connected"] is False
    assert time.monotonic() - began < 5


def test_a_hung_server_ends_it_in_time(make_app: MakeApp) -> None:
    need("nats")
    with NatsServer() as server:
        app = make_app(server.url)
        app.provision()
        server.pause()
        began = time.monotonic()
        found = app.health_check(fresh=True, timeout=1)
        assert time.monotonic() - began < 5
        assert found["healthy"] is False
        server.resume()


def test_what_the_old_server_lacks_is_named(make_app: MakeApp, old_nats_server: NatsServer) -> None:
    app = make_app(old_nats_server.url)
    app.provision()
    found = app.health_check(fresh=True)
    assert found["healthy"] is True
    server = found["server"]
    assert server["version"].startswith("2.9.")
    assert server["api_level"] is None
    lacks = {entry["feature"]: entry for entry in server["lacks"]}
    assert list(lacks) == ["filter_subjects", "atomic batches"]
    assert lacks["filter_subjects"]["since"] == "2.10.0"
    assert not any(entry["asked_for"] for entry in lacks.values())


def test_a_setting_that_the_old_server_cannot_serve_is_a_problem(
    make_app: MakeApp, old_nats_server: NatsServer
) -> None:
    app = make_app(old_nats_server.url, jetstream_outbox_atomic=True)
    app.provision()
    found = app.health_check(fresh=True)
    (problem,) = found["problems"]
    assert problem.startswith("jetstream_outbox_atomic is on, and nats-server 2.9.")
    assert "events are published one by one" in problem


@pytest.mark.needs_nats(ATOMIC_BATCHES)
def test_a_stream_that_takes_no_atomic_batches_is_a_problem(make_app: MakeApp) -> None:
    make_app().provision()
    (problem,) = make_app(jetstream_outbox_atomic=True).health_check(fresh=True)["problems"]
    assert "takes no atomic batches (allow_atomic)" in problem


def test_stuck_messages_are_counted(make_app: MakeApp, names: Names) -> None:
    app = make_app()
    app.provision()
    durable = f"{names.app_name}-workers"
    subject = f"{names.destination_app}.sync.{names.app_name}"
    api(app, f"CONSUMER.DELETE.{names.stream_name}.{durable}")
    config = {
        "durable_name": durable,
        "filter_subject": subject,
        "ack_policy": "explicit",
        "ack_wait": 100_000_000,
        "max_deliver": 1,
    }
    create = f"CONSUMER.CREATE.{names.stream_name}.{durable}.{subject}"
    api(app, create, stream_name=names.stream_name, config=config)
    app.connection.run(exhaust_one, app, names.stream_name, durable, subject)
    for _ in range(2):
        app.publish("waiting", {}, subject=subject)
    found = app.health_check(fresh=True)
    (consumer,) = found["consumers"]
    assert (consumer["pending"], consumer["stuck"], consumer["max_deliver"]) == (2, 1, 1)
    assert found["warnings"][0].startswith(f"consumer {durable} has max_deliver=1")
    assert found["problems"] == [
        f"consumer {durable}: 1 messages are stuck: stored, and never delivered again"
    ]


async def exhaust_one(app: JetStream, stream: str, durable: str, subject: str) -> None:
    """Takes one message, and lets its only delivery time out."""
    session = await app.connection.session()
    await session.ask(subject, b"{}")
    client = session.client
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    request = b'{"batch": 1, "expires": 300000000}'
    pending = 1
    while pending:
        await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}", request, inbox)
        await answers.next_msg(5)
        answer = await session.ask(f"$JS.API.CONSUMER.INFO.{stream}.{durable}")
        info = json.loads(answer.data)
        pending = info["num_ack_pending"] or info["num_pending"]
    await answers.unsubscribe()
