"""Dead letters: what a message that was given up is kept as.

:func:`build` makes one of the original and the reason (pure); :func:`fetch_original` reads the
original from the stream, for a worker has only the envelope as Python values. Publishing is the
settler's work. The body is the original's, byte for byte; the original's ``Nats-*`` headers are
left behind: a stored ``Nats-Expected-*`` or ``Nats-TTL`` would make the copy fail for ever, and
the original ``Nats-Msg-Id`` would make the server drop the copy as a duplicate, for the
dead-letter subject is in the same stream.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from .delivery import Delivery
from .exceptions import NotConnectedError
from .headers import Headers, wire_size
from .session import Session
from .settlement import DeadLetter

__all__ = (
    "NO_MESSAGE_FOUND",
    "REDRIVES",
    "Original",
    "build",
    "fetch_original",
    "original_of",
    "redrives_of",
)

#: Bytes that the reason headers may have; a longer error message is cut.
CONTEXT_LIMIT = 3072
MESSAGE_LIMIT = 1024
#: The server has no message with this sequence.
NO_MESSAGE_FOUND = 10037
#: The header that counts how often a message was sent again out of the dead letters.
REDRIVES = "x-redrives"


@dataclass(frozen=True)
class Original:
    """The message as the stream has it."""

    subject: str
    body: bytes
    headers: Mapping[str, str]


async def fetch_original(session: Session, delivery: Delivery) -> Original | None:
    """Reads the message from the stream (``$JS.API.STREAM.MSG.GET``).

    Returns:
        The message; None where the stream has it no more (settled by another, or purged).

    Raises:
        NotConnectedError: no answer, or the server could not say.
    """
    request = json.dumps({"seq": delivery.sequence}).encode()
    answer = await session.ask(f"$JS.API.STREAM.MSG.GET.{delivery.stream}", request)
    found = json.loads(answer.data)
    problem = found.get("error")
    if problem:
        if problem.get("err_code") == NO_MESSAGE_FOUND or problem.get("code") == 404:
            return None
        raise NotConnectedError(f"could not read the message: {problem.get('description')}")
    return original_of(found["message"])


def original_of(message: Mapping[str, Any]) -> Original:
    """The message in an answer of ``$JS.API.STREAM.MSG.GET``."""
    return Original(
        subject=message["subject"],
        body=base64.b64decode(message.get("data", "")),
        headers=_parse_headers(base64.b64decode(message.get("hdrs", ""))),
    )


def build(
    original: Original, delivery: Delivery, end: DeadLetter, limit: int, now: datetime | None = None
) -> tuple[bytes, dict[str, str]] | None:
    """The dead letter's body and headers, at most ``limit`` bytes together.

    What is too big loses, in this order: the user's headers, the error message, and its plain
    form (gzip, said by ``x-dlq-encoding``).

    Returns:
        None where it is too big all the same.
    """
    kept = {k: v for k, v in original.headers.items() if not k.lower().startswith("nats-")}
    own = _own_headers(original, delivery, end, now, CONTEXT_LIMIT)
    short = _own_headers(original, delivery, end, now, 0)
    packed = {**short, "x-dlq-encoding": "gzip"}
    for body, headers in (
        (original.body, {**kept, **own}),
        (original.body, own),
        (original.body, short),
    ):
        if wire_size(body, headers) <= limit:
            return body, headers
    body = gzip.compress(original.body, mtime=0)
    return (body, packed) if wire_size(body, packed) <= limit else None


def _own_headers(
    original: Original, delivery: Delivery, end: DeadLetter, now: datetime | None, room: int
) -> dict[str, str]:
    error_message = end.error_message[:MESSAGE_LIMIT]
    context = {
        "event_id": _event_id(original),
        "error_class": end.error_class[:200],
        "error_message": error_message,
        "handler": end.handler[:200],
        "original_subject": original.subject,
        "stream": delivery.stream,
        "stream_sequence": delivery.sequence,
        "consumer": delivery.consumer,
        "consumer_sequence": delivery.consumer_sequence,
        "deliveries": delivery.num_delivered,
        "redrives": redrives_of(original.headers),
        "timestamp": (now or datetime.now(timezone.utc)).isoformat(),
    }
    text = json.dumps(context)
    while len(text) > room and error_message:
        error_message = error_message[: len(error_message) // 2]
        text = json.dumps({**context, "error_message": error_message})
    return {
        "x-dead-letter": "true",
        "x-dlq-reason": end.reason,
        "x-deliveries": str(delivery.num_delivered),
        "x-dlq-context": text,
        "Nats-Msg-Id": f"dlq-{delivery.stream}-{delivery.sequence}",
    }


def redrives_of(headers: Mapping[str, str]) -> int:
    """How often a message was sent again out of the dead letters."""
    text = Headers(headers).get(REDRIVES, "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _event_id(original: Original) -> str:
    """The envelope's id; where there is no envelope, the header's; else empty. At most 255."""
    try:
        found = json.loads(original.body).get("event_id")
    except (ValueError, AttributeError, RecursionError):
        found = None
    if found in (None, ""):
        names = {name.lower(): value for name, value in original.headers.items()}
        found = names.get("nats-msg-id", "")
    return str(found)[:255]


def _parse_headers(block: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in block.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            headers[name.decode("ascii", "replace").strip()] = value.decode(
                "utf-8", "replace"
            ).strip()
    return headers
