"""One trace from a request to its handlers, also through an outbox, a bridge, and a worker."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import build_tracer
from celery.exceptions import Reject
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from celery_jetstream import JetStream, JetStreamTask
from celery_jetstream.bridge import Bridge
from celery_jetstream.contrib.opentelemetry import JetStreamInstrumentor
from tests.conftest import Names
from tests.databases import Database
from tests.servers import NatsServer, wait_until
from tests.watching import Watched

ROOT = Path(__file__).parents[2]
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass
class Tracing:
    """The spans of this process, and the two ends of a stream in it."""

    spans: InMemorySpanExporter
    tracer: trace.Tracer
    shop: JetStream
    desk: JetStream
    ran: list[tuple[str, Any]] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """The next copy that the bridge sends, run as a worker's pool does; returns its headers."""
        app = self.desk.app
        with app.connection() as connection:
            queue = connection.SimpleQueue(app.conf.task_default_queue)
            message = queue.get(timeout=5)
            message.ack()
            queue.close()
        task = app.tasks[message.headers["task"]]
        args, kwargs, _ = message.payload
        tracing = build_tracer(task.name, task, app=app)
        tracing(message.headers["id"], args, kwargs, {**message.headers, "called_directly": False})
        self.desk.settler.drain(5)
        return dict(message.headers)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans.get_finished_spans() if span.name.startswith(name)]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture
def provider() -> TracerProvider:
    return TracerProvider(shutdown_on_exit=False)


@pytest.fixture
def instrumented(provider: TracerProvider) -> Iterator[None]:
    JetStreamInstrumentor().instrument(tracer_provider=provider)
    yield
    JetStreamInstrumentor().uninstrument()


@pytest.fixture
def with_celery(provider: TracerProvider) -> Iterator[None]:
    CeleryInstrumentor().instrument(tracer_provider=provider)
    yield
    CeleryInstrumentor().uninstrument()


@pytest.fixture
def tracing(
    provider: TracerProvider,
    instrumented: None,
    nats_server: NatsServer,
    sqlite: Database,
    names: Names,
) -> Iterator[Tracing]:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    both = {
        "jetstream_nats_urls": nats_server.url,
        "jetstream_stream_name": names.stream_name,
        "jetstream_backoff": [0],
        "jetstream_outbox_nudge": False,
        "task_default_queue": names.stream_name,
    }
    both_names = (names.destination_app, names.app_name)
    apps = [Celery(name, broker="memory://", set_as_current=False) for name in both_names]
    for app, other in zip(apps, reversed(apps), strict=True):
        app.conf.update(both, broker_transport_options={"polling_interval": 0.005})
        app.conf.update(jetstream_app_name=app.main, jetstream_destination_app=other.main)
    shop, desk = apps
    shop.conf.update(jetstream_database_url=sqlite.url)
    tracing = Tracing(exporter, provider.get_tracer("test"), JetStream(shop), JetStream(desk))

    @desk.task(
        name="note",
        base=JetStreamTask,
        event_types=("note.*",),
        bind=True,
        max_retries=1,
        shared=False,
    )
    def note(self: Any, event: Any) -> None:
        tracing.ran.append((event.event_id, trace.get_current_span().get_span_context()))
        how = event.payload.get("how")
        if how == "retry" and event.delivery.num_delivered == 1:
            raise self.retry(exc=OSError("not yet"), countdown=0)
        if how == "reject":
            raise Reject("not for us", requeue=False)
        if how == "fail":
            raise ValueError("no number")

    desk.finalize()
    tracing.desk.provision()
    bridge = Bridge(tracing.desk)
    running = threading.Thread(target=bridge.run)
    running.start()
    yield tracing
    tracing.shop.close()
    bridge.stop()
    running.join()


