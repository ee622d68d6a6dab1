"""Celery's side of the bridge: a message becomes a task message in the broker.

Decodes, finds the handler and its queue, and sends. Blocks as the broker does; the bridge gives
it a thread of its own, and no other thread uses it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from celery import Celery
from celery.app.amqp import task_message
from kombu.exceptions import OperationalError

from .config import Config
from .handlers import EVENT_ID, EVENT_TYPE, HEADER, LEASE, Handlers
from .headers import TRACE_CONTEXT
from .inflight import Flight
from .settlement import DeadLetter, Nak, Settlement

__all__ = ("Dispatcher", "TaskMessages", "depth", "header_of", "queue_of")

logger = logging.getLogger(__name__)

#: The options of a task that say how its message is sent.
ROUTING_OPTIONS = (
    "queue",
    "exchange",
    "routing_key",
    "priority",
    "serializer",
    "compression",
    "delivery_mode",
)
#: What a route may hold and a copy must not: its expiry is the lease, its retries are JetStream's.
NOT_FOR_COPIES = frozenset(
    {
        "countdown",
        "eta",
        "expires",
        "headers",
        "ignore_result",
        "retry",
        "retry_policy",
        "soft_time_limit",
        "task_id",
        "time_limit",
    }
)


class Dispatcher:
    """Sends flights to the Celery broker.

    Attributes:
        broker_errors: what the broker's client raises when the broker is away.
    """

    #: What is entered, given the message's headers, while its copy is sent.
    around: ClassVar[Any] = staticmethod(contextlib.nullcontext)

    def __init__(self, app: Celery, config: Config, handlers: Handlers) -> None:
        self._app = app
        self._config = config
        self._handlers = handlers
        self._messages = TaskMessages(app, "celery_jetstream.bridge")
        self._producer: Any = None
        self._declared: set[str] = set()
        self._fixed_routes: dict[str, dict[str, Any]] = {}
        connection = app.connection_for_write()
        self.connection_errors: tuple[type[BaseException], ...] = (
            OperationalError,
            OSError,
            *connection.connection_errors,
        )
        self.broker_errors = (*self.connection_errors, *connection.channel_errors)

    def prepare(self, flight: Flight) -> Settlement | None:
        """Decides what a message is sent as; None when it can be sent.

        Returns:
            The dead letter of a message that can never begin: not JSON, not an envelope, no
            handler, or its last attempt never ended. A ``Nak`` where the app's own router failed.
        """
        if flight.task is None:
            refused = flight.identify(self._handlers.find)
            if refused is not None:
                return refused
        if flight.task.policy(self._config).spent(flight.unended):
            text = f"handed over {flight.unended} times, and none of its attempts ended"
            return DeadLetter("max_deliveries_exceeded", "", text, flight.task.name)
        try:
            flight.options = self._route(flight)
        except Exception:
            logger.exception(
                "no route for %s; the message comes again",
                flight.task.name,
                extra=flight.log_fields,
            )
            return Nak(self._config.backoff[-1])
        if not flight.admitted:  # else its place is counted under the queue it has
            flight.queue = _queue_name(flight.options)
        return None

    def send(self, flights: Sequence[Flight]) -> None:
        """Sends copies, in one batch where the transport can (kombu >= 5.7, Redis).

        Raises:
            Exception: one of ``broker_errors``. Some copies may have been sent all the same.
        """
        if self._producer is None:
            self._producer = self._app.amqp.Producer(
                self._app.connection_for_write(), auto_declare=False
            )
        lease_ends = time.time() + self._config.lease
        try:
            with _batch(self._producer, len(flights)):
                for flight in flights:
                    with self.around(flight.delivery.headers):
                        self._send_one(flight, lease_ends if flight.expires else None)
        except BaseException:
            self.close()
            raise

    def ping(self) -> None:
        """Asks the broker whether it is there, on a connection of its own; may block.

        Raises:
            Exception: one of ``broker_errors``.
        """
        with self._app.connection_for_write() as connection, connection.channel():
            pass

    def depth(self, queue: str) -> int:
        """As :func:`depth`."""
        return depth(self._app, queue)

    def close(self) -> None:
        """Drops the broker connection; does not wait for the broker."""
        producer, self._producer = self._producer, None
        self._declared.clear()
        if producer is not None:
            with contextlib.suppress(Exception):
                producer.connection.collect()

    def _send_one(self, flight: Flight, lease_ends: float | None) -> None:
        self._app.amqp.send_task_message(
            self._producer,
            flight.task.name,
            self._messages.make(flight),
            headers={HEADER: {**header_of(flight), LEASE: lease_ends}},
            retry=False,
            declare=self._to_declare(flight),
            **flight.options,
        )

    def _to_declare(self, flight: Flight) -> tuple[()] | None:
        """Nothing, for a queue that this connection has declared: kombu asks anew each time."""
        if flight.queue in self._declared:
            return ()
        if getattr(flight.options.get("queue"), "can_cache_declaration", False):
            self._declared.add(flight.queue)
        return None

    def _route(self, flight: Flight) -> dict[str, Any]:
        """Where Celery would send this task: its own options, ``task_routes``, the default."""
        task = flight.task
        if task.name in self._fixed_routes:
            return self._fixed_routes[task.name]
        route = _route_of(self._app, task, flight.envelope)
        if not self._app.amqp.router.routes:  # then it depends on the task alone
            self._fixed_routes[task.name] = route
        return route


class TaskMessages:
    """Celery's own messages for tasks: headers, properties and body, not serialized.

    Celery is asked once for each task: what it writes for the next event differs in few places.

    Args:
        app: the Celery app.
        origin: who sends them.
    """

    def __init__(self, app: Celery, origin: str) -> None:
        self._app = app
        self._origin = origin
        self._templates: dict[str, tuple[str, task_message]] = {}

    def make(self, flight: Flight) -> task_message:
        """The message that has a worker run this event's handler."""
        task, delivery = flight.task, flight.delivery
        if task.name not in self._templates:
            self._templates[task.name] = delivery.task_id, self._first(flight)
        written_id, written = self._templates[task.name]
        headers = _with_id(written.headers, written_id, delivery.task_id)
        for name in TRACE_CONTEXT:
            if text := delivery.headers.get(name):
                headers[name] = text
        headers["argsrepr"] = f"({flight.envelope.get('event_type')!r},)"
        headers["retries"] = delivery.num_delivered - 1
        event = written.sent_event and {
            **_with_id(written.sent_event, written_id, delivery.task_id),
            "args": headers["argsrepr"],
            "retries": headers["retries"],
        }
        properties = _with_id(written.properties, written_id, delivery.task_id)
        return task_message(headers, properties, ((flight.envelope,), {}, written.body[2]), event)

    def _first(self, flight: Flight) -> task_message:
        task = flight.task
        return self._app.amqp.as_task_v2(  # whatever task_protocol says: workers read both
            flight.delivery.task_id,
            task.name,
            (flight.envelope,),
            {},
            ignore_result=task.ignore_result,
            time_limit=task.time_limit,
            soft_time_limit=task.soft_time_limit,
            create_sent_event=self._app.conf.task_send_sent_event,
            argsrepr="",
            kwargsrepr="{}",
            origin=self._origin,
        )


