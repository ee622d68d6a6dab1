"""Publishing: an event becomes a message, and JetStream confirms that it is stored.

Hands on one :class:`PublishResult` for each event, in order. Pipelined over the session's one
reply inbox; whatever looks like an outage is sent again with the same ``Nats-Msg-Id``, so that
the server's duplicate window drops the second of two.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nats.aio.msg import Msg

from . import events, subjects
from .config import Config
from .connection import Connection
from .events import Event
from .exceptions import ConnectionRefusedByServer, EventError, NotConnectedError, PublishError
from .headers import validate_headers, wire_size
from .session import NoResponders, Session

__all__ = ("Message", "PublishResult", "Publisher")

#: Messages in flight before the oldest answer is waited for; more brings no more speed.
WINDOW = 256
#: Seconds that one attempt waits for the answers of one window.
ATTEMPT_TIMEOUT = 5.0
RETRY_DELAY = (0.1, 2.0)
#: The server is still storing a message with this id (clustered; ADR-22): ask again.
ID_IN_PROCESS = 10158


@dataclass(frozen=True)
class Message:
    """What is sent, byte for byte, at each attempt; ``event`` where it carries one of ours."""

    event_id: str
    subject: str
    body: bytes
    headers: dict[str, str]
    event: Event | None = None


@dataclass(frozen=True)
class PublishResult:
    """What became of one event.

    Attributes:
        success: JetStream has stored it (or had already: ``duplicate``).
        event_id: the envelope's, also the ``Nats-Msg-Id``.
        subject: where it was sent.
        stream: the stream that has it.
        sequence: its number in the stream.
        duplicate: the stream had this ``event_id`` within its duplicate window.
        error: why it is not stored, as text.
        transient: an outage, not a refusal: try again with the same ``event_id``.
    """

    success: bool
    event_id: str
    subject: str
    stream: str | None = None
    sequence: int | None = None
    duplicate: bool = False
    error: str | None = None
    transient: bool = False

    def __bool__(self) -> bool:
        return self.success

    def raise_for_error(self) -> PublishResult:
        """Returns itself; raises :class:`PublishError` where the event is not stored."""
        if not self.success:
            raise PublishError(
                f"event {self.event_id} was not published to {self.subject}: {self.error}",
                event_id=self.event_id,
                subject=self.subject,
                transient=self.transient,
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as Celery's result backends want them."""
        return asdict(self)


class Publisher:
    """Publishes through a connection. Thread-safe; one per process and app."""

    def __init__(
        self, config: Config, connection: Connection, on_no_stream: Callable[[], Awaitable[None]]
    ) -> None:
        self._config = config
        self._connection = connection
        self._on_no_stream = on_no_stream

    def message(
        self,
        *,
        event_type: str,
        payload: Any,
        destination: str | None = None,
        subject: str | None = None,
        headers: Mapping[str, object] | None = None,
        **envelope: Any,
    ) -> Message:
        """Builds and checks a message; sends nothing.

        Raises:
            EventError: the event or a header cannot be sent, or it is too large.
            SubjectError: the subject or the destination is not legal.
        """
        config = self._config
        event = events.build(
            event_type=event_type, payload=payload, producer=config.app_name, **envelope
        )
        if subject is not None and destination is not None:
            raise EventError("give either destination= or subject=, not both")
        if subject is not None:
            subjects.validate_subject(subject)
        elif destination is not None:
            subject = subjects.publish_subject(config.app_name, destination)
        else:
            subject = config.publish_subject
        wire_headers = {**validate_headers(headers), "Nats-Msg-Id": event.event_id}
        body = events.encode(event)
        size = wire_size(body, wire_headers)
        limit = config.payload_limit - config.max_payload + self._connection.max_payload
        if size > limit:
            raise EventError(
                f"event {event.event_id} ({event_type}) has {size} bytes with its headers, more "
                f"than the {limit} that jetstream_max_payload and the server's max_payload leave "
                "(4 KiB are kept free for dead-letter headers): send a reference to the data "
                "instead"
            )
        return Message(event.event_id, subject, body, wire_headers, event)

    async def send(self, messages: Sequence[Message], timeout: float) -> list[PublishResult]:
        """Sends all, again and again what an outage stopped, for ``timeout`` seconds.

        Runs in the loop thread. Never raises for the broker's sake: each message has its result,
        at the same index.
        """
        deadline = time.monotonic() + timeout
        results: list[PublishResult | None] = [None] * len(messages)
        todo = list(range(len(messages)))
        delay, most = RETRY_DELAY
        while True:
            outcomes = await self._attempt([messages[i] for i in todo], deadline)
            for index, outcome in zip(todo, outcomes, strict=True):
                results[index] = _result(messages[index], outcome)
            todo = [i for i in todo if (r := results[i]) is not None and r.transient]
            pause = random.uniform(0.5, 1.0) * delay
            if not todo or time.monotonic() + pause >= deadline:
                return [result for result in results if result is not None]
            if any(isinstance(outcome, NoResponders) for outcome in outcomes):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._on_no_stream(), deadline - time.monotonic())
            await asyncio.sleep(pause)
            delay = min(most, delay * 2)

    async def _attempt(
        self, messages: Sequence[Message], deadline: float
    ) -> list[Msg | BaseException]:
        """Sends each once; answers (or what went wrong) aligned with ``messages``."""
        left = max(0.001, deadline - time.monotonic())
        try:
            session = await self._connection.session(left)
        except NotConnectedError as error:
            return [error] * len(messages)
        timeout = min(left, ATTEMPT_TIMEOUT + len(messages) / 2000)
        return await _pipeline(session, messages, timeout)


