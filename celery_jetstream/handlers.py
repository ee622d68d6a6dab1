"""Handlers: the Celery tasks that receive events.

:func:`jetstream_handler` makes one, with ``shared_task`` semantics; :class:`JetStreamTask` turns
the envelope into an :class:`~celery_jetstream.events.Event`, runs the middleware and the inbox
around the handler, and makes ``retry()`` a redelivery by JetStream. How a task ended is settled in
:mod:`celery_jetstream.ends`.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import cached_property, lru_cache, partial
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from celery import Celery, Task
from celery._state import _get_active_apps, connect_on_app_finalize, get_current_app
from celery.exceptions import Retry
from celery.local import Proxy

from . import signals, subjects
from .config import Config
from .delivery import Delivery
from .events import Event
from .exceptions import ConfigurationError, OutageError
from .payloads import PayloadType, payload_type
from .settlement import HAND_BACKS, HAND_BACKS_WITH_INBOX, Ack, DeadLetter, Nak, Policy
from .upcasts import upcasted

if TYPE_CHECKING:
    from .inbox_rows import Entry

__all__ = ("HEADER", "Handlers", "JetStreamTask", "delivery_of", "jetstream_handler")

logger = logging.getLogger(__name__)

#: The task message's header that says which delivery a copy carries.
HEADER = "jetstream"
#: In that header: when the copy's lease ends, by the bridge's clock (seconds since 1970). Celery's
#: own ``expires`` would cost the worker's main process more to read than all else of ours.
LEASE = "lease_ends"
#: In that header, without a lease: no broker has the copy (direct mode).
DIRECT = "direct"
#: What a task returns whose settlement is given, and no Ack: the worker's main process, which sees
#: only the result's text, must not take it for one.
SETTLED = "settled otherwise"
#: In that header: what the inbox needs of the event.
EVENT_ID, EVENT_TYPE = "event_id", "event_type"
#: The parameter of a handler that is to run in the transaction of its inbox row.
SESSION = "session"
#: Characters of a handler's key in the inbox.
KEY_LENGTH = 255

F = TypeVar("F", bound=Callable[..., Any])


def jetstream_handler(*event_types: str, **options: Any) -> Callable[[F], Any]:
    """Makes a function the handler of the events whose type matches one of the patterns.

    ``shared_task`` semantics: it may be used before there is an app, in reusable packages, and
    the task appears in every app, on top of that app's ``task_cls``. The function gets the
    :class:`~celery_jetstream.events.Event` (after ``self`` with ``bind=True``), and where it has a
    parameter ``session`` and an inbox, a session of SQLAlchemy's: what it writes there, the inbox
    row, and events that it adds to the outbox commit together when it returns.

    Args:
        event_types: NATS patterns over the event type: ``user.created``, ``user.*``,
            ``order.>``. The most specific pattern wins.
        options: any option of a Celery task (``queue``, ``autoretry_for``, ``max_retries``,
            ``time_limit``, ``rate_limit``, ``bind``, ``name``, …), and

            * ``unrecoverable_errors``: replaces ``jetstream_unrecoverable_errors`` here;
            * ``inbox``: handle each event once; default ``jetstream_use_inbox``;
            * ``inbox_key``: what the inbox calls this handler; default the task's name. Keep it
              where the task is renamed;
            * ``payload``: a pydantic model, a dataclass, a TypedDict or a msgspec Struct:
              ``event.payload`` is one, and an event whose payload does not fit is a dead letter.

    Raises:
        SubjectError: a pattern is not legal.
        ConfigurationError: no pattern, ``payload`` of another kind, or ``acks_late=True``
            (JetStream redelivers; the Celery broker must not).
    """
    if not event_types or not all(isinstance(pattern, str) for pattern in event_types):
        raise ConfigurationError(
            "jetstream_handler needs at least one event-type pattern, as in "
            '@jetstream_handler("user.created")'
        )
    for pattern in event_types:
        subjects.validate_pattern(pattern)
    if options.get("acks_late"):
        raise ConfigurationError(
            "acks_late=True on a handler: JetStream redelivers what a worker did not finish, so "
            "the Celery broker must not do it too; leave acks_late out",
            setting="acks_late",
        )
    if "payload" in options:
        options["payload_type"] = payload_type(options.pop("payload"))
    options.update(
        acks_late=False,
        retry_on_worker_lost=False,
        event_types=tuple(event_types),
    )

    def decorate(function: F) -> Any:
        with_session = SESSION in inspect.signature(function).parameters
        # Celery would miss it in .delay(envelope)
        return _shared(function, {"typing": False, **options} if with_session else options)

    return decorate


def _shared(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    """As ``celery.shared_task``, but on top of each app's own task class."""

    def register(app: Celery) -> Any:
        return app.task(
            **{
                **options,
                "base": _task_class(options.get("base") or app.Task),
                "shared": False,
                "lazy": False,
            }
        )(function)

    connect_on_app_finalize(register)
    for app in _get_active_apps():
        if app.finalized:
            register(app)

    def current() -> Any:
        app = get_current_app()
        name = options.get("name") or app.gen_task_name(function.__name__, function.__module__)
        return app.tasks[name]

    return Proxy(current)


