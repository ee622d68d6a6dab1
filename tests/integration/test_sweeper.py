"""What a consumer with a finite max_deliver gives up becomes a dead letter, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_jetstream import JetStream
from celery_jetstream.consumers import consumer_specs
from celery_jetstream.sweeper import Sweeper
from celery_jetstream.testing import NatsServer, wait_until
from tests.conftest import Names
from tests.servers import RedisServer, need
from tests.stack import Stack, handled_once, in_both_modes

ACK_WAIT = 0.6
MakeStack = Callable[..., Stack]


class Queue:
    """The desk's consumer as an administrator made it, taken by hand; sweepers on demand."""

    def __init__(self, stack: Stack, **consumer: Any) -> None:
        self.stack = stack
        self.names = stack.names
        self.subject = f"{self.names.destination_app}.sync.{self.names.app_name}"
        make_consumer(stack, ack_wait=ACK_WAIT, **consumer)
        self._apps: list[JetStream] = []

    def sweep(self, **settings: Any) -> JetStream:
        """Starts a sweeper in a process's worth of its own."""
        app = Celery("desk", broker="memory://", set_as_current=False)
        app.conf.update({k: v for k, v in self.stack.settings.items() if k.startswith("jetstream")})
        app.conf.update(jetstream_auto_provision=False, jetstream_ack_wait=ACK_WAIT, **settings)
        desk = JetStream(app)
        self._apps.append(desk)
        desk.connect()
        (consumer,) = consumer_specs(desk.config)
        sweeper = Sweeper(desk.connection, desk.settler, consumer)
        desk.connection.submit(sweeper.run)
        return desk

    def close(self) -> None:
        for app in self._apps:
            app.close()

    def take(self) -> Any:
        """One delivery."""
        message = self._pull({"expires": 3_000_000_000})
        assert message.reply.startswith("$JS.ACK"), message.headers
        return message

    def _pull(self, request: dict[str, Any], timeout: float = 5) -> Any:
        """What a pull of one message is answered with: the message, or a status."""
        consumer = f"{self.names.stream_name}.{self.names.app_name}-workers"
        asked = json.dumps({"batch": 1, **request}).encode()

        async def go() -> Any:
            session = await self.stack.hub.connection.session()
            inbox = session.client.new_inbox()
            answers = await session.client.subscribe(inbox)
            try:
                subject = f"$JS.API.CONSUMER.MSG.NEXT.{consumer}"
                await session.publish(subject, asked, reply=inbox)
                return await answers.next_msg(timeout)
            finally:
                await answers.unsubscribe()

        return self.stack.hub.connection.run(go)

    def say(self, message: Any, word: bytes) -> None:
        """Settles a delivery, or says that it is in progress; the server has it on return."""

        async def go() -> None:
            session = await self.stack.hub.connection.session()
            await session.ask(message.reply, word)

        self.stack.hub.connection.run(go)

    def exhaust(self, count: int = 1) -> None:
        """Takes, and fails, the next messages until the consumer has given them up."""
        limit = self.stack.consumer()["config"]["max_deliver"]
        before = self.stack.consumer()["num_ack_pending"]
        for _ in range(count * limit):
            self.say(self.take(), b"-NAK")
        self.look()
        assert self.stack.consumer()["num_ack_pending"] == before

    def look(self) -> None:
        """A pull that finds nothing: the servers notice then that a message is exhausted."""
        with contextlib.suppress(asyncio.TimeoutError):  # 2.9 does not always answer then
            assert not self._pull({"expires": 100_000_000}, 0.5).reply

    def fail_one(self) -> None:
        """Fails what comes again: a crash may cost a consumer its last moments."""
        with contextlib.suppress(asyncio.TimeoutError):
            message = self._pull({"expires": 100_000_000}, 0.5)
            if message.reply:
                self.say(message, b"-NAK")

    def run_out(self) -> None:
        """Waits until the last delivery has timed out, and the server has noticed."""

        def exhausted() -> bool:
            self.look()
            return bool(self.stack.consumer()["num_ack_pending"] == 0)

        wait_until(exhausted, 10, "the message to be given up")

    def is_quiet(self, seconds: float) -> None:
        """For so long no message becomes a dead letter or goes."""
        dead, left = self.stack.dead_count(), self.stack.left()
        end = time.monotonic() + seconds
        wait_until(
            lambda: (
                time.monotonic() > end
                or (self.stack.dead_count(), self.stack.left()) != (dead, left)
            ),
            seconds + 5,
            "the end",
        )
        assert (self.stack.dead_count(), self.stack.left()) == (dead, left)


