"""Getting messages from the server: pulling and being pushed to, whatever the server says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from nats.aio.msg import Msg

from celery_jetstream import JetStream
from celery_jetstream.consumers import consumer_specs
from celery_jetstream.pull import Pull
from celery_jetstream.push import Push
from celery_jetstream.testing import NatsServer, wait_until
from tests.conftest import Names

SECOND = 1_000_000_000


class Desk:
    """An app's consumer as an administrator may have made it, and what takes its messages."""

    def __init__(self, server: NatsServer, names: Names) -> None:
        app = Celery("desk", broker="memory://", set_as_current=False)
        app.conf.update(
            jetstream_nats_urls=server.url,
            jetstream_app_name=names.app_name,
            jetstream_destination_app=names.destination_app,
            jetstream_stream_name=names.stream_name,
        )
        self.names = names
        self.jetstream = JetStream(app)
        (self.spec,) = consumer_specs(self.jetstream.config)
        self.found: list[Msg] = []
        self.missing = 0
        self._intakes: list[Pull | Push] = []
        self.jetstream.connection.run(self._make_stream)

    async def _make_stream(self) -> None:
        subjects = list(self.jetstream.config.subjects)
        name = self.names.stream_name
        config = {"name": name, "subjects": subjects, "retention": "workqueue"}
        assert "error" not in await self.jetstream._api(f"STREAM.CREATE.{name}", config)

    def make_consumer(self, **config: Any) -> None:
        self.jetstream.connection.run(self._make_consumer, config)

    def make_push_consumer(self, subject: str, **config: Any) -> None:
        self.make_consumer(
            deliver_subject=subject,
            deliver_group=self.spec.durable,
            flow_control=True,
            idle_heartbeat=SECOND // 2,
            **config,
        )

    async def _make_consumer(self, config: dict[str, Any]) -> None:
        wanted = {k: v for k, v in {**self.spec.wanted(), **config}.items() if v is not None}
        name = f"CONSUMER.CREATE.{self.spec.stream}.{self.spec.durable}"
        answer = await self.jetstream._api(
            name, {"stream_name": self.spec.stream, "config": wanted, "action": "create"}
        )
        assert "error" not in answer, answer

    def delete_consumer(self) -> None:
        answer = self.api(f"CONSUMER.DELETE.{self.spec.stream}.{self.spec.durable}")
        assert answer["success"], answer

    def api(self, operation: str) -> dict[str, Any]:
        return self.jetstream.connection.run(self.jetstream._api, operation, {})

    def consumer(self) -> dict[str, Any]:
        return self.api(f"CONSUMER.INFO.{self.spec.stream}.{self.spec.durable}")

    def fill(self, count: int) -> None:
        """Publishes events to the desk's own consumer."""
        subject = self.jetstream.config.consume_subjects[0]
        events = [
            {"event_type": "a.b", "payload": {"n": number}, "subject": subject}
            for number in range(count)
        ]
        assert all(self.jetstream.publish_batch(events, timeout=60))

    def pull(self, **options: Any) -> Pull:
        given: dict[str, Any] = {
            "room": lambda: 1000,
            "on_message": self.found.append,
            "on_missing": self._on_missing,
            **options,
        }
        connection = self.jetstream.connection
        return self._start(Pull(connection, self.spec.stream, self.spec.durable, **given))

    def push(self, subject: str, **options: Any) -> Push:
        given: dict[str, Any] = {
            "heartbeat": 0.5,
            "on_message": self.found.append,
            "on_missing": self._on_missing,
            **options,
        }
        return self._start(Push(self.jetstream.connection, subject, self.spec.durable, **given))

    def _start(self, intake: Any) -> Any:
        self._intakes.append(intake)
        self.jetstream.connection.submit(intake.run)
        return intake

    async def _on_missing(self) -> None:
        self.missing += 1

    def sequences(self) -> list[int]:
        return [int(message.reply.split(".")[5]) for message in self.found]

    def wait(self, count: int, timeout: float = 30) -> None:
        wait_until(lambda: len(self.found) >= count, timeout, f"{count} messages")

    def close(self) -> None:
        for intake in self._intakes:
            self.jetstream.connection.run(intake.stop, timeout=5)
        self.jetstream.close()


@pytest.fixture
def desk(nats_server: NatsServer, names: Names) -> Iterator[Desk]:
    desk = Desk(nats_server, names)
    yield desk
    desk.close()


@pytest.fixture(params=["pull", "push"])
def make_intake(request: pytest.FixtureRequest, desk: Desk) -> Callable[..., Pull | Push]:
    """``make_intake(**options)``: another member of one consumer, in either mode."""
    subject = f"deliver.{desk.names.app_name}"
    if request.param == "pull":
        desk.make_consumer()
        return desk.pull
    desk.make_push_consumer(subject)
    return lambda **options: desk.push(subject, **options)


# ── both ───────────────────────────────────────────────────────────────────────


def test_each_message_comes_once_to_one_of_two(
    desk: Desk, make_intake: Callable[..., Pull | Push]
) -> None:
    others: list[Msg] = []
    make_intake()
    make_intake(on_message=others.append)
    desk.fill(900)
    wait_until(lambda: len(desk.found) + len(others) >= 900, 30, "all of them")
    assert sorted(desk.sequences() + [int(m.reply.split(".")[5]) for m in others]) == [
        *range(1, 901)
    ]
    assert desk.found
    assert others


