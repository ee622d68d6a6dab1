"""Traces: one from the request that an event came from, through the outbox, to its handlers.

``JetStreamInstrumentor().instrument()``, or ``opentelemetry-instrument celery …``, which finds it.
Each event gets a span ``create``, whose context goes with it (as a header, also in the outbox's
row). Its children are ``publish`` (by whoever sends it, a flusher too), ``process`` for each
attempt of its handler, and ``dead_letter``. Where ``opentelemetry-instrumentation-celery`` is
active, its ``run/…`` stands for ``process`` and has its attributes.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from celery import current_task
from celery import signals as celery_signals
from celery.exceptions import Ignore, Reject, Retry
from opentelemetry import context as contexts
from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from .. import __version__, signals  # ends: its receivers are to be connected before ours
from ..dispatcher import Dispatcher
from ..settlement import Ack, DeadLetter, Settlement

__all__ = ("JetStreamInstrumentor",)

#: On a task's request: the span of its attempt, and what takes it off the context again.
ATTEMPT = "jetstream_span"

Attributes = dict[str, Any]


class JetStreamInstrumentor:
    """Has events traced; one per process, however often it is made. Fork-safe.

    As those of opentelemetry-instrumentation, which is not needed. With no SDK nothing is traced,
    and nothing is added to messages.
    """

    _tracer: trace.Tracer | None = None
    _provider: trace.TracerProvider | None = None
    _celerys: Any = None
    _follows = False

    def instrumentation_dependencies(self) -> Collection[str]:
        """What must be installed: nothing that is not."""
        return ()

    @property
    def is_instrumented_by_opentelemetry(self) -> bool:
        """Whether it is active."""
        return JetStreamInstrumentor._tracer is not None

    def instrument(self, *, tracer_provider: trace.TracerProvider | None = None, **_: Any) -> None:
        """Begins; harmless to repeat.

        Args:
            tracer_provider: default the global one, also where that is set later.
        """
        if self.is_instrumented_by_opentelemetry:
            return
        JetStreamInstrumentor._provider = tracer_provider
        JetStreamInstrumentor._celerys = _celerys_own()
        JetStreamInstrumentor._tracer = trace.get_tracer(
            "celery_jetstream", __version__, tracer_provider
        )
        for signal, receiver in _RECEIVERS:
            signal.connect(receiver, weak=False)
        Dispatcher.around = staticmethod(_within)

    def uninstrument(self, **_: Any) -> None:
        """Ends it."""
        for signal, receiver in (*_RECEIVERS, *_OF_ATTEMPTS):
            signal.disconnect(receiver)
        JetStreamInstrumentor._follows = False
        Dispatcher.around = staticmethod(contextlib.nullcontext)
        JetStreamInstrumentor._tracer = None


def _is_traced() -> bool:
    """Whether there is an SDK: without one all of this would cost, and come to nothing."""
    provider = JetStreamInstrumentor._provider or trace.get_tracer_provider()
    return not isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider))


def _start(name: str, kind: SpanKind, attributes: Attributes, **options: Any) -> Span:
    tracer = JetStreamInstrumentor._tracer or trace.NoOpTracer()
    known = {name: value for name, value in attributes.items() if value not in (None, "")}
    return tracer.start_span(
        name, kind=kind, attributes={"messaging.system": "nats", **known}, **options
    )


# -- an event is made, and its context goes with it --------------------------------------------


def _create(event: Any, subject: str, headers: dict[str, str], **_: Any) -> None:
    """Headers that a producer has set stay as they are."""
    given = {name.lower() for name in headers}
    if "traceparent" in given or not _is_traced():
        return
    span = _start(
        f"create {subject}", SpanKind.PRODUCER, _of_event("create", event.event_id, subject, event)
    )
    carrier: dict[str, str] = {}
    propagate.inject(carrier, trace.set_span_in_context(span))
    span.end()
    headers.update({name: text for name, text in carrier.items() if name.lower() not in given})


def _published(
    event: Any, result: Any, headers: Mapping[str, str], seconds: float, **_: Any
) -> None:
    if _is_traced():
        _publish(result, headers, seconds, event)


def _outbox_published(
    rows: Sequence[Any], results: Sequence[Any], seconds: float, **_: Any
) -> None:
    for row, result in zip(rows, results, strict=True) if _is_traced() else ():
        if "traceparent" in row.headers.lower():  # a text; else there is no trace to go on with
            _publish(result, json.loads(row.headers), seconds)


def _publish(result: Any, headers: Mapping[str, str], seconds: float, event: Any = None) -> None:
    """A span that has been, below the event's own: ``CLIENT``, for that is the producer."""
    end = time.time_ns()
    span = _start(
        f"publish {result.subject}",
        SpanKind.CLIENT,
        _of_event("send", result.event_id, result.subject, event),
        context=_context(headers),
        start_time=end - int(seconds * 1e9),
    )
    if not result.success:
        span.set_attribute("error.type", result.verdict.value)
        span.set_status(Status(StatusCode.ERROR, result.error))
    span.end(end)


def _of_event(operation: str, event_id: str, subject: str, event: Any) -> Attributes:
    return {
        "messaging.operation.type": operation,
        "messaging.operation.name": "publish" if operation == "send" else operation,
        "messaging.destination.name": subject,
        "messaging.message.id": event_id,
        "celery_jetstream.event_type": None if event is None else event.event_type,
    }


# -- the bridge sends copies ----------------------------------------------------------------------