def parent(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def test_a_handler_is_in_the_trace_of_who_published(tracing: Tracing) -> None:
    with tracing.tracer.start_as_current_span("request") as request:
        tracing.shop.publish("note.made", {})
    tracing.run()
    create, publish, process = (tracing.one(name) for name in ("create", "publish", "process"))
    assert parent(create) == request.get_span_context().span_id
    assert parent(publish) == parent(process) == create.context.span_id
    assert [s.kind for s in (create, publish, process)] == [
        SpanKind.PRODUCER,
        SpanKind.CLIENT,
        SpanKind.CONSUMER,
    ]
    ((event_id, within),) = tracing.ran
    assert within.span_id == process.context.span_id
    assert process.status.status_code is StatusCode.UNSET
    assert dict(process.attributes or {}) == {
        "messaging.system": "nats",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.destination.name": tracing.desk.config.stream_name,
        "messaging.consumer.group.name": f"{tracing.desk.config.app_name}-workers",
        "messaging.message.id": event_id,
        "celery_jetstream.event_id": event_id,
        "celery_jetstream.event_type": "note.made",
        "celery_jetstream.handler": "note",
        "celery_jetstream.stream_sequence": 1,
        "celery_jetstream.num_delivered": 1,
        "celery_jetstream.outcome": "ack",
    }
    assert trace.get_current_span().get_span_context().span_id == 0


def test_the_outbox_goes_on_with_the_trace_of_the_request(tracing: Tracing) -> None:
    outbox = tracing.shop.outbox
    outbox.create_tables()
    with tracing.tracer.start_as_current_span("request") as request:
        outbox.publish("note.made", {})
    assert [span.name.split()[0] for span in tracing.spans.get_finished_spans()] == [
        "create",
        "request",
    ]
    assert outbox.drain().sent == 1
    tracing.run()
    create, publish, process = (tracing.one(name) for name in ("create", "publish", "process"))
    assert parent(create) == request.get_span_context().span_id
    assert parent(publish) == parent(process) == create.context.span_id
    assert (publish.end_time or 0) > (publish.start_time or 0) >= (create.end_time or 0)


def test_each_attempt_has_a_span_and_its_error(tracing: Tracing) -> None:
    tracing.shop.publish("note.made", {"how": "retry"})
    tracing.run()
    tracing.run()
    first, second = tracing.named("process")
    assert first.context.trace_id == second.context.trace_id
    assert first.status.status_code is StatusCode.ERROR
    assert [event.name for event in first.events] == ["exception"]
    assert (first.attributes or {})["error.type"] == "OSError"
    assert (first.attributes or {})["celery_jetstream.outcome"] == "nak"
    assert second.status.status_code is StatusCode.UNSET
    assert (second.attributes or {})["celery_jetstream.num_delivered"] == 2


@pytest.mark.parametrize(
    ("how", "reason"), [("fail", "unrecoverable_error"), ("reject", "rejected")]
)
def test_a_dead_letter_is_marked(tracing: Tracing, how: str, reason: str) -> None:
    tracing.shop.publish("note.made", {"how": how})
    tracing.run()
    process, dead = tracing.one("process"), tracing.one("dead_letter")
    for span in (process, dead):
        assert (span.attributes or {})["celery_jetstream.reason"] == reason
        assert span.status.status_code is StatusCode.ERROR
    assert parent(dead) == parent(process)


def test_a_message_without_a_handler_is_a_dead_letter_of_its_trace(tracing: Tracing) -> None:
    with tracing.tracer.start_as_current_span("request") as request:
        tracing.shop.publish("nobody.wants", {})
    dead = wait_until(lambda: tracing.named("dead_letter"), 5, "the dead letter")[0]
    assert dead.context.trace_id == request.get_span_context().trace_id
    assert (dead.attributes or {})["celery_jetstream.reason"] == "no_handler"


def test_what_could_not_be_published_says_why(tracing: Tracing) -> None:
    result = tracing.shop.publish("note.made", {}, subject="no.stream.here", timeout=1)
    assert not result
    publish = tracing.one("publish no.stream.here")
    assert publish.status.status_code is StatusCode.ERROR
    assert (publish.attributes or {})["error.type"] == "no_stream"


@pytest.mark.parametrize("name", ["traceparent", "Traceparent"])
def test_a_producers_own_header_wins(tracing: Tracing, name: str) -> None:
    tracing.shop.publish("note.made", {}, headers={name: TRACEPARENT})
    tracing.run()
    assert not tracing.named("create")
    for span in (tracing.one("publish"), tracing.one("process")):
        assert trace.format_trace_id(span.context.trace_id) in TRACEPARENT
        assert trace.format_span_id(parent(span) or 0) in TRACEPARENT


def test_with_celerys_own_instrumentation_there_is_one_span_for_an_attempt(
    with_celery: None, tracing: Tracing
) -> None:
    """Its span for the copy is in the event's trace, and that for the run has our attributes."""
    tracing.shop.publish("note.made", {"how": "retry"})
    tracing.run()
    tracing.run()
    assert not tracing.named("process")
    create, copies, runs = (tracing.one("create"), *map(tracing.named, ("apply_async", "run")))
    assert [parent(copy) for copy in copies] == [create.context.span_id] * 2
    assert [parent(run) for run in runs] == [copy.context.span_id for copy in copies]
    for number, (run, outcome) in enumerate(zip(runs, ("nak", "ack"), strict=True), 1):
        attributes = run.attributes or {}
        assert attributes["messaging.system"] == "nats"
        assert attributes["celery_jetstream.event_id"] == tracing.ran[0][0]
        assert attributes["celery_jetstream.num_delivered"] == number
        assert attributes["celery_jetstream.outcome"] == outcome
    assert [within.span_id for _, within in tracing.ran] == [run.context.span_id for run in runs]


def test_what_is_not_instrumented_hands_the_trace_on(tracing: Tracing) -> None:
    """A bridge needs no OpenTelemetry."""
    JetStreamInstrumentor().uninstrument()
    headers = {"Traceparent": TRACEPARENT, "tracestate": "a=1", "baggage": "user=7"}
    tracing.shop.publish("note.made", {}, headers=headers)
    copy = tracing.run()
    assert {name: copy.get(name.lower()) for name in headers} == headers
    assert not tracing.spans.get_finished_spans()


def test_without_an_sdk_nothing_is_added(tracing: Tracing) -> None:
    JetStreamInstrumentor().uninstrument()
    JetStreamInstrumentor().instrument(tracer_provider=trace.NoOpTracerProvider())
    tracing.shop.publish("note.made", {})
    assert "traceparent" not in tracing.run()
    assert len(tracing.ran) == 1


def test_opentelemetry_finds_the_instrumentor() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    group = project.partition("[project.entry-points.opentelemetry_instrumentor]\n")[2]
    name, target = group.partition("\n")[0].split(" = ")
    entry = EntryPoint(name, target.strip('"'), "opentelemetry_instrumentor")
    assert entry.load() is JetStreamInstrumentor


def test_a_real_worker_and_bridge_go_on_with_a_trace(watched: Watched) -> None:
    """With Celery's instrumentation in both, and an exporter that writes a file."""
    trace_id = "0x" + TRACEPARENT.split("-")[1][:-8] + f"{os.getpid():08x}"
    traceparent = f"00-{trace_id[2:]}-{TRACEPARENT.split('-')[2]}-01"
    watched.stack.hub.publish("error.once", {"id": 1}, headers={"traceparent": traceparent})

    def found() -> list[dict[str, Any]]:
        ours = [span for span in watched.spans() if span["context"]["trace_id"] == trace_id]
        return ours if len(ours) == 4 else []

    spans = wait_until(found, 20, "two copies and two runs")
    handler = "tests.apps.desk.error_once"
    copies = [span for span in spans if span["name"] == f"apply_async/{handler}"]
    runs = [span for span in spans if span["name"] == f"run/{handler}"]
    assert {copy["parent_id"][2:] for copy in copies} == {TRACEPARENT.split("-")[2]}
    assert {copy["pid"] for copy in copies} == {watched.bridge.pid}
    ids = {copy["context"]["span_id"] for copy in copies}
    assert {run["parent_id"] for run in runs} == ids
    assert len(ids) == 2
    assert [run["attributes"]["celery_jetstream.num_delivered"] for run in runs] == [1, 2]
    assert [run["status"]["status_code"] for run in runs] == ["ERROR", "UNSET"]
    assert [run["attributes"].get("celery_jetstream.outcome") for run in runs] == ["nak", "ack"]
