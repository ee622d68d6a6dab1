"""Counts what the signals tell, for Prometheus: only where ``jetstream_metrics`` is on.

The metrics are in ``prometheus_client``'s own registry, where also a web application's endpoint
finds them. Receivers run on hot paths, in any thread; they do no I/O but, with
``PROMETHEUS_MULTIPROC_DIR``, a write to mapped memory.
"""

from __future__ import annotations

import os
import threading
from collections import Counter as Tally
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

from celery import signals as celery_signals

from . import signals
from .catalogue import LOOKED_UP, METRICS, OTHER
from .exceptions import ConfigurationError
from .settlement import Ack, DeadLetter, Settlement

__all__ = ("collecting", "start", "stop")

#: Values of ``reason`` and ``handler`` that one process tells apart, and how long each may be: a
#: middleware may give reasons of its own, and what it puts in them is not ours to know.
MOST_VALUES, LONGEST_VALUE = 200, 200
NO_HANDLER = "none"

# A lock of prometheus_client that another thread has while this one forks would stay locked in the
# child for ever: nobody counts or collects during a fork. These are of their kind also under
# gevent: a greenlet that waits for theirs with a native one would have the next stop all greenlets.
_lock, collecting = threading.Lock(), threading.Lock()
for lock in (_lock, collecting) if hasattr(os, "register_at_fork") else ():
    os.register_at_fork(
        before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
    )


def start() -> Meters:
    """Begins to count, once per process; a forked child goes on with that.

    Raises:
        ConfigurationError: prometheus_client is not installed.
    """
    global _meters
    with _lock:  # the first requests of a web process come at once
        if _meters is None:
            try:
                _meters = Meters()
            except ImportError as error:
                raise ConfigurationError(
                    "jetstream_metrics is on, and prometheus_client is not installed: pip install "
                    f'"celery-jetstream[prometheus]" ({error})',
                    setting="jetstream_metrics",
                ) from error
    _meters.connect()
    return _meters


def stop() -> None:
    """Ends counting; what was counted stays."""
    if _meters is not None:
        _meters.disconnect()


class Meters:
    """The metrics that are counted, and the receivers that count them."""

    def __init__(self) -> None:
        import prometheus_client

        make: dict[str, Callable[..., Any]] = {
            "counter": prometheus_client.Counter,
            "gauge": prometheus_client.Gauge,
            "histogram": prometheus_client.Histogram,
        }
        self._metrics: dict[str, Any] = {}
        for metric in METRICS:
            if metric.processes != LOOKED_UP:
                options: dict[str, Any] = {}
                if metric.buckets:
                    options["buckets"] = metric.buckets
                if metric.processes:
                    options["multiprocess_mode"] = metric.processes
                self._metrics[metric.name] = make[metric.kind](
                    metric.full_name, metric.help, metric.labels, **options
                )
                for values in metric.known:
                    self._metrics[metric.name].labels(*values)
        self._seen: dict[str, set[str]] = {"handler": set(), "reason": set()}
        self._child = lru_cache(maxsize=1024)(self._make_child)

    def connect(self) -> None:
        """Has the signals counted; harmless to repeat."""
        for signal, receiver in self._receivers:
            signal.connect(receiver, weak=False)

    def disconnect(self) -> None:
        """Counts no more."""
        for signal, receiver in self._receivers:
            signal.disconnect(receiver)

    @cached_property
    def _receivers(self) -> tuple[tuple[Any, Callable[..., None]], ...]:
        return (
            (signals.after_event_publish, self._published),
            (signals.event_publish_failed, self._published),
            (signals.outbox_published, self._outbox_published),
            (signals.outbox_flushed, self._flushed),
            (signals.message_received, self._received),
            (signals.handler_ended, self._handled),
            (signals.duplicate_skipped, self._skipped),
            (signals.message_settled, self._settled),
            (signals.message_dead_lettered, self._dead_lettered),
            (signals.connection_opened, self._opened),
            (signals.connection_lost, self._lost),
            (celery_signals.worker_process_shutdown, _forget_process),
        )

    # -- publishing --------------------------------------------------------------------------------

    def _published(self, result: Any, seconds: float, **_: Any) -> None:
        self._inc("events_published_total", "publish", _outcome(result))
        self._observe("publish_seconds", seconds)

    def _outbox_published(
        self,
        rows: Sequence[Any],
        results: Sequence[Any],
        seconds: float,
        since_read: float,
        **_: Any,
    ) -> None:
        for outcome, count in Tally(map(_outcome, results)).items():
            self._inc("events_published_total", "outbox", outcome, amount=count)
        self._observe("outbox_batch_events", len(rows))
        self._observe("outbox_batch_seconds", seconds)
        for row, result in zip(rows, results, strict=True):
            written_at = getattr(row, "written_at", None)
            if result.success and written_at is not None:
                age = (row.read_at - written_at).total_seconds()
                self._observe("outbox_commit_to_ack_seconds", max(0.0, age) + since_read)

    def _flushed(self, result: Any, **_: Any) -> None:
        self._set("outbox_breaker_open", float(result.outage is not None))

    # -- messages ----------------------------------------------------------------------------------

    def _received(self, delivery: Any, **_: Any) -> None:
        self._inc("messages_received_total")
        if delivery.num_delivered > 1:
            self._inc("messages_redelivered_total")

    def _handled(self, sender: Any, seconds: float, **_: Any) -> None:
        self._observe("handler_seconds", seconds, self._bounded("handler", sender.name))

    def _skipped(self, handler: str, **_: Any) -> None:
        self._inc("duplicates_skipped_total", self._bounded("handler", handler))

    def _settled(self, settlement: Settlement, handler: str, **_: Any) -> None:
        outcome = "nak"
        if isinstance(settlement, Ack):
            outcome = "ack"
        elif isinstance(settlement, DeadLetter):
            outcome = "dead_letter"
        self._inc("messages_settled_total", self._bounded("handler", handler), outcome)

    def _dead_lettered(self, reason: str, **_: Any) -> None:
        self._inc("dead_letters_total", self._bounded("reason", reason))

    # -- the connection ----------------------------------------------------------------------------

    def _opened(self, **_: Any) -> None:
        self._set("connection_down", 0.0)

    def _lost(self, **_: Any) -> None:
        self._set("connection_down", 1.0)
        self._inc("connection_losses_total")

    # -- how ---------------------------------------------------------------------------------------

    def _make_child(self, name: str, *labels: str) -> Any:
        metric = self._metrics[name]
        return metric.labels(*labels) if labels else metric

    def _inc(self, name: str, *labels: str, amount: float = 1.0) -> None:
        with _lock:
            self._child(name, *labels).inc(amount)

    def _set(self, name: str, value: float) -> None:
        with _lock:
            self._child(name).set(value)

    def _observe(self, name: str, value: float, *labels: str) -> None:
        with _lock:
            self._child(name, *labels).observe(value)

    def _bounded(self, label: str, value: str) -> str:
        seen = self._seen[label]
        if value not in seen:
            if len(seen) >= MOST_VALUES or len(value) > LONGEST_VALUE:
                return OTHER
            seen.add(value)
        return value or NO_HANDLER


_meters: Meters | None = None


def _outcome(result: Any) -> str:
    return "duplicate" if result.duplicate else str(result.verdict.value)


def _forget_process(pid: int | None = None, **_: Any) -> None:
    """A child of a pool ends: what its gauges say is no more."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        from prometheus_client import multiprocess

        process = os.getpid() if pid is None else pid
        multiprocess.mark_process_dead(process)  # type: ignore[no-untyped-call]