def _with_id(values: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {name: new if value == old else value for name, value in values.items()}


def header_of(flight: Flight) -> dict[str, Any]:
    """The ``jetstream`` header of its task message."""
    return {
        **flight.delivery.to_header(),
        EVENT_ID: flight.event_id,
        EVENT_TYPE: flight.envelope.get("event_type"),
    }


def depth(app: Celery, queue: str) -> int:
    """Messages in a queue; 1 where the transport cannot say.

    Raises:
        Exception: what the broker's client raises.
    """
    with app.connection_for_write() as connection, connection.channel() as channel:
        try:
            return int(channel.queue_declare(queue=queue, passive=True).message_count)
        except connection.channel_errors as error:
            # Redis has no key for an empty list, and kombu answers 404 (NOT_FOUND)
            return 0 if getattr(error, "code", None) == 404 or "404" in str(error) else 1
        except NotImplementedError:
            return 1


def queue_of(app: Celery, task: Any) -> str:
    """The queue that a handler's events go to; "" where that is not known before they come."""
    return _queue_name(_route_of(app, task, {}))


def _route_of(app: Celery, task: Any, envelope: Any) -> dict[str, Any]:
    """By the task's own options, ``task_routes``, the default."""
    own = {name: getattr(task, name, None) for name in ROUTING_OPTIONS}
    given = {name: value for name, value in own.items() if value is not None}
    routed = app.amqp.router.route(given, task.name, (envelope,), {}, task)
    return {name: value for name, value in routed.items() if name not in NOT_FOR_COPIES}


def _queue_name(options: dict[str, Any]) -> str:
    """The queue's name; "" where an exchange of the task's own decides, for then none is known."""
    queue: Any = options.get("queue")
    if queue is None or isinstance(queue, str):
        return queue or ""
    exchange, key = options.get("exchange"), options.get("routing_key")
    elsewhere = (exchange and exchange != queue.exchange.name) or (
        key and key not in (queue.routing_key, queue.name)
    )
    return "" if elsewhere else str(queue.name)


def _batch(producer: Any, size: int) -> AbstractContextManager[Any]:
    batch = getattr(producer, "batch", None)
    return contextlib.nullcontext() if batch is None else batch(max_size=size)