def make_consumer(stack: Stack, *, ack_wait: float, max_deliver: int = 2, **other: Any) -> None:
    durable = f"{stack.names.app_name}-workers"
    subject = f"{stack.names.destination_app}.sync.{stack.names.app_name}"
    config = {
        "durable_name": durable,
        "filter_subject": subject,
        "ack_policy": "explicit",
        "ack_wait": int(ack_wait * 1e9),
        "max_deliver": max_deliver,
        **other,
    }
    answer = stack.api(
        f"CONSUMER.CREATE.{stack.names.stream_name}.{durable}.{subject}",
        {"stream_name": stack.names.stream_name, "config": config},
    )
    assert "error" not in answer, answer


@pytest.fixture
def make_queue(make_stack: MakeStack) -> Iterator[Any]:
    queues: list[Queue] = []

    def make(**consumer: Any) -> Queue:
        queues.append(Queue(make_stack(), **consumer))
        return queues[-1]

    yield make
    for queue in queues:
        queue.close()


def test_what_got_stuck_while_nobody_listened_is_found(make_queue: Any) -> None:
    queue = make_queue()
    bad = queue.stack.publish("bad", count=2)
    queue.exhaust(2)
    queue.stack.publish("good")
    queue.say(queue.take(), b"+ACK")
    bad += queue.stack.publish("bad")  # the floor stays before it: nothing is acked after it
    queue.exhaust()
    queue.sweep()
    wait_until(lambda: queue.stack.left() == 0, 20, "the stuck ones to go")
    letters = queue.stack.dead_letters()
    letters.sort(key=lambda letter: letter["context"]["stream_sequence"])
    assert [letter["context"]["event_id"] for letter in letters] == bad
    assert {letter["reason"] for letter in letters} == {"max_deliveries_exceeded"}
    context = letters[0]["context"]
    assert (context["deliveries"], context["stream_sequence"]) == (2, 1)
    assert context["error_message"] == "delivered 2 times, the consumer's max_deliver"
    assert context["original_subject"] == queue.subject
    assert json.loads(letters[0]["body"])["event_type"] == "bad"
    assert letters[0]["headers"]["Nats-Msg-Id"] == f"dlq-{queue.names.stream_name}-1"


def test_an_advisory_tells_of_one_that_the_ack_floor_has_not_passed(make_queue: Any) -> None:
    queue = make_queue()
    queue.sweep()
    wait_until(
        lambda: queue.stack.api(f"STREAM.INFO.{queue.names.stream_name}"), 5, "a first answer"
    )
    queue.stack.publish("slow")
    held = queue.take()
    (bad,) = queue.stack.publish("bad")

    def buried() -> bool:
        queue.say(held, b"+WPI")
        return queue.stack.dead_count() == 1

    queue.exhaust()
    wait_until(buried, 20, "the dead letter")
    assert queue.stack.consumer()["ack_floor"]["stream_seq"] == 0
    assert queue.stack.dead_letters()[0]["context"]["event_id"] == bad
    wait_until(lambda: buried() and queue.stack.left() == 1, 5, "the stuck one to go")
    queue.say(held, b"+ACK")
    assert queue.stack.left() == 0
    assert queue.stack.dead_count() == 1


def test_a_last_delivery_in_progress_or_waiting_is_not_stuck(make_queue: Any) -> None:
    queue = make_queue()
    queue.stack.publish("slow", count=2)
    for _ in range(2):
        queue.say(queue.take(), b"-NAK")
    running, waiting = queue.take(), queue.take()
    queue.say(waiting, b'-NAK {"delay": 60000000000}')
    queue.sweep()
    end = time.monotonic() + 4 * ACK_WAIT

    def over() -> bool:
        queue.say(running, b"+WPI")
        return time.monotonic() > end

    wait_until(over, 20, "four times ack_wait")
    assert (queue.stack.left(), queue.stack.dead_count()) == (2, 0)


