"""A dead letter as it is read again: one of ours, or one that the Ruby gem wrote. Pure.

Reading is tolerant, for whatever is in the stream must be seen: what is missing or damaged is
empty, and named in ``problems``. The gem has other reasons and context keys (``sequence`` and
``published_at``), and invents an event_id where there is no ``nats-msg-id``: the envelope's is
believed first.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from typing import Any

from . import jsontext
from .envelopes import read_produced_at
from .exceptions import DecodeError
from .headers import Headers

__all__ = ("SCHEMA", "StoredDeadLetter", "canonical_reason", "read_letter")

SCHEMA = 1
"""The version of what :meth:`StoredDeadLetter.as_record` gives."""

#: The gem's words for ours.
_REASONS = {
    "max_deliver_exceeded": "max_deliveries_exceeded",
    "unrecoverable": "unrecoverable_error",
}
#: Bytes that a packed body may have unpacked.
_UNPACKED = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class StoredDeadLetter:
    """A dead letter that the stream has.

    Attributes:
        sequence: its number in the stream, by which it is shown, sent again and deleted.
        event_id: the envelope's; else the one that was noted; "" where there is none.
        event_type: the envelope's; "" where it cannot be read.
        source: the app that published the event.
        reason: why it was given up, as it was written; the gem's differ.
        handler: the task that failed; "" where none began, and in the gem's.
        error_class: the error's class.
        error_message: its text, 1024 characters at the most in ours.
        deliveries: how often the message was delivered.
        redrives: how often it was sent again before.
        redriven_at: when that was last; "" where it was not.
        redriven_by: by whom.
        original_subject: where it came from; "" where that is not known.
        original_sequence: the number that it had in the stream; None where that is not known.
        consumer: the durable that delivered it.
        failed_at: when it was given up.
        age: seconds since then, by this machine's clock.
        subject: the dead-letter subject.
        problems: what of it cannot be read, in words.
        headers: all that it has; values can be credentials.
        body: the original's, unpacked.
    """

    sequence: int
    event_id: str
    event_type: str
    source: str
    reason: str
    handler: str
    error_class: str
    error_message: str
    deliveries: int
    redrives: int
    redriven_at: str
    redriven_by: str
    original_subject: str
    original_sequence: int | None
    consumer: str
    failed_at: datetime
    age: float = field(compare=False)
    subject: str
    problems: tuple[str, ...]
    headers: Headers
    body: bytes

    def __repr__(self) -> str:
        what = self.event_type or "an unreadable event"
        return f"<StoredDeadLetter {self.sequence}: {what} {self.event_id}, {self.reason}>"

    @property
    def is_ours(self) -> bool:
        """Whether celery_jetstream wrote it, not the gem."""
        return _is_ours(self.headers.get("nats-msg-id", ""))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without headers and body."""
        return {
            one.name: _plain(getattr(self, one.name))
            for one in fields(self)
            if one.name not in ("headers", "body")
        }

    def as_record(self) -> dict[str, Any]:
        """All of it as plain values: a line of an export. ``body``, else ``body_base64``."""
        try:
            body = {"body": self.body.decode()}
        except UnicodeDecodeError:
            body = {"body_base64": base64.b64encode(self.body).decode()}
        return {"schema": SCHEMA, **self.as_dict(), "headers": dict(self.headers), **body}


def canonical_reason(reason: str) -> str:
    """Our word for a reason of the gem's; any other as it is."""
    return _REASONS.get(reason, reason)


def read_letter(
    sequence: int,
    subject: str,
    headers: Mapping[str, str],
    body: bytes,
    stored_at: datetime,
    now: datetime,
) -> StoredDeadLetter:
    """Reads what the stream has; never raises for what somebody wrote.

    Args:
        sequence: its number in the stream.
        subject: the dead-letter subject.
        headers: its headers.
        body: its body, perhaps packed.
        stored_at: when the server stored it, with its offset.
        now: what its age is counted to.
    """
    found, problems = Headers(headers), list[str]()
    context = _context(found, problems)
    unpacked = _unpacked(found, body, problems)
    envelope = _envelope(unpacked)
    where = context.get("sequence")
    noted = context.get("stream_sequence")
    original = noted if noted is not None or not isinstance(where, dict) else where.get("stream")
    original_subject = context.get("original_subject")
    original_subject = _text(original_subject) if isinstance(original_subject, str) else ""
    failed_at = _moment(context) or stored_at
    counted = (_number(found.get("x-redrives")), _number(context.get("redrives")))
    return StoredDeadLetter(
        sequence=sequence,
        event_id=_event_id(envelope, context, found),
        event_type=_text(envelope.get("event_type")),
        source=original_subject.partition(".")[0] or _text(envelope.get("producer")),
        reason=found.get("x-dlq-reason", "") or _text(context.get("reason")),
        handler=_text(context.get("handler")),
        error_class=_text(context.get("error_class")),
        error_message=_text(context.get("error_message")),
        deliveries=_number(found.get("x-deliveries", context.get("deliveries"))),
        redrives=max(counted),
        redriven_at=found.get("x-redriven-at", ""),
        redriven_by=found.get("x-redriven-by", ""),
        original_subject=original_subject,
        original_sequence=original if isinstance(original, int) else None,
        consumer=_text(context.get("consumer")),
        failed_at=failed_at,
        age=round((now - failed_at).total_seconds(), 3),
        subject=subject,
        problems=tuple(problems),
        headers=found,
        body=unpacked,
    )


def _context(headers: Headers, problems: list[str]) -> dict[str, Any]:
    text = headers.get("x-dlq-context")
    try:
        found = {} if text is None else json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if text is None or not isinstance(found, dict):
        problems.append("no x-dlq-context" if text is None else "x-dlq-context is no JSON object")
        return {}
    return found


def _unpacked(headers: Headers, body: bytes, problems: list[str]) -> bytes:
    encoding = headers.get("x-dlq-encoding", "")
    if not encoding:
        return body
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        found = unpacker.decompress(body, _UNPACKED) if encoding == "gzip" else None
    except zlib.error:
        found = None
    if found is None or not unpacker.eof:
        problems.append(f"the body cannot be unpacked (x-dlq-encoding is {encoding!r:.40})")
        return body
    return found


def _envelope(body: bytes) -> dict[str, Any]:
    try:
        found = jsontext.read(body)
    except DecodeError:
        found = None
    return found if isinstance(found, dict) else {}


def _event_id(envelope: dict[str, Any], context: dict[str, Any], headers: Headers) -> str:
    noted = headers.get("nats-msg-id", "")  # ours is the dead letter's, not the event's
    sources = (envelope.get("event_id"), context.get("event_id"), noted)
    found = next((text for text in map(_text, sources) if text), "")
    return "" if found == noted and _is_ours(noted) else found


def _is_ours(message_id: str) -> bool:
    return message_id.startswith("dlq-")


def _moment(context: dict[str, Any]) -> datetime | None:
    when = context.get("timestamp") or context.get("published_at")
    try:
        found = read_produced_at({"produced_at": when})
        return found.astimezone(timezone.utc) if found else None
    except (DecodeError, OverflowError):  # in the year 1, or 9999, with an offset
        return None


def _text(value: object) -> str:
    """Text (a lone surrogate as its escape), or a number as such; anything else is none."""
    if not isinstance(value, (str, int, float)):
        return ""
    return str(value).encode(errors="backslashreplace").decode()


def _number(value: object) -> int:
    text = _text(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return list(value) if isinstance(value, tuple) else value