@pytest.mark.parametrize("count", [50, 300, 700])
def test_what_was_on_its_way_at_the_end_is_handed_on(desk: Desk, count: int) -> None:
    """So that it can be handed back: all that the server counts as delivered is in our hands."""
    desk.make_consumer()
    desk.fill(1000)
    enough = asyncio.Event()
    intake: list[Pull] = []

    def take(message: Msg) -> None:
        desk.found.append(message)
        if len(desk.found) == count:
            enough.set()

    async def stop_in_the_middle() -> None:
        await enough.wait()
        await intake[0].stop()

    intake.append(desk.pull(on_message=take))
    desk.jetstream.connection.run(stop_in_the_middle, timeout=30)
    delivered = desk.consumer()["delivered"]["stream_seq"]
    assert desk.sequences() == [*range(1, delivered + 1)]
    assert desk.consumer()["num_ack_pending"] == delivered


def test_a_consumer_that_is_deleted_and_made_again_goes_on(
    desk: Desk, make_intake: Callable[..., Pull | Push]
) -> None:
    async def make_again() -> None:
        desk.missing += 1
        if "error" in await desk.jetstream._api(info, {}):
            await desk._make_consumer(config)

    info = f"CONSUMER.INFO.{desk.spec.stream}.{desk.spec.durable}"
    config = desk.consumer()["config"]
    make_intake(on_missing=make_again)
    desk.fill(10)
    desk.wait(10)
    desk.delete_consumer()
    wait_until(lambda: "error" not in desk.consumer(), 30, "the consumer")
    desk.wait(20)  # a new consumer delivers again what was not acked
    assert desk.missing


def test_headers_that_cannot_be_read_do_no_harm(
    desk: Desk, make_intake: Callable[..., Pull | Push]
) -> None:
    """An error would end nats-py's read loop; the message would come again, and end the next."""
    make_intake()
    subject = desk.jetstream.config.consume_subjects[0]

    async def send() -> None:
        session = await desk.jetstream.connection.session()
        head = b"NATS/1.0\r\nname: \xff\xfe\r\n\xc3\x28: x\r\n\r\n"
        line = b"HPUB %s %d %d\r\n" % (subject.encode(), len(head), len(head) + 2)
        session.client.put(line + head + b"{}" + b"\r\n")
        await session.round_trip(5)

    session = desk.jetstream.connection.run(desk.jetstream.connection.session)
    desk.jetstream.connection.run(send)
    desk.fill(5)
    desk.wait(6)
    assert desk.jetstream.connection.run(desk.jetstream.connection.session) is session


# ── pull ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("limits", "pulls"),
    [
        ({"max_batch": 7}, 1),
        ({"max_expires": 1 * SECOND}, 1),
        ({"max_waiting": 1}, 3),
    ],
)
def test_limits_of_an_administrators_are_kept_to(
    desk: Desk, limits: dict[str, int], pulls: int, caplog: pytest.LogCaptureFixture
) -> None:
    desk.make_consumer(**limits)
    for _ in range(pulls):
        desk.pull()
    desk.fill(100)
    desk.wait(100)
    assert sorted(desk.sequences()) == [*range(1, 101)]
    refusals = [r for r in caplog.records if "refuses to be asked" in r.getMessage()]
    assert len(refusals) <= pulls


def test_a_refusal_is_not_answered_by_a_storm(old_nats_server: NatsServer, names: Names) -> None:
    """Of a request too many, 2.9 says so at once; a new server says nothing."""
    desk = Desk(old_nats_server, names)
    desk.make_consumer(max_waiting=1)
    pulls = [desk.pull() for _ in range(4)]
    wait_until(lambda: sum(pull._trouble for pull in pulls) >= 9, 30, "some refusals")
    requests = sum(next(pull._numbers) for pull in pulls)
    assert requests <= sum(pull._trouble for pull in pulls) + 8
    desk.close()


def test_it_asks_for_what_there_is_room_for(desk: Desk) -> None:
    desk.make_consumer()
    room = 5
    pull = desk.pull(room=lambda: room - len(desk.found))
    desk.fill(30)
    desk.wait(5)
    assert desk.consumer()["delivered"]["consumer_seq"] == 5
    room = 30
    desk.jetstream.connection.call_soon(pull.more)
    desk.wait(30)
    assert len(desk.found) == 30


def test_what_expired_is_asked_for_again(desk: Desk) -> None:
    """Several times over: the account of what is asked for stays right."""
    desk.make_consumer()
    pull = desk.pull(expires=0.5, batch=10)
    for number in range(1, 4):
        before = next(pull._numbers)
        wait_until(lambda b=before: next(pull._numbers) > b + 4, 20, "more requests")  # type: ignore[misc]
        assert pull.asked == 10
        desk.fill(10)
        desk.wait(10 * number)
    assert sorted(desk.sequences()) == [*range(1, 31)]


def test_a_push_consumer_cannot_be_pulled_from_and_that_is_said(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.make_consumer(deliver_subject="to.nobody")
    desk.pull()
    wait_until(lambda: "Consumer is push based" in caplog.text, 20, "the reason")


# ── push ───────────────────────────────────────────────────────────────────────


def test_more_than_flow_controls_window_is_delivered(desk: Desk) -> None:
    """The server stops after some bytes until it is answered; nothing else tells it to go on."""
    subject = f"deliver.{desk.names.app_name}"
    desk.make_push_consumer(subject, max_ack_pending=5000)
    desk.push(subject)
    source = desk.jetstream.config.consume_subjects[0]
    big = "x" * 50_000
    events = [{"event_type": "a.b", "payload": big, "subject": source} for _ in range(400)]
    assert all(desk.jetstream.publish_batch(events, timeout=60))
    desk.wait(400, 60)
    assert json.loads(desk.found[-1].data)["payload"] == big