def test_one_that_somebody_still_works_on_is_not_swept(make_queue: Any) -> None:
    """An outage cut its worker off, the server gave it up, and the handler comes to its end."""
    queue = make_queue()
    queue.stack.publish("slow")
    queue.say(queue.take(), b"-NAK")
    running = queue.take()
    queue.run_out()
    queue.sweep()
    end = time.monotonic() + 6 * ACK_WAIT

    def over() -> bool:
        queue.say(running, b"+WPI")
        return time.monotonic() > end

    wait_until(over, 20, "six times ack_wait")
    assert (queue.stack.left(), queue.stack.dead_count()) == (1, 0)
    queue.say(running, b"+ACK")
    wait_until(lambda: queue.stack.left() == 0, 5, "the late ack to count")
    queue.is_quiet(3 * ACK_WAIT)


def test_its_end_without_a_word_is_heard_as_well(make_queue: Any) -> None:
    queue = make_queue()
    queue.stack.publish("slow")
    queue.say(queue.take(), b"-NAK")
    running = queue.take()
    queue.run_out()
    queue.sweep()
    for _ in range(3):
        queue.say(running, b"+WPI")
    wait_until(lambda: queue.stack.dead_count() == 1, 20, "the dead letter")
    wait_until(lambda: queue.stack.left() == 0, 5, "the stuck one to go")


def test_several_sweepers_make_one_dead_letter_of_each(make_queue: Any) -> None:
    queue = make_queue()
    bad = queue.stack.publish("bad", count=40)
    queue.exhaust(40)
    for _ in range(3):
        queue.sweep()
    wait_until(lambda: queue.stack.left() == 0, 30, "the stuck ones to go")
    letters = queue.stack.dead_letters()
    assert sorted(letter["context"]["event_id"] for letter in letters) == sorted(bad)


def test_killed_after_the_dead_letter_it_makes_no_second_one(make_queue: Any) -> None:
    queue = make_queue()
    queue.stack.publish("bad")
    queue.exhaust()
    message_id = f"dlq-{queue.names.stream_name}-1"
    headers = {"Nats-Msg-Id": message_id, "x-dlq-reason": "first", "x-dlq-context": "{}"}

    async def first() -> None:
        session = await queue.stack.hub.connection.session()
        await session.ask(f"{queue.names.app_name}.sync.dlq", b"x", headers)

    queue.stack.hub.connection.run(first)
    queue.sweep()
    wait_until(lambda: queue.stack.left() == 0, 20, "the stuck one to go")
    assert [letter["reason"] for letter in queue.stack.dead_letters()] == ["first"]


def test_without_dead_letters_it_is_logged_and_destroyed(
    make_queue: Any, caplog: pytest.LogCaptureFixture
) -> None:
    queue = make_queue()
    queue.stack.publish("bad")
    queue.exhaust()
    queue.sweep(jetstream_use_dlq=False, jetstream_no_dlq_action="log_and_term")
    wait_until(lambda: queue.stack.left() == 0, 20, "the stuck one to go")
    assert queue.stack.dead_count() == 0
    assert "given up and destroyed (max_deliveries_exceeded)" in caplog.text


def test_that_a_consumer_gives_messages_up_is_said_once(
    make_queue: Any, caplog: pytest.LogCaptureFixture
) -> None:
    queue = make_queue()
    queue.sweep()
    said = f"consumer {queue.names.app_name}-workers has max_deliver=2"
    wait_until(lambda: said in caplog.text, 10, "the warning")
    assert "Set its max_deliver to -1" in caplog.text


def test_without_a_limit_it_asks_one_question(make_queue: Any) -> None:
    queue = make_queue(max_deliver=-1)
    asked: list[str] = []

    async def listen() -> None:
        session = await queue.stack.hub.connection.session()
        await session.client.subscribe("$JS.API.>", cb=receive)

    async def receive(message: Any) -> None:
        asked.append(message.subject)

    queue.stack.hub.connection.run(listen)
    queue.sweep()
    wait_until(lambda: asked, 10, "the question")
    queue.stack.publish("good", count=20)
    for _ in range(20):
        queue.say(queue.take(), b"+ACK")
    ours = [subject for subject in asked if "MSG.NEXT" not in subject]
    consumer = f"{queue.names.stream_name}.{queue.names.app_name}-workers"
    assert ours == [f"$JS.API.CONSUMER.INFO.{consumer}"]