@lru_cache
def _task_class(base: type[Task]) -> type[Task]:
    """``JetStreamTask`` on top of an app's own task class (Django's, say)."""
    if issubclass(base, JetStreamTask):
        return base
    return cast("type[Task]", type("JetStreamTask", (JetStreamTask, base), {"abstract": True}))


class JetStreamTask(Task):
    """A Celery task that receives events.

    Called with an envelope (a dict) or an :class:`Event`, by a bridge, by ``.delay(envelope)``,
    ``.apply(…)`` or directly; only a copy sent by a bridge has a delivery and is settled.

    Attributes:
        event_types: the patterns it handles.
        unrecoverable_errors: this handler's, or None for the app's.
        inbox: whether it handles each event once, or None for the app's setting.
        inbox_key: what the inbox calls it; "" for the task's name.
        payload_type: how payloads are read; None as they come.
    """

    abstract = True
    Request = "celery_jetstream.request:JetStreamRequest"
    event_types: tuple[str, ...] = ()
    retry_kwargs: Mapping[str, Any] = {}
    unrecoverable_errors: tuple[type[BaseException], ...] | None = None
    inbox: bool | None = None
    inbox_key: str = ""
    payload_type: PayloadType | None = None

    def __call__(self, event: Any, *args: Any, **kwargs: Any) -> Any:
        event = self.event(event)
        if self.request.called_directly:
            return super().__call__(event, *args, **kwargs)
        call = partial(self._run, args, kwargs)
        jetstream = getattr(self.app, "jetstream", None)
        for middleware in reversed(jetstream.middleware if jetstream else ()):
            call = partial(_through, middleware, call)
        if delivery_of(self.request):
            call = partial(self._announced, call)
        try:
            result = call(event)
        except Exception as error:
            self._raise_outage(error)
            raise
        if isinstance(result, (Ack, Nak, DeadLetter)) and delivery_of(self.request):
            self.request.jetstream_settlement = result
            return None if isinstance(result, Ack) else SETTLED
        return result

    def _announced(self, call: Callable[[Event], Any], event: Event) -> Any:
        """Tells of an attempt of a message's."""
        delivery, start = delivery_of(self.request), time.perf_counter()
        error: BaseException | None = None
        signals.handler_started.send(sender=self, event=event, delivery=delivery)
        try:
            return call(event)
        except BaseException as raised:
            error = raised
            raise
        finally:
            signals.handler_ended.send(
                sender=self,
                event=event,
                delivery=delivery,
                seconds=time.perf_counter() - start,
                error=error,
            )

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], event: Event) -> Any:
        call = super().__call__  # the app's task_cls, or base=, may have one (Flask's does)
        if getattr(call, "__func__", None) is Task.__call__:
            call = self.run
        handle = partial(self._handle, call, event, *args, **kwargs)
        return self._by_inbox(handle, SESSION in kwargs) if self.has_inbox else handle()

    def _raise_outage(self, error: Exception) -> None:
        """In direct mode the message of an attempt that met an outage waits in the worker."""
        if not is_direct(getattr(self.request, HEADER, None)):
            return
        jetstream = self.app.jetstream
        inbox = jetstream.inbox if self.has_inbox else None
        pauses = inbox is not None and inbox.is_outage(error) and not inbox.is_lost_conflict(error)
        if pauses or isinstance(error, jetstream.config.outage_errors):
            raise OutageError(f"{type(error).__name__}: {error}", pauses) from error

    def _handle(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        retry = getattr(self.request, "jetstream_retry", None)
        if retry is not None:  # self.retry(throw=False)
            raise retry
        return result

    def _by_inbox(self, handle: Callable[..., Any], has_session: bool) -> Any:
        """Runs the handler where the inbox has it still to be done; else a settlement."""
        delivery, inbox = delivery_of(self.request), self.app.jetstream.inbox
        within = self.wants_session and not has_session
        if delivery is None:
            return inbox.bare(lambda session: handle(session=session)) if within else handle()
        entry = self.entry(delivery, getattr(self.request, HEADER))
        self.request.jetstream_refused = True
        if within:
            result = inbox.run_within(entry, lambda session: handle(session=session), self._begun)
        else:
            result = inbox.run_around(entry, handle, self._begun)
        return result

    def _begun(self, failures: int) -> None:
        """With an inbox, attempts are counted by its row."""
        self.request.jetstream_refused = False
        self.request.jetstream_attempt = failures + 1
        self.request.retries = failures

    @cached_property
    def wants_session(self) -> bool:
        """Whether it is to run in the transaction of its inbox row."""
        return SESSION in inspect.signature(self.run).parameters

    @property
    def needs_session(self) -> bool:
        """Whether it cannot run without."""
        session = inspect.signature(self.run).parameters.get(SESSION)
        return session is not None and session.default is session.empty

    @property
    def has_inbox(self) -> bool:
        """Whether it handles each event once."""
        if self.inbox is not None:
            return self.inbox
        jetstream = getattr(self.app, "jetstream", None)
        return bool(jetstream is not None and jetstream.config.use_inbox)

    @property
    def handler_key(self) -> str:
        """What the inbox calls it."""
        return self.inbox_key or str(self.name)

    def entry(self, delivery: Delivery, header: Any) -> Entry:
        """A hand-over as the inbox has it; ``header`` is the copy's, which names the event."""
        from .inbox_rows import Entry

        known = header if isinstance(header, Mapping) else {}
        event_id, event_type = known.get(EVENT_ID), known.get(EVENT_TYPE)
        return Entry(str(event_id or ""), self.handler_key, str(event_type or ""), delivery)

    def event(self, argument: Any) -> Event:
        """The event that the task's first argument stands for, in its newest version, typed.

        An :class:`Event` is taken as it is.

        Raises:
            DecodeError: it is no envelope.
            PayloadError: its payload does not fit, or an upcaster failed.
        """
        if isinstance(argument, Event):
            return argument
        delivery = delivery_of(self.request)
        event = upcasted(
            Event.from_envelope(
                argument, headers=delivery.headers if delivery else None, delivery=delivery
            )
        )
        if self.payload_type is None:
            return event
        return dataclasses.replace(event, payload=self.payload_type.read(event.payload))

    def retry(
        self,
        args: Any = None,
        kwargs: Any = None,
        exc: Exception | None = None,
        throw: bool = True,
        eta: datetime | None = None,
        countdown: float | None = None,
        max_retries: int | None = None,
        **options: Any,
    ) -> Any:
        """Has JetStream deliver the message again; nothing is sent to the Celery broker.

        Without a delivery (``.delay()``, ``.apply()``) this is Celery's own ``retry``.

        Args:
            args: not for a message, which comes again as it is.
            kwargs: not for a message either.
            exc: what to raise when no attempt is left.
            throw: False returns the ``Retry``, raised when the task returns.
            eta: when it is to come again.
            countdown: or in how many seconds; default the ``jetstream_backoff``.
            max_retries: lowers the handler's limit for this call. To raise it, give the handler
                ``max_retries`` (the bridge must know it).
            options: not for a message.

        Raises:
            celery.exceptions.Retry: always, with an attempt left and ``throw``.
            celery.exceptions.MaxRetriesExceededError: none left, and no ``exc``.
            TypeError: ``args``, ``kwargs`` or options with a message.
        """
        request = self.request
        delivery = delivery_of(request)
        if delivery is None:
            options.update(eta=eta, countdown=countdown, max_retries=max_retries)
            return super().retry(args, kwargs, exc, throw, **options)
        if args is not None or kwargs is not None or options:
            raise TypeError(
                "a JetStream message comes again as it is: retry() takes countdown, eta, exc, "
                "max_retries and throw here, nothing else"
            )
        policy = self.policy(self.app.jetstream.config)
        if exc is not None and self.has_inbox and self.app.jetstream.inbox.is_outage(exc):
            raise exc  # no attempt, and never the last
        attempt = getattr(request, "jetstream_attempt", delivery.num_delivered)
        if not policy.left(attempt) or (max_retries is not None and attempt > max_retries):
            request.jetstream_exhausted = True
            raise exc or self.MaxRetriesExceededError(
                f"Can't retry {self.name}[{request.id}] any more after attempt {attempt}"
            )
        when = eta if eta is not None else countdown
        retry = Retry(exc=exc, when=policy.delay(attempt) if when is None else when)
        if throw:
            raise retry
        request.jetstream_retry = retry
        return retry

    @cached_property
    def _attempts(self) -> int | EllipsisType | None:
        """``max_retries + 1`` where it was given: by an option, ``base=`` or annotations."""
        classes = [c for c in type(self).__mro__ if c.__module__ != "celery.app.task"]
        retries: Any = ...
        if "max_retries" in self.retry_kwargs:
            retries = self.retry_kwargs["max_retries"]
        elif any("max_retries" in vars(c) for c in classes):
            retries = self.max_retries
        return retries + 1 if isinstance(retries, int) else retries

    def policy(self, config: Config) -> Policy:
        """What this handler's messages are settled by."""
        attempts = self._attempts
        unrecoverable = self.unrecoverable_errors
        return Policy(
            limit=config.max_deliver if attempts is ... else attempts,
            backoff=config.backoff,
            ack_wait=config.ack_wait,
            unrecoverable=(
                config.unrecoverable_errors if unrecoverable is None else tuple(unrecoverable)
            ),
            outages=config.outage_errors,
            handler=self.name,
            hand_backs=HAND_BACKS_WITH_INBOX if self.has_inbox else HAND_BACKS,
        )


def _through(
    middleware: Callable[[Event, Callable[[Event], Any]], Any],
    call: Callable[[Event], Any],
    event: Event,
) -> Any:
    return middleware(event, call)


def delivery_of(request: Any) -> Delivery | None:
    """The delivery that a task request carries; None for a task that no bridge sent."""
    known: Delivery | None = getattr(request, "jetstream_delivery", None)
    if known is None:
        header = getattr(request, HEADER, None)
        if header is not None:
            known = request.jetstream_delivery = read_header(header)
    return known


def is_direct(header: Any) -> bool:
    """Whether a ``jetstream`` header is of a message that the worker itself took."""
    return isinstance(header, Mapping) and bool(header.get(DIRECT))


def read_header(header: Any) -> Delivery | None:
    """The delivery in a task message's ``jetstream`` header; None where there is none in it."""
    try:
        return Delivery.from_header(header) if isinstance(header, Mapping) else None
    except ValueError as error:
        logger.error("a task message has a %r header that no bridge wrote: %s", HEADER, error)
        return None


# -- finding the handler of an event -------------------------------------------------------------


class Handlers:
    """Which task handles which event type. Celery's task registry is the registry.

    Raises:
        ConfigurationError: two handlers have the same pattern, or inbox key (names both), or one
            takes a session and has no inbox.
    """

    def __init__(self, tasks: Iterable[Any]) -> None:
        self._by_pattern: dict[str, JetStreamTask] = {}
        self._by_key: dict[str, JetStreamTask] = {}
        for task in tasks:
            if isinstance(task, JetStreamTask):
                self._check_inbox(task)
                if task.payload_type is not None:
                    task.payload_type.schema()  # a field that cannot be read is said at start
                for pattern in task.event_types:
                    self._add(pattern, task)
        self._patterns = sorted(self._by_pattern, key=subjects.specificity)
        self._find = lru_cache(maxsize=4096)(self._look_up)

    def _add(self, pattern: str, task: JetStreamTask) -> None:
        if task.acks_late:
            raise ConfigurationError(
                f"acks_late is on for the handler {task.name} (task_annotations, or its base): "
                "JetStream redelivers what a worker did not finish; turn it off there",
                setting="acks_late",
            )
        other = self._by_pattern.setdefault(pattern, task)
        if other is not task:
            raise ConfigurationError(
                f"two handlers for the event type {pattern!r}: {other.name} and {task.name}; "
                "give one of them another pattern"
            )

    def _check_inbox(self, task: JetStreamTask) -> None:
        if not task.has_inbox:
            if task.needs_session:
                raise ConfigurationError(
                    f"the handler {task.name} takes a session, which the inbox gives: add "
                    "inbox=True, or set jetstream_use_inbox",
                    setting="jetstream_use_inbox",
                )
            return
        if len(task.handler_key) > KEY_LENGTH:
            raise ConfigurationError(
                f"inbox_key of the handler {task.name} has {len(task.handler_key)} characters; "
                f"give it one of {KEY_LENGTH} at most",
                setting="inbox_key",
            )
        other = self._by_key.setdefault(task.handler_key, task)
        if other is not task:
            raise ConfigurationError(
                f"two handlers with the inbox_key {task.handler_key!r}: {other.name} and "
                f"{task.name}; each would pass over what the other has handled",
                setting="inbox_key",
            )

    @property
    def with_inbox(self) -> list[JetStreamTask]:
        """The handlers that handle each event once."""
        return list(self._by_key.values())

    @property
    def tasks(self) -> list[JetStreamTask]:
        """The handlers, by name."""
        return sorted({*self._by_pattern.values()}, key=lambda task: str(task.name))

    def __bool__(self) -> bool:
        return bool(self._by_pattern)

    def items(self) -> list[tuple[str, JetStreamTask]]:
        """``(pattern, task)``, the most specific first."""
        return [(pattern, self._by_pattern[pattern]) for pattern in self._patterns]

    def find(self, event_type: str) -> JetStreamTask | None:
        """The handler with the most specific matching pattern; None where there is none."""
        return self._find(event_type)

    def _look_up(self, event_type: str) -> JetStreamTask | None:
        for pattern in self._patterns:
            if subjects.matches(pattern, event_type):
                return self._by_pattern[pattern]
        return None
