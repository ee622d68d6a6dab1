"""What the server has to say about the demo's messages, asked with JetStream's own API."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

from celery_jetstream import JetStream


@dataclass(frozen=True)
class DeadLetter:
    """A dead letter of ``desk``; ``sequence`` is the original's number in the stream."""

    reason: str
    error: str
    event_type: str
    event_id: str
    sequence: int


class Stream:
    """The stream of ``hub`` and ``desk``, seen from outside.

    Args:
        jetstream: a JetStream whose connection is used; it is the hub's.
    """

    def __init__(self, jetstream: JetStream) -> None:
        self._jetstream = jetstream
        self._name = jetstream.config.stream_name
        self._to_desk = jetstream.config.publish_subject
        self._dead = f"{jetstream.config.destination_app}.sync.dlq"
        self._letters: list[DeadLetter] = []
        self._next = 1

    def counts(self) -> tuple[int, int]:
        """``(published, left)``: what was ever stored for the desk, and what of it still is.

        The stream counts everything it ever stored; what is not a dead letter was published.
        """
        answer = self._ask(f"STREAM.INFO.{self._name}", subjects_filter=">")
        if "error" in answer:  # no stream yet
            return 0, 0
        stored = answer["state"].get("subjects") or {}
        published = answer["state"]["last_seq"] - stored.get(self._dead, 0)
        return published, stored.get(self._to_desk, 0)

    def dead_letters(self) -> list[DeadLetter]:
        """All dead letters, oldest first; reads those that came since the last time."""
        while True:
            answer = self._ask(
                f"STREAM.MSG.GET.{self._name}", seq=self._next, next_by_subj=self._dead
            )
            if "error" in answer:  # no more
                return self._letters
            message = answer["message"]
            self._next = message["seq"] + 1
            self._letters.append(_read(message))

    def _ask(self, operation: str, **request: Any) -> dict[str, Any]:
        async def ask() -> dict[str, Any]:
            session = await self._jetstream.connection.session()
            answer = await session.ask(f"$JS.API.{operation}", json.dumps(request).encode())
            found: dict[str, Any] = json.loads(answer.data)
            return found

        return self._jetstream.connection.run(ask)


def _read(message: dict[str, Any]) -> DeadLetter:
    block = base64.b64decode(message["hdrs"]).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in block if ": " in line)
    context = json.loads(headers["x-dlq-context"])
    return DeadLetter(
        reason=headers["x-dlq-reason"],
        error=": ".join(filter(None, (context["error_class"], context["error_message"]))),
        event_type=_event_type(base64.b64decode(message.get("data", ""))),
        event_id=context["event_id"],
        sequence=context["stream_sequence"],
    )


def _event_type(body: bytes) -> str:
    try:
        return str(json.loads(body)["event_type"])
    except (ValueError, LookupError, TypeError):
        return ""
