"""The event: what happened, made from a producer's arguments or read from a message's body.

Receives what a producer gives, or the body of a message; hands on an :class:`Event`, or the
bytes for the wire. Only ``event_type`` and ``payload`` must be in an envelope that is read, and
unknown keys are kept. Pure: no connection, no database, no Celery.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from . import envelopes, jsontext
from .delivery import Delivery
from .envelopes import FIELDS, SCHEMA_VERSION, read_text, write_text
from .exceptions import EventError, kind_of, shown
from .headers import Headers
from .subjects import fault

__all__ = ("Event", "build", "decode", "encode")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Event:
    """What happened: the envelope, read. Made by :meth:`from_envelope`, ``build``, ``decode``.

    ``event["event_type"]`` is ``event.event_type``, and so for each of ``FIELDS``; any other
    key reads the raw envelope. Two events are equal where their envelopes are. Kombu
    serializes an event as its envelope, so that it can be passed on to another task.

    Attributes:
        event_id: names the event for ever; ``""`` if its producer gave none.
        event_type: dotted text, ``order.created``.
        resource_type: what it happened to; by default the first token of ``event_type``.
        resource_id: which one, as text; ``""`` if none.
        payload: the data, plain JSON values.
        produced_at: when, with its offset (UTC where the text has none); ``None`` if it is not
            given or not a time.
        producer: the application that published it.
        schema_version: of the envelope, as text.
        trace_id: what the producer wants to be found by in logs.
        envelope: the JSON object as it was received, unknown keys included.
        headers: the message's headers.
        delivery: the hand-over it came with; ``None`` when it came by no message.
    """

    event_id: str
    event_type: str
    resource_type: str
    resource_id: str
    payload: Any
    produced_at: datetime | None
    producer: str
    schema_version: str
    trace_id: str | None
    envelope: dict[str, Any]
    headers: Headers
    delivery: Delivery | None

    @classmethod
    def from_envelope(
        cls,
        envelope: Mapping[str, Any],
        *,
        headers: Mapping[str, str] | None = None,
        delivery: Delivery | None = None,
    ) -> Event:
        """Read an envelope of any release.

        Args:
            envelope: the JSON object.
            headers: the message's headers; those of ``delivery`` if not given.
            delivery: the hand-over it came with.

        Raises:
            DecodeError: with reason ``invalid_envelope``: a field is missing or has the wrong
                type; the message names both.
        """
        if not isinstance(envelope, Mapping):
            raise envelopes.invalid(f"the body is {kind_of(envelope)}, not an object")
        event_type = envelopes.read_event_type(envelope)
        if "payload" not in envelope:
            raise envelopes.invalid("the envelope has no 'payload'")
        return cls(
            event_id=envelopes.read_event_id(envelope),
            event_type=event_type,
            resource_type=read_text(envelope, "resource_type", event_type.partition(".")[0]),
            resource_id=read_text(envelope, "resource_id", "", int, float),
            payload=envelope["payload"],
            produced_at=envelopes.read_produced_at(envelope),
            producer=read_text(envelope, "producer", ""),
            schema_version=read_text(envelope, "schema_version", SCHEMA_VERSION, int, float),
            trace_id=read_text(envelope, "trace_id", "") or None,
            envelope=dict(envelope),
            headers=Headers(delivery.headers if headers is None and delivery else headers),
            delivery=delivery,
        )

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key) if key in FIELDS else self.envelope[key]

    def __contains__(self, key: object) -> bool:
        return key in FIELDS or key in self.envelope

    def get(self, key: str, default: Any = None) -> Any:
        """Return ``event[key]``, or ``default`` where the envelope has no such key."""
        try:
            return self[key]
        except KeyError:
            return default

    def __eq__(self, other: object) -> bool:
        return self.envelope == other.envelope if isinstance(other, Event) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.event_id, self.event_type))

    def __repr__(self) -> str:
        resource = f"{self.resource_type}:{self.resource_id}"
        at = f" at {self.delivery.task_id}" if self.delivery else ""
        return f"<Event {self.event_type} {self.event_id or 'without id'} of {resource}{at}>"

    def __json__(self) -> dict[str, Any]:
        return self.envelope


def decode(
    body: bytes, headers: Mapping[str, str] | None = None, delivery: Delivery | None = None
) -> Event:
    """Read the body of a message.

    Raises:
        DecodeError: with reason ``malformed_json`` or ``invalid_envelope``.
    """
    return Event.from_envelope(jsontext.read(body), headers=headers, delivery=delivery)


def build(
    *,
    event_type: str,
    payload: Any,
    producer: str,
    resource_type: str | None = None,
    resource_id: object = None,
    event_id: str | UUID | None = None,
    trace_id: str | UUID | None = None,
    produced_at: datetime | str | None = None,
    schema_version: str = SCHEMA_VERSION,
) -> Event:
    """Make the event that is to be published.

    Args:
        event_type: tokens joined by dots, as in a subject; no wildcards.
        payload: the data, anything that :func:`.jsontext.plain` takes but ``None``. The event
            holds it as plain JSON values: a ``Decimal`` has become text.
        producer: the application's name.
        resource_type: by default the text before the first dot of ``event_type``.
        resource_id: of any type but bytes, made text; by default the payload's ``id``, else its
            ``resource_id``, else ``""``.
        event_id: by default a random UUID. Events with one id are one event.
        trace_id: by default 32 random hexadecimal digits.
        produced_at: a time with its offset, by default now.
        schema_version: of the envelope.

    Raises:
        EventError: an argument cannot be used; the message names it.
        EncodeError: so is a value within ``payload``; ``path`` leads to it.
    """
    if reason := fault(event_type):
        raise EventError(f"event_type {shown(event_type)} is not legal: {reason}")
    if payload is None:
        raise EventError("payload is None; give the event's data, or {} where there is none")
    payload = jsontext.plain(payload, "payload")
    moment = envelopes.write_produced_at(produced_at)
    given_type = event_type.partition(".")[0] if resource_type is None else resource_type
    return Event.from_envelope(
        {
            "event_id": envelopes.write_event_id(uuid4() if event_id is None else event_id),
            "event_type": event_type,
            "resource_type": write_text("resource_type", given_type),
            "resource_id": envelopes.write_resource_id(resource_id, payload),
            "payload": payload,
            "produced_at": moment,
            "producer": write_text("producer", producer),
            "schema_version": write_text("schema_version", schema_version),
            "trace_id": write_text("trace_id", uuid4().hex if trace_id is None else trace_id),
            "occurred_at": moment,
        }
    )


def encode(event: Event) -> bytes:
    """Write the envelope for the wire.

    Raises:
        EncodeError: it holds what JSON has not; ``path`` leads to it.
    """
    return jsontext.write(event.envelope)
