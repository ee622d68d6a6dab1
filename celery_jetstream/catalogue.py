"""The metrics: name, kind, labels and meaning of each, in one table.

What counts (``meters``), what is looked up when somebody asks (``metrics``), the page
``docs/reference/metrics.md`` and the alert rules are held to it by tests. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

__all__ = ("LOOKED_UP", "METRICS", "OTHER", "OUTCOMES", "REASONS", "Metric")

#: Stands for all values of a label beyond those that it may have.
OTHER = "other"
#: The process that is asked finds it out then; the others are counted as things happen.
LOOKED_UP = "looked up"

#: Why a message may be given up, but for what a middleware says.
REASONS = (
    *("malformed_json", "invalid_envelope", "invalid_payload", "no_handler"),
    *("unrecoverable_error", "max_deliveries_exceeded", "rejected", "revoked"),
)

#: What may become of publishing an event.
OUTCOMES = (
    *("stored", "duplicate", "behind"),
    *("outage", "no_stream", "refused", "denied", "unknown"),
)

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_ROWS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 10000.0)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: without the prefix.
        kind: ``counter``, ``gauge`` or ``histogram``.
        help: what it says.
        labels: their names.
        buckets: of a histogram, upper bounds.
        known: values of its labels that it has from the beginning, as 0: Prometheus sees no
            increase in the first value of a series.
        processes: how a gauge's values in several processes become one (prometheus_client's
            ``multiprocess_mode``); :data:`LOOKED_UP` where there is but one.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    known: tuple[tuple[str, ...], ...] = ()
    processes: str = ""

    @property
    def full_name(self) -> str:
        """As Prometheus has it."""
        return f"celery_jetstream_{self.name}"


METRICS: tuple[Metric, ...] = (
    # Publishing.
    Metric(
        "events_published_total",
        "counter",
        "Events by what became of publishing them, and how they went: at once or by the outbox.",
        ("via", "outcome"),
        known=tuple(product(("publish", "outbox"), OUTCOMES)),
    ),
    Metric(
        "publish_seconds",
        "histogram",
        "From the call of publish until JetStream's answer.",
        buckets=_SHORT,
    ),
    # The outbox.
    Metric(
        "outbox_batch_events",
        "histogram",
        "Events that a flush published together.",
        buckets=_ROWS,
    ),
    Metric(
        "outbox_batch_seconds",
        "histogram",
        "From sending such a batch until its last answer.",
        buckets=_SHORT,
    ),
    Metric(
        "outbox_commit_to_ack_seconds",
        "histogram",
        "From a row's INSERT until JetStream had stored its event; not of events with a delay.",
        buckets=_LONG,
    ),
    Metric(
        "outbox_breaker_open",
        "gauge",
        "1 while the last flush met an outage and left rows alone; else 0.",
        processes="livemostrecent",
    ),
    Metric(
        "outbox_pending_events",
        "gauge",
        "Events of the outbox to be published; counted up to 10,000.",
        processes=LOOKED_UP,
    ),
    Metric(
        "outbox_oldest_due_seconds",
        "gauge",
        "How long the oldest event that may go now has been waiting; 0 where there is none.",
        processes=LOOKED_UP,
    ),
    Metric(
        "outbox_given_up_events",
        "gauge",
        "Events of the outbox that were refused (failed) or given up (exception), and are kept.",
        ("status",),
        processes=LOOKED_UP,
    ),
    # Taking messages, and handling them.
    Metric(
        "messages_received_total",
        "counter",
        "Messages that JetStream delivered to this bridge, or worker of direct mode.",
    ),
    Metric(
        "messages_redelivered_total",
        "counter",
        "Those among them that had been delivered before.",
    ),
    Metric(
        "messages_in_flight",
        "gauge",
        "Messages that this process holds: a bridge until a worker has them, a worker until their"
        " end.",
        processes=LOOKED_UP,
    ),
    Metric(
        "messages_settled_total",
        "counter",
        "Messages by how they were settled: ack, nak (to come again), dead_letter.",
        ("handler", "outcome"),
    ),
    Metric(
        "handler_seconds",
        "histogram",
        "How long an attempt took, with middleware and inbox, whatever came of it.",
        ("handler",),
        _LONG,
    ),
    Metric(
        "duplicates_skipped_total",
        "counter",
        "Messages that the inbox passed over: their event was handled before.",
        ("handler",),
    ),
    Metric(
        "dead_letters_total",
        "counter",
        "Dead letters that were stored.",
        ("reason",),
        known=tuple((reason,) for reason in REASONS),
    ),
    Metric(
        "dead_letters_stored",
        "gauge",
        "Dead letters of this app that the stream has now.",
        processes=LOOKED_UP,
    ),
    Metric(
        "consumer_pending_messages",
        "gauge",
        "The lag: messages that the consumer has not delivered yet.",
        ("consumer",),
        processes=LOOKED_UP,
    ),
    Metric(
        "consumer_ack_pending_messages",
        "gauge",
        "Messages that the consumer has delivered and that are not settled.",
        ("consumer",),
        processes=LOOKED_UP,
    ),
    # What all of it stands on.
    Metric(
        "connection_down",
        "gauge",
        "1 while the NATS connection is lost, or cannot be had; of several processes, the worst.",
        processes="livemax",
    ),
    Metric(
        "connection_losses_total",
        "counter",
        "NATS connections that were lost, or could not be had at first.",
    ),
    Metric(
        "ready",
        "gauge",
        "1 where the process that is asked takes its work, as /readyz says; else 0.",
        processes=LOOKED_UP,
    ),
    Metric(
        "broker_connected",
        "gauge",
        "Of a bridge: 1 while the Celery broker takes its copies, else 0.",
        processes=LOOKED_UP,
    ),
    Metric(
        "collector_up",
        "gauge",
        "1 where what is looked up (nats, outbox) could be found out, else 0.",
        ("collector",),
        processes=LOOKED_UP,
    ),
)
