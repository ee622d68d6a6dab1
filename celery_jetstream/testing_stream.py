"""Events through a real stream and a real bridge: :func:`deliver` and :func:`drain`.

The handlers run in the test's own thread, as :func:`~celery_jetstream.testing.perform` runs them;
settlements are sent to the server and confirmed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .exceptions import ConfigurationError, NotConnectedError
from .extension import JetStream
from .settlement import Settlement
from .testing_apps import jetstream_on_server
from .testing_bridge import InProcess
from .testing_handlers import EventLike, Run, message_to

__all__ = ("Delivered", "Drained", "deliver", "drain")


@dataclass(frozen=True)
class Delivered:
    """What became of one event.

    Attributes:
        event_id: the event's.
        sequence: its message's in the stream.
        runs: each of its deliveries, in order.
        dead_letter: the headers of the dead letter that is stored for it; None where there is none.
    """

    event_id: str
    sequence: int
    runs: tuple[Run, ...]
    dead_letter: Mapping[str, str] | None = None

    @property
    def settlement(self) -> Settlement:
        """The last one."""
        return self.runs[-1].settlement

    @property
    def returned(self) -> Any:
        """What the handler returned at last."""
        return self.runs[-1].returned

    @property
    def error(self) -> BaseException | None:
        """What it raised at last."""
        return self.runs[-1].error


@dataclass(frozen=True)
class Drained:
    """What :func:`drain` did.

    Attributes:
        published: rows of the outbox that are in the stream now.
        failed: rows that were refused for good.
        runs: deliveries that were handled, in order.
    """

    published: int = 0
    failed: int = 0
    runs: tuple[Run, ...] = ()


def deliver(
    event: EventLike,
    payload: Any = None,
    *,
    jetstream: Any = None,
    retries: bool = False,
    timeout: float = 10.0,
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> Delivered:
    """Publishes an event to this app, has a bridge bring it, and runs its handler in this thread.

    Whatever else the stream has for the app is handled as well.

    Args:
        event: as for :func:`~celery_jetstream.testing.perform`.
        payload: as there.
        jetstream: an app or its JetStream; default the current app's.
        retries: go on until the event is acked or a dead letter; the delay of a ``Nak`` is in the
            run, and not waited for. Else its first delivery is the last that is looked at.
        timeout: seconds for all but the handlers themselves.
        headers: the message's.
        fields: more of the event.

    Raises:
        TimeoutError: it is not settled in time; says where it is.
        PublishError: the stream does not take it.
        ConfigurationError: the app has no handlers, or is not on a test's server.
    """
    jetstream = jetstream_on_server(jetstream)
    message = message_to(jetstream, event, payload, headers, fields)
    with InProcess(jetstream, retries, timeout) as loop:
        (result,) = jetstream.connection.run(
            jetstream.publisher.send, [message], timeout, timeout=timeout + 1
        )
        result.raise_for_error()
        sequence = result.sequence or 0
        if result.duplicate:
            raise ConfigurationError(
                f"the stream had an event with the id {message.event_id!r} within its duplicate "
                "window, and drops this one, as it would in production; give it another event_id"
            )
        loop.until(lambda: loop.has_settled(sequence), timeout, f"message {sequence} to be settled")
        loop.confirm(timeout)
        dead_letter = loop.dead_letters.get(sequence)
    runs = tuple(run for run in loop.runs if run.sequence == sequence)
    return Delivered(message.event_id, sequence, runs, dead_letter)


def drain(
    jetstream: Any = None,
    *,
    outbox: bool | None = None,
    stream: bool = True,
    retries: bool = False,
    timeout: float = 10.0,
) -> Drained:
    """Publishes what is due in the outbox, and handles what the stream has for this app.

    Again and again, until there is no more: what handlers write to the outbox is published too.

    Args:
        jetstream: an app or its JetStream; default the current app's.
        outbox: flush it; default where there is a database.
        stream: handle messages, where the app has handlers.
        retries: messages that a handler wants again are handled at once, until they are acked or
            dead letters. Else they wait in the stream for the delay that they were given.
        timeout: seconds for all but the handlers themselves.

    Raises:
        TimeoutError: there is more after that time; says what.
        NotConnectedError: NATS is away.
        OutboxUnavailableError: the database is away.
        ConfigurationError: the app is not on a test's server.
    """
    jetstream = jetstream_on_server(jetstream)
    has_outbox = jetstream.config.has_database if outbox is None else outbox
    published = failed = 0
    runs: list[Run] = []
    while True:
        sent = 0
        if has_outbox:
            flushed = jetstream.outbox.drain(timeout)
            if flushed.outage:
                raise NotConnectedError(f"the outbox was not flushed: {flushed.outage}")
            sent = flushed.sent
            published, failed = published + sent, failed + flushed.failed + flushed.exceptions
        handled = _handle_all(jetstream, retries, timeout) if stream and jetstream.check() else []
        runs += handled
        if not has_outbox or not (sent or handled):
            return Drained(published, failed, tuple(runs))


def _handle_all(jetstream: JetStream, retries: bool, timeout: float) -> list[Run]:
    with InProcess(jetstream, retries, timeout) as loop:
        loop.until(loop.nothing_left, timeout, "all messages to be settled")
        loop.confirm(timeout)
    return loop.runs