async def _pipeline(
    session: Session, messages: Sequence[Message], timeout: float
) -> list[Msg | BaseException]:
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    late = NotConnectedError(f"JetStream did not confirm within {timeout:g} s")
    futures: list[asyncio.Future[Msg]] = []
    try:
        for number, message in enumerate(messages):
            if number >= WINDOW and not (oldest := futures[number - WINDOW]).done():
                await asyncio.wait([oldest], timeout=end - loop.time())
            if loop.time() >= end:
                break
            futures.append(await _send(session, message))
        if futures:
            await asyncio.wait(futures, timeout=max(0.0, end - loop.time()))
    finally:
        for future in futures:
            future.cancel()
    outcomes = [_outcome(future, late) for future in futures]
    return outcomes + [late] * (len(messages) - len(outcomes))


async def _send(session: Session, message: Message) -> asyncio.Future[Msg]:
    try:
        return await session.send(message.subject, message.body, message.headers)
    except (EventError, NotConnectedError) as error:
        unsent: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        unsent.set_exception(error)
        return unsent


def _outcome(future: asyncio.Future[Msg], late: NotConnectedError) -> Msg | BaseException:
    return late if future.cancelled() else future.exception() or future.result()


def _result(message: Message, outcome: Msg | BaseException) -> PublishResult:
    event_id, subject = message.event_id, message.subject
    if isinstance(outcome, NoResponders):
        error = f"no stream takes the subject {subject} (is it provisioned, is JetStream up?)"
        return PublishResult(False, event_id, subject, error=error, transient=True)
    if isinstance(outcome, BaseException):
        refused = isinstance(outcome, (ConnectionRefusedByServer, EventError))
        return PublishResult(False, event_id, subject, error=str(outcome), transient=not refused)
    try:
        answer = json.loads(outcome.data)
        problem = answer.get("error")
    except (ValueError, AttributeError):
        return PublishResult(False, event_id, subject, error="the answer is no PubAck")
    if problem:
        return PublishResult(
            False, event_id, subject, error=_describe(problem), transient=_transient(problem)
        )
    return PublishResult(
        True,
        event_id,
        subject,
        stream=answer.get("stream"),
        sequence=answer.get("seq"),
        duplicate=bool(answer.get("duplicate")),
    )


def _transient(problem: Mapping[str, Any]) -> bool:
    """503 (resources, leader, limits with discard new) and 10158 pass; the rest is a refusal."""
    return problem.get("code") in (408, 503) or problem.get("err_code") == ID_IN_PROCESS


def _describe(problem: Mapping[str, Any]) -> str:
    return f"{problem.get('description', 'refused')} (error {problem.get('err_code', '?')})"
