"""Dead letters for tests, made by the code that makes them, without a worker."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from celery import Celery
from click.testing import CliRunner, Result

from celery_jetstream import JetStream
from celery_jetstream.cli import jetstream
from celery_jetstream.deadletter import Original
from celery_jetstream.delivery import Delivery
from celery_jetstream.outcomes import Message
from celery_jetstream.settlement import DeadLetter
from celery_jetstream.testing import wait_until
from tests.conftest import Names

#: What the Ruby gem 7.1.4 wrote for a handler that raised RuntimeError five times.
GEM_CONTEXT = {
    "event_id": "5ed8021b-8d4d-45bc-99bd-d55acef02d1a",
    "reason": "max_deliver_exceeded",
    "error_class": "RuntimeError",
    "error_message": "boom",
    "deliveries": 5,
    "original_subject": "py_b.sync.rb_a",
    "sequence": {"stream": 1, "consumer": 5},
    "consumer": "rb_a-workers",
    "stream": "p2",
    "published_at": "2026-11-23T07:05:31Z",
}
GEM_BODY = (
    b'{"event_id":"5ed8021b-8d4d-45bc-99bd-d55acef02d1a","schema_version":1,"event_type":"fail",'
    b'"producer":"py_b","resource_id":"0","occurred_at":"2026-11-23T07:05:12Z",'
    b'"trace_id":"b8e3cdd7e8797947","resource_type":"r","payload":{"id":0,"s":0.0}}'
)


class Desk:
    """An app that gives up what a test has it give up, in this process."""

    def __init__(self, url: str, names: Names, **settings: Any) -> None:
        self.names = names
        self.app = Celery("desk", broker="memory://", set_as_current=False)
        self.app.conf.update(
            jetstream_nats_urls=url,
            jetstream_stream_name=names.stream_name,
            jetstream_app_name=names.app_name,
            jetstream_destination_app=names.destination_app,
            **settings,
        )
        self.jetstream = JetStream(self.app)
        self.subject = f"{names.destination_app}.sync.{names.app_name}"
        self.jetstream.provision()
        self.letters = self.jetstream.dead_letters

    def close(self) -> None:
        self.jetstream.close()

    # -- dying -----------------------------------------------------------------------------------

    def publish(self, event_type: str, count: int = 1, **event: Any) -> list[str]:
        """Publishes events with payloads 0, 1, … to where the hub does; returns their event_ids."""
        common = {"event_type": event_type, "subject": self.subject, **event}
        batch = [{**common, "payload": {"id": number}} for number in range(count)]
        results = self.jetstream.publish_batch(batch)
        assert all(results), results
        return [result.event_id for result in results]

    def bury(
        self,
        event_type: str = "order.placed",
        count: int = 1,
        end: DeadLetter | None = None,
        **event: Any,
    ) -> list[str]:
        """Publishes events and gives each of them up; returns their event_ids."""
        event_ids = self.publish(event_type, count, **event)
        self.give_up(count, end)
        return event_ids

    def give_up(self, count: int = 1, end: DeadLetter | None = None) -> None:
        """Takes the next messages and gives them up, as a worker would."""
        before = self.count()
        default = DeadLetter("unrecoverable_error", "ValueError", "no colour", "desk.order")
        for message in self.take(count):
            delivery = Delivery.from_reply(message.reply, message.headers or {})
            original = Original(message.subject, message.data, message.headers or {})
            self.jetstream.settler.settle(delivery, end or default, original)
        wait_until(lambda: self.count() == before + count, 10, "the dead letters")
        assert self.jetstream.settler.drain(5) == 0

    def put(self, body: bytes, headers: Mapping[str, str], app_name: str = "") -> None:
        """Stores a message as somebody else wrote it on the dead-letter subject."""
        subject = f"{app_name or self.names.app_name}.sync.dlq"
        message = Message("", subject, body, dict(headers))
        (result,) = self.jetstream.connection.run(self.jetstream.publisher.send, [message], 5)
        assert result.success, result

    # -- what there is ---------------------------------------------------------------------------

    def take(self, count: int, *, consumer: str = "", ack: bool = False) -> list[Any]:
        """Pulls so many messages as a worker would; ``ack``: and is done with them."""
        durable = consumer or f"{self.names.app_name}-workers"

        async def pull() -> list[Any]:
            session = await self.jetstream.connection.session()
            inbox = session.client.new_inbox()
            answers: asyncio.Queue[Any] = asyncio.Queue()
            subscription = await session.subscribe(inbox, answers.put_nowait)
            asked = json.dumps({"batch": count, "expires": 5_000_000_000}).encode()
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{self.names.stream_name}.{durable}"
            await session.publish(subject, asked, reply=inbox)
            try:
                found = [await asyncio.wait_for(answers.get(), 10) for _ in range(count)]
            finally:
                await session.unsubscribe(subscription)
            assert all(one.reply for one in found), [one.headers for one in found]
            if ack:
                for one in found:
                    await session.ask(one.reply, b"+ACK")
            return found

        return self.jetstream.connection.run(pull)

    def api(self, operation: str, **request: Any) -> dict[str, Any]:
        return self.jetstream.connection.run(self.jetstream._api, operation, request)

    def count(self, subject: str = "") -> int:
        """Messages that the stream has on a subject; by default, dead letters."""
        answer = self.api(f"STREAM.INFO.{self.names.stream_name}", subjects_filter=">")
        found: int = (answer["state"].get("subjects") or {}).get(
            subject or f"{self.names.app_name}.sync.dlq", 0
        )
        return found

    def event_ids(self) -> list[str]:
        """Of all messages that wait for the desk, in their order; takes none of them."""
        found, sequence = [], 1
        while True:
            request = {"seq": sequence, "next_by_subj": self.subject}
            answer = self.api(f"STREAM.MSG.GET.{self.names.stream_name}", **request)
            if "error" in answer:
                return found
            sequence = answer["message"]["seq"] + 1
            found.append(json.loads(base64.b64decode(answer["message"]["data"]))["event_id"])

    # -- commands --------------------------------------------------------------------------------

    def run(self, *arguments: str, status: int = 0, answer: str = "") -> Result:
        """Runs ``jetstream dlq …`` with the desk's app, in this process."""
        context = SimpleNamespace(app=self.app, no_color=True)
        result = CliRunner().invoke(jetstream, ["dlq", *arguments], obj=context, input=answer)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    def json(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", status=status).stdout)


def gem_headers(context: Mapping[str, Any] | None = None, **more: str) -> dict[str, str]:
    """As the gem writes them; None for its context, or another one."""
    found = GEM_CONTEXT if context is None else context
    return {
        "nats-msg-id": "5ed8021b-8d4d-45bc-99bd-d55acef02d1a",
        "x-dead-letter": "true",
        "x-dlq-reason": "max_deliver_exceeded",
        "x-deliveries": "5",
        "x-dlq-context": json.dumps(found, separators=(",", ":")),
        **more,
    }
