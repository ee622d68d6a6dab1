"""The stream and the consumer that we need, in our words and in the server's.

Receives settings; hands on the fields to ask for. Of what exists already, fields that are not
asked for stay as found. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .subjects import covered

__all__ = (
    "IDLE_HEARTBEAT",
    "NANOSECONDS",
    "Configuration",
    "ConsumerSpec",
    "StreamSpec",
    "filters",
)

Configuration = dict[str, Any]
"""A stream's or a consumer's configuration in the server's own words; durations in nanoseconds."""

NANOSECONDS = 1_000_000_000
"""In a second."""

IDLE_HEARTBEAT = 5.0
"""Seconds between two signs of life of a push consumer that has nothing to send."""


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """The stream that we need: a work queue on disk that takes our subjects.

    Args:
        name: The stream's name.
        subjects: Concrete subjects; one that an existing pattern of the stream covers is there.
        num_replicas: None is 1 on a new stream and as found on an existing one.
        duplicate_window: Seconds; None is the server's 120 on a new stream, else as found.
        max_age: Seconds, 0 is for ever; None is for ever on a new stream, else as found.
        allow_atomic: Whether it shall take atomic batches, where the server can; else as found.
    """

    name: str
    subjects: tuple[str, ...]
    num_replicas: int | None = None
    duplicate_window: float | None = None
    max_age: float | None = None
    allow_atomic: bool = False

    def wanted(self, found: Configuration) -> Configuration:
        """The fields that we ask for; None is one that must not be set."""
        wanted: Configuration = {
            "name": self.name,
            "subjects": [*(found.get("subjects") or ()), *self.missing_subjects(found)],
            "retention": "workqueue",
            "storage": "file",
            **dict.fromkeys(("mirror", "sealed", "no_ack")),
        }
        if not found:  # a limit that an administrator sets later is not to drop what nobody handled
            wanted["discard"] = "new"
        if self.num_replicas is not None:
            wanted["num_replicas"] = self.num_replicas
        if self.allow_atomic:
            wanted["allow_atomic"] = True
        if self.duplicate_window is not None:
            wanted["duplicate_window"] = _nanoseconds(self.duplicate_window)
        if self.max_age is not None:
            wanted["max_age"] = age = _nanoseconds(self.max_age)
            if self.duplicate_window is None and 0 < age < found.get("duplicate_window", 0):
                wanted["duplicate_window"] = age  # as the server does on create; else 10052
        return wanted

    def missing_subjects(self, found: Configuration) -> list[str]:
        """The subjects wanted that no pattern of the stream covers."""
        there = found.get("subjects") or ()
        wanted = dict.fromkeys(self.subjects)  # each once, in order
        return [subject for subject in wanted if not covered(subject, there)]


@dataclass(frozen=True, kw_only=True)
class ConsumerSpec:
    """The durable consumer that we need: explicit acks, no ``backoff``, no ``max_deliver``.

    Args:
        stream: The stream that it reads.
        durable: Its name.
        filter_subjects: The subjects whose messages it takes; more than one needs a server from
            2.10 on (before, it would take all messages of the stream).
        ack_wait: Seconds until a message is delivered again if nobody said that it is in work.
        max_ack_pending: How many messages may be delivered and not yet settled.
        batch_size: The most messages that one pull asks for; not the server's business.
        deliver_subject: Where a push consumer delivers; "" for a pull consumer.
        optional: It may be missing, and nobody minds.
        is_peers: Another app's: made where it is missing, and else left as it is.
    """

    stream: str
    durable: str
    filter_subjects: tuple[str, ...]
    ack_wait: float
    max_ack_pending: int
    batch_size: int = 256
    deliver_subject: str = ""
    optional: bool = False
    is_peers: bool = False

    @property
    def deliver_group(self) -> str:
        """The queue group of those who share what a push consumer delivers."""
        return self.durable

    def wanted(self) -> Configuration:
        """The fields that we ask for; None is one that must not be set."""
        subjects = list(self.filter_subjects)
        one = len(subjects) == 1
        return {
            "durable_name": self.durable,
            "filter_subject": subjects[0] if one else None,
            "filter_subjects": None if one else subjects,
            "ack_policy": "explicit",
            "deliver_policy": "all",
            "replay_policy": "instant",
            "ack_wait": _nanoseconds(self.ack_wait),
            "max_ack_pending": self.max_ack_pending,
            "max_deliver": -1,  # a finite one leaves a message in the work queue for ever, unseen
            # backoff overrides ack_wait and adds to nak delays; headers_only cuts the events off;
            # a consumer with priority groups answers only to who names one
            **dict.fromkeys(("backoff", "headers_only", "priority_groups")),
            **self._delivery(),
        }

    def _delivery(self) -> Configuration:
        if not self.deliver_subject:
            return dict.fromkeys(("deliver_subject", "deliver_group", "flow_control"))
        return {
            "deliver_subject": self.deliver_subject,
            "deliver_group": self.deliver_group,
            "flow_control": True,
            "idle_heartbeat": _nanoseconds(IDLE_HEARTBEAT),
        }


def filters(consumer: Configuration) -> list[str]:
    """The subjects of a consumer; patterns where it was made so, ``>`` where it takes all."""
    found: list[str] = consumer.get("filter_subjects") or [consumer.get("filter_subject") or ">"]
    return found


def _nanoseconds(seconds: float) -> int:
    return round(seconds * NANOSECONDS)


def retention_warnings(
    retention: float, max_age: float | None, duplicate_window: float | None
) -> list[str]:
    """Say what is wrong with ``jetstream_inbox_retention``.

    Args:
        retention: its seconds.
        max_age: seconds that the stream keeps messages, dead letters too; None or 0 where that is
            not known, or for ever.
        duplicate_window: seconds for which the server drops a known id.
    """
    limits = (("max_age", max_age), ("duplicate window", duplicate_window))
    return [
        f"jetstream_inbox_retention={retention:g} is less than the stream's {name} of {limit:g} s: "
        "what comes again after that is handled again"
        for name, limit in limits
        if limit and retention < limit
    ]
