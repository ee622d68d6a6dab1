"""One handler and one event, in this process: what the handler does, and how it would settle.

:func:`perform` writes the event as its producer would, and has it read as a worker reads it; from
there on everything is Celery's and the library's own. Nothing is sent: what would be settled is
in the :class:`Run`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from celery import signals
from celery.app.trace import build_tracer
from kombu.serialization import dumps, loads

from . import envelopes, events, jsontext
from .consumers import consumer_specs
from .delivery import Delivery
from .dispatcher import Dispatcher, TaskMessages, header_of
from .events import Event
from .exceptions import EventError, PayloadError
from .extension import JetStream
from .handlers import HEADER, JetStreamTask
from .headers import validate_headers
from .inflight import Flight
from .outcomes import Message
from .settlement import Settlement
from .testing_apps import jetstream_in

__all__ = ("EventLike", "Run", "Settling", "message_to", "perform", "run_handler")

#: The arguments of ``JetStream.publish`` as a dict, an event, its type, or the bytes of a body.
EventLike = Mapping[str, Any] | Event | str | bytes


@dataclass(frozen=True, repr=False)
class Run:
    """How one delivery of an event ended.

    Attributes:
        settlement: ``Ack()``, ``Nak(delay)`` or ``DeadLetter(reason, …)``.
        returned: what the handler returned; None where it did not.
        error: what it raised; ``Retry`` for a ``self.retry()``.
        handler: the task's name; "" where no handler began: no JSON, no envelope, no handler.
        ran: it was for the handler to run; not where the inbox has the event as done, the payload
            does not fit, or no handler began.
        num_delivered: which delivery it was.
        sequence: the message's in the stream.
    """

    settlement: Settlement
    returned: Any = None
    error: BaseException | None = None
    handler: str = ""
    ran: bool = False
    num_delivered: int = 1
    sequence: int = 0

    def __repr__(self) -> str:
        ended = f"returned {self.returned!r}" if self.ran else "did not run"
        ended = ended if self.error is None else f"raised {self.error!r}"
        what = f"{self.handler} {ended}" if self.handler else "no handler"
        return f"<Run: delivery {self.num_delivered}, {what}: {self.settlement}>"

    def raise_for_error(self) -> Run:
        """Returns itself; raises what the handler raised, with its traceback."""
        if self.error is not None:
            raise self.error
        return self


class Settling:
    """Takes a settlement in the place of the process's settler."""

    settlement: Settlement

    def settle(self, delivery: Delivery, settlement: Settlement, *, handler: str = "") -> None:
        """Keeps it."""
        self.settlement = settlement