@contextlib.contextmanager
def _within(headers: Mapping[str, str]) -> Iterator[None]:
    """Celery's own instrumentation makes a span for each copy: it is to be one of the event's."""
    if not _is_traced():
        yield
        return
    token = contexts.attach(_context(headers))
    try:
        yield
    finally:
        contexts.detach(token)


# -- a handler runs -------------------------------------------------------------------------------


def _handler_started(sender: Any, event: Any, delivery: Any, **_: Any) -> None:
    if not _is_traced():
        return
    _follow_attempts()
    attributes = {
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.destination.name": delivery.stream,
        "messaging.consumer.group.name": delivery.consumer,
        "messaging.message.id": event.event_id,
        "celery_jetstream.event_id": event.event_id,  # Celery's instrumentation has the task's id
        "celery_jetstream.event_type": event.event_type,
        "celery_jetstream.handler": sender.name,
        "celery_jetstream.stream_sequence": delivery.sequence,
        "celery_jetstream.num_delivered": delivery.num_delivered,
    }
    celerys = JetStreamInstrumentor._celerys
    if celerys is not None and celerys.is_instrumented_by_opentelemetry:
        span = trace.get_current_span()
        span.set_attributes({"messaging.system": "nats", **attributes})
        setattr(sender.request, ATTEMPT, (span, None))
        return
    context = _context(delivery.headers)
    span = _start(f"process {sender.name}", SpanKind.CONSUMER, attributes, context=context)
    token = contexts.attach(trace.set_span_in_context(span, context))
    setattr(sender.request, ATTEMPT, (span, token))


def _follow_attempts() -> None:
    """From the first that is traced on: where none is, the receivers would only cost."""
    if not JetStreamInstrumentor._follows:
        JetStreamInstrumentor._follows = True
        for signal, receiver in _OF_ATTEMPTS:
            signal.connect(receiver, weak=False)


def _handler_ended(sender: Any, error: BaseException | None, **_: Any) -> None:
    span, token = _attempt(sender.request)
    if token is None:
        return  # Celery's own has its errors
    contexts.detach(token)
    cause: Any = error
    if isinstance(error, Retry):
        cause = error.exc
    elif isinstance(error, Ignore) or (isinstance(error, Reject) and error.requeue):
        cause = None
    if isinstance(cause, BaseException):
        span.record_exception(cause)
        span.set_attribute("error.type", type(cause).__qualname__)
        span.set_status(Status(StatusCode.ERROR, f"{type(cause).__name__}: {cause}"))


def _settled(delivery: Any, settlement: Settlement, **_: Any) -> None:
    """While the task's request is still the current one, if it is this message's at all."""
    request: Any = current_task.request if current_task else None
    span, _token = _attempt(request)
    if span is None or request.id != delivery.task_id or not span.is_recording():
        return
    outcome = "ack" if isinstance(settlement, Ack) else "nak"
    if isinstance(settlement, DeadLetter):
        outcome = "dead_letter"
        span.set_attribute("celery_jetstream.reason", settlement.reason)
        span.set_status(Status(StatusCode.ERROR, f"dead letter: {settlement.reason}"))
    span.set_attribute("celery_jetstream.outcome", outcome)


def _task_ended(sender: Any = None, **_: Any) -> None:
    """After its settlement, which ``ends`` has decided by then."""
    request = getattr(sender, "request", None)
    span, token = _attempt(request)
    if span is not None:
        delattr(request, ATTEMPT)
        if token is not None:
            span.end()


def _dead_lettered(
    delivery: Any, reason: str, headers: Mapping[str, str], handler: str, **_: Any
) -> None:
    if not _is_traced():
        return
    found = json.loads(headers.get("x-dlq-context", "{}"))
    span = _start(
        "dead_letter",
        SpanKind.PRODUCER,
        {
            "messaging.operation.type": "send",
            "messaging.operation.name": "dead_letter",
            "messaging.destination.name": delivery.stream,
            "messaging.message.id": found.get("event_id"),
            "celery_jetstream.handler": handler,
            "celery_jetstream.stream_sequence": delivery.sequence,
            "celery_jetstream.num_delivered": delivery.num_delivered,
            "celery_jetstream.reason": reason,
            "error.type": found.get("error_class") or reason,
        },
        context=_context(delivery.headers),
    )
    span.set_status(Status(StatusCode.ERROR, f"dead letter: {reason}"))
    span.end()


# -- how ------------------------------------------------------------------------------------------


def _context(headers: Mapping[str, str]) -> contexts.Context:
    """Whatever the case of the headers' names: Go's clients write ``Traceparent``."""
    return propagate.extract({name.lower(): headers[name] for name in headers})


def _attempt(request: Any) -> tuple[Any, Any]:
    return getattr(request, ATTEMPT, None) or (None, None)


def _celerys_own() -> Any:
    """Celery's instrumentor, which is one for the process; None where it is not installed."""
    try:
        from opentelemetry.instrumentation.celery import CeleryInstrumentor
    except ImportError:
        return None
    instrumentor: Any = CeleryInstrumentor
    return instrumentor()


_RECEIVERS: tuple[tuple[Any, Callable[..., None]], ...] = (
    (signals.event_built, _create),
    (signals.after_event_publish, _published),
    (signals.event_publish_failed, _published),
    (signals.outbox_published, _outbox_published),
    (signals.handler_started, _handler_started),
    (signals.message_dead_lettered, _dead_lettered),
)
_OF_ATTEMPTS: tuple[tuple[Any, Callable[..., None]], ...] = (
    (signals.handler_ended, _handler_ended),
    (signals.message_settled, _settled),
    (celery_signals.task_postrun, _task_ended),
)