@pytest.mark.parametrize("retention", ["limits", "interest"])
def test_only_a_work_queue_is_swept(make_queue: Any, retention: str) -> None:
    """Elsewhere the stream keeps what was settled."""
    queue = make_queue()
    queue.stack.api(f"STREAM.DELETE.{queue.names.stream_name}")
    subjects = [queue.subject, f"{queue.names.app_name}.sync.dlq"]
    name = queue.names.stream_name
    queue.stack.api(
        f"STREAM.CREATE.{name}", {"name": name, "subjects": subjects, "retention": retention}
    )
    make_consumer(queue.stack, ack_wait=ACK_WAIT)
    queue.stack.publish("good")
    if retention == "interest":  # another consumer's
        config = {"durable_name": "other", "ack_policy": "explicit"}
        queue.stack.api(
            f"CONSUMER.DURABLE.CREATE.{name}.other", {"stream_name": name, "config": config}
        )
        queue.stack.publish("good")
        queue.say(queue.take(), b"+ACK")
    queue.say(queue.take(), b"+ACK")
    queue.sweep()
    queue.is_quiet(4 * ACK_WAIT)


def test_after_an_outage_it_goes_on(
    tmp_path: Path, redis_server: RedisServer, names: Names
) -> None:
    need("nats")
    with NatsServer(tmp_path / "nats") as server:
        stack = Stack(tmp_path, server.url, redis_server.url, names)
        stack.hub.provision()
        queue = Queue(stack)
        try:
            queue.sweep()
            stack.publish("bad")
            queue.exhaust()
            server.kill()
            server.start()
            wait_until(lambda: stack.hub.connected, 20, "the connection")
            wait_until(lambda: queue.fail_one() or stack.left() == 0, 30, "the stuck one to go")
            assert len(stack.dead_letters()) == 1
        finally:
            queue.close()
            stack.close()


def test_a_user_who_may_not_ask_is_told_what_to_allow(
    tmp_path: Path,
    redis_server: RedisServer,
    names: Names,
    caplog: pytest.LogCaptureFixture,
) -> None:
    need("nats")
    denied = f"$JS.API.CONSUMER.INFO.{names.stream_name}.{names.app_name}-workers"
    config = (
        "authorization { users = [\n"
        "  {user: admin, password: a}\n"
        f'  {{user: desk, password: d, permissions: {{publish: {{deny: "{denied}"}}}}}}\n'
        "] }\n"
    )
    with NatsServer(tmp_path / "nats", config=config) as server:
        url = server.url.replace("nats://", "nats://admin:a@")
        stack = Stack(tmp_path, url, redis_server.url, names)
        stack.hub.provision()
        queue = Queue(stack)
        try:
            desk = queue.sweep(jetstream_nats_urls=server.url.replace("nats://", "nats://desk:d@"))
            wait_until(lambda: "Allow it to publish to" in caplog.text, 20, "the advice")
            (line,) = [r for r in caplog.records if "Allow it to" in r.getMessage()]
            assert line.levelno == logging.WARNING
            assert denied in line.getMessage()
            assert f"$JS.API.STREAM.MSG.GET.{names.stream_name}" in line.getMessage()
            assert desk.connected
        finally:
            queue.close()
            stack.close()


# -- with the bridge, and with a direct worker ----------------------------------------------------


@in_both_modes
def test_poison_of_an_administrators_consumer_becomes_dead_letters(
    make_stack: MakeStack, direct: bool
) -> None:
    """Given up while no bridge ran, and while one does; the good ones are handled once."""
    stack = make_stack(
        direct=direct,
        jetstream_auto_provision=False,
        jetstream_ack_wait=1,
    )
    queue = Queue(stack)
    bad = stack.publish("error.runtime", count=2)
    queue.exhaust(2)
    make_consumer(stack, ack_wait=1)
    good = stack.publish("order.created", count=10)
    bad += stack.publish("error.runtime")
    good += stack.publish("order.created", count=10)
    stack.start()
    if not direct:
        stack.bridge()  # a second one
    stack.wait_handled(20)
    stack.wait_settled(30)
    handled_once(stack, good)
    letters = stack.dead_letters()
    assert sorted(letter["context"]["event_id"] for letter in letters) == sorted(bad)
    assert {letter["reason"] for letter in letters} == {"max_deliveries_exceeded"}
    lines = [line for line in stack.ledger() if line["event_id"] == bad[-1]]
    assert len(lines) == 2
    # nothing is asked without auto_provision, so only who heard the server tell of one says so
    assert any("has max_deliver=2" in process.text() for process in stack._processes)
