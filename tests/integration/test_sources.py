"""Events of several apps, several apps on one stream, several servers in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from celery_jetstream import JetStream
from celery_jetstream.exceptions import TopologyError
from celery_jetstream.testing import NatsServer, wait_until
from tests.conftest import Names
from tests.stack import Stack, handled_once, in_both_modes

MakeStack = Callable[..., Stack]
MakeApp = Callable[..., JetStream]


@pytest.fixture
def make_app(names: Names) -> Iterator[MakeApp]:
    """``make_app(server, app_name, destination, **settings)``: closed with the test."""
    made: list[JetStream] = []

    def make(url: str, app_name: str, destination: str, **settings: Any) -> JetStream:
        app = Celery(app_name, broker="memory://", set_as_current=False)
        app.conf.update(
            jetstream_nats_urls=url,
            jetstream_app_name=app_name,
            jetstream_destination_app=destination,
            jetstream_stream_name=names.stream_name,
            **settings,
        )
        made.append(JetStream(app))
        return made[-1]

    yield make
    for jetstream in made:
        jetstream.close()


def publish(jetstream: JetStream, count: int, **event: Any) -> list[str]:
    found = jetstream.publish_batch(
        [{"event_type": "order.paid", "payload": {"id": n}, **event} for n in range(count)]
    )
    assert all(found), [result.error for result in found if not result][:3]
    return [result.event_id for result in found]


def consumers(jetstream: JetStream) -> dict[str, list[str]]:
    """The consumers of the stream and their subjects."""
    stream = jetstream.config.stream_name
    answer = jetstream.connection.run(jetstream._api, f"CONSUMER.LIST.{stream}", {})
    return {
        info["name"]: info["config"].get("filter_subjects") or [info["config"]["filter_subject"]]
        for info in answer["consumers"]
    }


# ── several sources ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("server", ["nats_server", "old_nats_server"])
@in_both_modes
def test_one_bridge_or_worker_handles_the_events_of_all(
    make_stack: MakeStack,
    make_app: MakeApp,
    names: Names,
    request: pytest.FixtureRequest,
    server: str,
    direct: bool,
) -> None:
    url = request.getfixturevalue(server).url
    crm, billing = f"crm-{names.app_name}", f"billing-{names.app_name}"
    apps = [make_app(url, name, names.app_name) for name in (crm, billing)]
    stack = make_stack(
        nats_url=url,
        direct=direct,
        jetstream_sources={
            names.destination_app: None,
            crm: None,
            billing: {"max_ack_pending": 5, "batch_size": 2},
        },
    )
    for app in apps:
        app.provision()
    stack.start()
    published = stack.publish("order.paid", 40)
    for app in apps:
        published += publish(app, 40)
    stack.wait_handled(120)
    wait_until(lambda: stack.consumer()["num_ack_pending"] == 0, 30, "all to be settled")
    handled_once(stack, published)
    first = f"{names.app_name}-workers"
    found = consumers(stack.hub)
    subjects = {name: f"{name}.sync.{names.app_name}" for name in (crm, billing)}
    subjects[""] = f"{names.destination_app}.sync.{names.app_name}"
    if server == "nats_server":
        assert found[first] == [subjects[""], subjects[crm]]
    else:
        assert found[first] == [subjects[""]]
        assert found[f"{first}-{crm}"] == [subjects[crm]]
    assert found[f"{first}-{billing}"] == [subjects[billing]]
    info = f"CONSUMER.INFO.{names.stream_name}.{first}-{billing}"
    assert stack.api(info)["config"]["max_ack_pending"] == 5


def test_consumers_made_by_an_older_server_stay(
    nats_server: NatsServer, make_app: MakeApp, names: Names
) -> None:
    """One consumer for all would ask for what they have, and be refused (10100)."""
    one, two, three = (f"{name}-{names.app_name}" for name in ("one", "two", "three"))
    app = make_app(nats_server.url, names.app_name, one, jetstream_sources=[one, two, three])
    settings = {one: None, two: {"batch_size": 2}, three: {"batch_size": 3}}
    each = make_app(nats_server.url, names.app_name, one, jetstream_sources=settings)
    each.provision()
    before = consumers(each)
    assert len(before) == 3
    plan = app.provision()
    assert not plan.changed
    assert consumers(app) == before


@in_both_modes
def test_what_a_new_source_had_sent_before_is_handled(
    nats_server: NatsServer, make_stack: MakeStack, make_app: MakeApp, names: Names, direct: bool
) -> None:
    """A consumer that got its subject later would have passed it, and nobody would see it."""
    late = f"late-{names.app_name}"
    app = make_app(nats_server.url, late, names.app_name)
    app.provision()
    before = publish(app, 10)
    stack = make_stack(direct=direct)
    published = stack.publish("order.paid", 10)
    (worker,) = stack.start()
    stack.wait_handled(10)
    wait_until(lambda: stack.consumer()["num_ack_pending"] == 0, 30, "all to be settled")
    worker.stop()
    stack.settings["jetstream_sources"] = [names.destination_app, late]
    stack.start()
    stack.wait_handled(20)
    handled_once(stack, [*before, *published])


def test_one_of_several_that_is_deleted_is_made_again_as_it_was(
    nats_server: NatsServer, make_app: MakeApp, names: Names
) -> None:
    one, two = (f"{name}-{names.app_name}" for name in ("one", "two"))
    make_app(nats_server.url, names.app_name, one).provision()
    app = make_app(nats_server.url, names.app_name, one, jetstream_sources=[one, two])
    app.provision()
    before = consumers(app)
    assert len(before) == 2
    operation = f"CONSUMER.DELETE.{names.stream_name}.{names.app_name}-workers"
    assert app.connection.run(app._api, operation, {})["success"]
    app.provision()
    assert consumers(app) == before


def test_a_source_that_another_consumer_takes_is_an_error_with_its_name(
    nats_server: NatsServer, make_app: MakeApp, names: Names
) -> None:
    one, two = (f"{name}-{names.app_name}" for name in ("one", "two"))
    app = make_app(nats_server.url, names.app_name, one, jetstream_sources=[one, two])
    app.provision()
    app.connection.run(
        app._api, f"CONSUMER.DELETE.{names.stream_name}.{names.app_name}-workers", {}
    )
    subject = f"{two}.sync.{names.app_name}"
    config = {"durable_name": "theirs", "ack_policy": "explicit", "filter_subject": subject}
    answer = app.connection.run(
        app._api,
        f"CONSUMER.CREATE.{names.stream_name}.theirs.{subject}",
        {"stream_name": names.stream_name, "config": config},
    )
    assert "error" not in answer
    with pytest.raises(TopologyError, match=rf"there is 'theirs' \({subject}\)"):
        app.provision()


# ── several apps on one stream ─────────────────────────────────────────────────


def test_three_apps_on_one_stream_send_to_each_other(
    nats_server: NatsServer, make_stack: MakeStack, make_app: MakeApp, names: Names
) -> None:
    """Each gets what is for it, and nothing else."""
    other = f"other-{names.app_name}"
    third = make_app(nats_server.url, other, names.app_name)
    third.provision()
    stack = make_stack(jetstream_sources=[names.destination_app, other])
    stack.start()
    for_desk = publish(third, 20) + stack.publish("order.paid", 20)
    desk = make_app(
        nats_server.url, names.app_name, names.destination_app, jetstream_sources=[other]
    )
    publish(desk, 10, destination=other)
    publish(desk, 10)
    handled = {line["event_id"] for line in stack.wait_handled(40)}
    assert handled == set(for_desk)
    pending = {name: _pending(stack, f"{name}-workers") for name in (other, names.destination_app)}
    assert pending == {other: 10, names.destination_app: 10}


def _pending(stack: Stack, durable: str) -> int:
    found: int = stack.api(f"CONSUMER.INFO.{stack.names.stream_name}.{durable}")["num_pending"]
    return found


# ── several servers ────────────────────────────────────────────────────────────


def test_two_apps_with_servers_of_their_own_in_one_process(
    nats_server: NatsServer, make_app: MakeApp, names: Names
) -> None:
    """Two connections, two outages: one server's does not touch the other."""
    with NatsServer() as second:
        here = make_app(nats_server.url, "here", "there")
        away = make_app(second.url, "here", "there")
        for jetstream in (here, away):
            jetstream.provision()
        assert here.connection is not away.connection
        publish(here, 3)
        publish(away, 5)
        assert [_stored(one) for one in (here, away)] == [3, 5]
        second.kill()
        wait_until(lambda: not away.connected, 10, "the loss to be noticed")
        publish(here, 4)
        assert here.connected
        second.start()
        publish(away, 1)
        assert [_stored(one) for one in (here, away)] == [7, 6]
        away.close()
        publish(here, 1)


def _stored(jetstream: JetStream) -> int:
    stream = jetstream.config.stream_name
    count: int = jetstream.connection.run(jetstream._api, f"STREAM.INFO.{stream}", {})["state"][
        "messages"
    ]
    return count
