"""The fields of an envelope: read as any release wrote them, written as the contract has it.

Receives an envelope's JSON object and hands on its fields, or the arguments of a producer and
hands on what stands in the envelope. Writing is strict, so that a bad event fails its producer;
reading is tolerant, since other releases and the Ruby gem ``jetstream_bridge`` write envelopes
too: ``occurred_at`` stands in for ``produced_at``, numbers for text. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timezone
from enum import Enum
from typing import Any
from uuid import UUID

from .exceptions import DecodeError, EventError, kind_of, shown
from .headers import CONTROL

__all__ = (
    "FIELDS",
    "MAX_EVENT_ID",
    "SCHEMA_VERSION",
    "invalid",
    "read_event_id",
    "read_event_type",
    "read_produced_at",
    "read_text",
    "write_event_id",
    "write_produced_at",
    "write_resource_id",
    "write_text",
)

SCHEMA_VERSION = "1.0"
MAX_EVENT_ID = 255
"""Bytes in an event_id: it is the Nats-Msg-Id header and the inbox's key."""
FIELDS = (
    "event_id",
    "event_type",
    "resource_type",
    "resource_id",
    "payload",
    "produced_at",
    "producer",
    "schema_version",
    "trace_id",
)
"""The fields of the wire contract, in their order; ``occurred_at`` repeats ``produced_at``."""

_TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d(?::\d\d)?)(?:[.,](\d+))?"
    r" ?(?:([Zz]|UTC)|([+-]\d\d):?(\d\d)?)?",
    re.ASCII,
)


# -- reading -------------------------------------------------------------------------------


def invalid(message: str) -> DecodeError:
    """Build the error of a JSON value that is no envelope."""
    return DecodeError(message, reason="invalid_envelope")


def read_text(envelope: Mapping[str, Any], name: str, default: str, *numbers: type) -> str:
    """Return a field as text; a number counts where its type is among ``numbers``."""
    value = envelope.get(name)
    if value is None:
        return default
    if isinstance(value, str):
        return value
    if isinstance(value, numbers) and not isinstance(value, bool):
        return str(value)
    raise invalid(f"envelope field {name!r} is {kind_of(value)} ({shown(value)}), not text")


def read_event_type(envelope: Mapping[str, Any]) -> str:
    """Return the one field, besides the payload, that must be there."""
    event_type = read_text(envelope, "event_type", "")
    if not event_type:
        raise invalid("the envelope has no 'event_type'")
    if CONTROL.search(event_type):
        raise invalid(f"envelope field 'event_type' ({shown(event_type)}) has control characters")
    return event_type


def read_event_id(envelope: Mapping[str, Any]) -> str:
    """Return the id, or ``""`` where the producer gave none."""
    event_id = read_text(envelope, "event_id", "", int)
    if event_id and (reason := _event_id_fault(event_id)):
        raise invalid(f"envelope field 'event_id' ({shown(event_id)}) {reason}")
    return event_id


def read_produced_at(envelope: Mapping[str, Any]) -> datetime | None:
    """Return the time, in UTC where it has no offset; ``None`` if there is none to be read."""
    name = "occurred_at" if envelope.get("produced_at") is None else "produced_at"
    moment = _parse_timestamp(read_text(envelope, name, ""))
    return moment.replace(tzinfo=timezone.utc) if moment and moment.tzinfo is None else moment


# -- writing -------------------------------------------------------------------------------


def write_text(name: str, value: object) -> str:
    """Return an argument that must be text; a UUID counts as such."""
    text = str(value) if isinstance(value, UUID) else value
    if isinstance(text, str):
        return text
    raise EventError(f"{name} is {kind_of(value)} ({shown(value)}), not text")


def write_event_id(value: object) -> str:
    """Return an id that can be a header and a database key."""
    event_id = write_text("event_id", value)
    reason = _event_id_fault(event_id)
    if event_id != event_id.strip():
        reason = "begins or ends with whitespace, which a header loses"
    if reason:
        raise EventError(f"event_id {shown(event_id)} {reason}")
    return event_id


def write_resource_id(given: object, payload: Any) -> str:
    """Return the id as text; one that is not given is looked for in the payload."""
    for name in ("id", "resource_id"):
        if given is None and isinstance(payload, dict):
            given = payload.get(name)
    if isinstance(given, bytes):
        raise EventError("resource_id is bytes; give text")
    if isinstance(given, bool):
        return str(given).lower()
    return "" if given is None else str(given.value if isinstance(given, Enum) else given)


def write_produced_at(given: datetime | str | None) -> str:
    """Write a time in UTC, to a microsecond."""
    moment = datetime.now(timezone.utc) if given is None else given
    if isinstance(moment, str):
        moment = _parse_timestamp(moment) or moment
    if not isinstance(moment, datetime):
        raise EventError(f"produced_at {shown(given)} is neither a datetime nor ISO-8601 text")
    if moment.utcoffset() is None:
        raise EventError(
            f"produced_at {shown(given)} has no offset; use datetime.now(timezone.utc)"
        )
    try:
        moment = moment.astimezone(timezone.utc)
    except OverflowError as error:
        raise EventError(f"produced_at {shown(given)} is outside the years 1 to 9999") from error
    return moment.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


# -- both ----------------------------------------------------------------------------------


def _event_id_fault(event_id: str) -> str | None:
    """Say why an id cannot be a header's value and a database key, or ``None``."""
    if not event_id:
        return "is empty"
    if CONTROL.search(event_id):
        return "has control characters"
    size = len(event_id.encode())
    return f"has {size} bytes, more than {MAX_EVENT_ID}" if size > MAX_EVENT_ID else None


def _parse_timestamp(text: str) -> datetime | None:
    """Read ISO-8601 with any number of decimals; Python 3.10's ``fromisoformat`` cannot."""
    found = _TIMESTAMP.fullmatch(text)
    if not found:
        return None
    day, clock, fraction, utc, hours, minutes = found.groups(default="")
    offset = "+00:00" if utc else hours and f"{hours}:{minutes or '00'}"
    clock = clock if clock.count(":") == 2 else f"{clock}:00"
    try:
        return datetime.fromisoformat(f"{day}T{clock}.{fraction[:6]:0<6}{offset}")
    except ValueError:
        return None
