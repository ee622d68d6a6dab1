"""One hand-over of a message, read from its ack subject, and carried by the task message.

Receives the reply subject and the headers of a message that a consumer delivered, or the
``jetstream`` header of a task message; hands on a :class:`Delivery`. Pure: it settles nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from .exceptions import shown
from .headers import Headers

__all__ = ("Delivery",)

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One hand-over of a message by a consumer, as its ack subject tells it (ADR-15).

    Attributes:
        stream: the stream that keeps the message.
        sequence: the message's number in the stream.
        num_delivered: how often it was handed over by now; 1 the first time.
        consumer: the durable consumer.
        reply: the ack subject, where the settlement goes.
        headers: the message's headers.
    """

    stream: str
    sequence: int
    num_delivered: int
    consumer: str
    reply: str
    headers: Mapping[str, str] = field(default_factory=Headers, hash=False, repr=False)

    @classmethod
    def from_reply(cls, reply: str, headers: Mapping[str, str] | None = None) -> Delivery:
        """Read the reply subject of a delivered message, in the short or the domain form.

        Raises:
            ValueError: ``reply`` is not a JetStream ack subject.
        """
        stream, consumer, num_delivered, sequence, *_ = _ack_tokens(reply)
        return cls(
            stream=stream,
            sequence=int(sequence),
            num_delivered=int(num_delivered),
            consumer=consumer,
            reply=reply,
            headers=Headers(headers),
        )

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Delivery:
        """Read the ``jetstream`` header of a task message; keys it does not know are ignored.

        Raises:
            ValueError: a key is missing or of the wrong type.
        """
        try:
            headers = header.get("headers") or {}
            "".join(headers)  # its names are text
            return cls(
                stream=str(header["stream"]),
                sequence=int(header["sequence"]),
                num_delivered=int(header["num_delivered"]),
                consumer=str(header["consumer"]),
                reply=str(header["reply"]),
                headers=Headers(headers),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a jetstream header: {error!r}") from error

    def to_header(self) -> dict[str, Any]:
        """Return the ``jetstream`` header of the task message: plain JSON values."""
        return {
            "stream": self.stream,
            "sequence": self.sequence,
            "num_delivered": self.num_delivered,
            "consumer": self.consumer,
            "reply": self.reply,
            "headers": dict(self.headers),
        }

    @property
    def task_id(self) -> str:
        """The Celery task id of every copy of this message, so that copies are seen as such."""
        return f"{self.stream}-{self.sequence}"

    @property
    def log_fields(self) -> dict[str, Any]:
        """What a line about it has in its ``extra``."""
        return {"stream_sequence": self.sequence, "num_delivered": self.num_delivered}

    @property
    def consumer_sequence(self) -> int:
        """The number of this hand-over among all that the consumer made."""
        return int(_ack_tokens(self.reply)[4])

    @property
    def num_pending(self) -> int:
        """How many messages the consumer had left to hand over after this one."""
        return int(_ack_tokens(self.reply)[6])

    @property
    def timestamp(self) -> datetime:
        """When the server stored the message, in UTC (the server's clock, to a microsecond)."""
        return _EPOCH + timedelta(microseconds=int(_ack_tokens(self.reply)[5]) // 1000)


def _ack_tokens(reply: str) -> list[str]:
    """Return stream, consumer and the five numbers of an ack subject.

    ``$JS.ACK.`` is followed by those seven, or, since nats-server 2.7 where a domain is set, by
    domain, account hash, those seven, and what later servers may add (ADR-15).

    Raises:
        ValueError: it is not an ack subject.
    """
    tokens = reply.split(".")
    found = tokens[2:] if len(tokens) == 9 else tokens[4:11]
    numbers = "".join(found[2:])
    if (
        tokens[:2] != ["$JS", "ACK"]
        or len(found) != 7
        or not (all(found) and numbers.isascii() and numbers.isdigit())
    ):
        raise ValueError(f"{shown(reply)} is not a JetStream ack subject")
    return found