def perform(
    handler: Any,
    event: EventLike,
    payload: Any = None,
    *,
    num_delivered: int = 1,
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> Run:
    """Runs a handler for an event, in this thread, as if a bridge had sent it. Needs no server.

    Real are: the JSON on the wire, the choice of the handler, Celery's tracer with its signals,
    upcasters, the payload's type, middleware, ``self.retry()``, ``autoretry_for``, and the inbox
    with its database where the handler has one. The result backend is left alone.

    Args:
        handler: the task that ``@jetstream_handler`` made.
        event: ``{"event_type": …, "payload": …}`` with whatever else ``JetStream.publish`` takes
            (further keys are put into the envelope); or an event type, with the payload beside it;
            or an :class:`~celery_jetstream.Event`; or bytes: the body as it comes.
        payload: the payload, where ``event`` is an event type.
        num_delivered: which delivery it is. With an inbox attempts are counted by its row.
        headers: the message's.
        fields: more of the event: ``event_id="1"``. What has one id is one message, come again.

    Raises:
        AssertionError: events of this type go to another handler.
        EventError: there can be no such event.
        TypeError: it is no handler.
    """
    task = handler if isinstance(handler, JetStreamTask) else None
    if task is None:
        raise TypeError(f"{handler!r} is no handler: give what @jetstream_handler made")
    jetstream = jetstream_in(task.app)
    message = message_to(jetstream, event, payload, headers, fields)
    flight = Flight(_delivery(jetstream, message, num_delivered), message.subject, message.body)
    dispatcher = Dispatcher(jetstream.app, jetstream.config, jetstream.check())
    refused = dispatcher.prepare(flight)
    if refused is not None:
        sequence = flight.delivery.sequence
        return Run(refused, num_delivered=num_delivered, sequence=sequence)
    if flight.task.name != task.name:
        raise AssertionError(
            f"events of type {flight.envelope['event_type']!r} go to {flight.task.name} "
            f"({', '.join(flight.task.event_types)}), not to {task.name} "
            f"({', '.join(task.event_types)})"
        )
    return run_handler(flight, Settling())


def message_to(
    jetstream: JetStream,
    event: EventLike,
    payload: Any = None,
    headers: Mapping[str, str] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Message:
    """The message that the app at the other end would send to this one; see :func:`perform`."""
    config = jetstream.config
    subject, extra = config.consume_subjects[0], validate_headers(headers)
    if isinstance(event, (bytes, bytearray)):
        return Message("", subject, bytes(event), extra)
    if isinstance(event, Event):
        given, extra = {**event.envelope}, {**event.headers, **extra}
    elif isinstance(event, str):
        given = {"event_type": event, "payload": {} if payload is None else payload}
    else:
        given = dict(event)
    given.update(fields or {})
    if "event_type" not in given:
        raise EventError(f"the event {given!r} has no event_type")
    given.setdefault("payload", {})
    known = {name: given[name] for name in _BUILT if given.get(name) is not None}
    built = events.build(**{"producer": config.sources[0].name, **known})
    rest = {name: value for name, value in given.items() if name not in _BUILT}
    envelope = {**built.envelope, **jsontext.plain(rest, "event")}
    extra["Nats-Msg-Id"] = built.event_id
    return Message(built.event_id, subject, jsontext.write(envelope), extra)


_BUILT = frozenset(envelopes.FIELDS)


def _delivery(jetstream: JetStream, message: Message, num_delivered: int) -> Delivery:
    """One event is one message, however often it is performed."""
    spec = consumer_specs(jetstream.config)[0]
    digest = blake2b(message.event_id.encode() or message.body, digest_size=7).digest()
    sequence = int.from_bytes(digest, "big")
    numbers = f"{num_delivered}.{sequence}.{sequence}.{time.time_ns()}.0"
    reply = f"$JS.ACK.{spec.stream}.{spec.durable}.{numbers}"
    return Delivery.from_reply(reply, message.headers)


def run_handler(flight: Flight, settling: Settling) -> Run:
    """Runs the handler of a prepared flight as a worker's pool would; any exception is a result."""
    task, delivery = flight.task, flight.delivery
    app, task_id = task.app, delivery.task_id
    made = TaskMessages(app, "celery_jetstream.testing").make(flight)
    args, kwargs, embed = _sent(made.body, flight.options.get("serializer"), app)
    request = {
        **made.headers,
        **embed,
        HEADER: json.loads(json.dumps(header_of(flight))),
        "jetstream_settler": settling,
        "delivery_info": {},
        "correlation_id": task_id,
        "ignore_result": True,
        "is_eager": False,
    }
    tracer = build_tracer(task.name, task, app=app, eager=True)  # no result, no worker's cleanup
    with _watching(task_id) as seen:
        tracer(task_id, args, kwargs, request)
    error = seen["retval"] if isinstance(seen["retval"], BaseException) else None
    return Run(
        settling.settlement,
        None if error is not None else seen["retval"],
        error,
        str(task.name),
        not (seen["refused"] or isinstance(error, PayloadError)),
        delivery.num_delivered,
        delivery.sequence,
    )


def _sent(body: Any, serializer: str | None, app: Any) -> Any:
    """The body of a task message as the worker reads it."""
    content_type, encoding, data = dumps(body, serializer=serializer or app.conf.task_serializer)
    return loads(data, content_type, encoding, accept={content_type})


@contextlib.contextmanager
def _watching(task_id: str) -> Iterator[dict[str, Any]]:
    seen: dict[str, Any] = {}

    def note(
        sender: Any = None, task_id: Any = None, retval: Any = None, state: Any = None, **_: Any
    ) -> None:
        if task_id == watched and state is not None:
            refused = getattr(sender.request, "jetstream_refused", False)
            seen.update(retval=retval, refused=refused)

    watched = task_id
    signals.task_postrun.connect(note, weak=False)
    try:
        yield seen
    finally:
        signals.task_postrun.disconnect(note)
