"""Publishing: an event becomes a message, and JetStream confirms that it is stored.

Hands on one :class:`PublishResult` for each event, in order. Whatever looks like an outage is sent
again with the same ``Nats-Msg-Id``, so that the server's duplicate window drops the second of two.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from . import events, signals, subjects
from .capabilities import ATOMIC_BATCHES, has
from .config import Config
from .connection import Connection
from .exceptions import (
    ConnectionRefusedByServer,
    EventError,
    NoResponders,
    NotConnectedError,
    PermissionDeniedError,
)
from .headers import validate_headers, wire_size
from .outcomes import Message, PublishResult, Verdict, failed
from .pipeline import send_pipelined
from .session import Session

__all__ = ("Message", "PublishResult", "Publisher")

logger = logging.getLogger(__name__)

#: Seconds that one attempt waits for the answers of one window. A cluster whose leader hangs elects
#: another in 4 to 5 s: that long and it would be missed by a little, and waited for once more.
ATTEMPT_TIMEOUT = 3.0
RETRY_DELAY = (0.1, 2.0)
#: Seconds to wait for what the stream is like.
ASK_TIMEOUT = 2.0
STREAM_NOT_FOUND = 10059


class Publisher:
    """Publishes through a connection. Thread-safe; one per process and app."""

    def __init__(
        self, config: Config, connection: Connection, on_no_stream: Callable[[], Awaitable[None]]
    ) -> None:
        self._config = config
        self._subject = config.publish_subject
        self._connection = connection
        self._on_no_stream = on_no_stream
        self._asked: Session | None = None
        self._atomic = self._told = False

    def message(
        self,
        *,
        event_type: str,
        payload: Any,
        destination: str | None = None,
        subject: str | None = None,
        headers: Mapping[str, object] | None = None,
        **envelope: Any,
    ) -> Message:
        """Builds and checks a message; sends nothing.

        Raises:
            EventError: the event or a header cannot be sent, or it is too large.
            SubjectError: the subject or the destination is not legal.
        """
        config = self._config
        event = events.build(
            event_type=event_type, payload=payload, producer=config.app_name, **envelope
        )
        if subject is not None and destination is not None:
            raise EventError("give either destination= or subject=, not both")
        if subject is not None:
            subjects.validate_subject(subject)
        elif destination is not None:
            subject = subjects.publish_subject(config.app_name, destination)
        else:
            subject = self._subject
        wire_headers = validate_headers(headers)
        if signals.event_built.receivers:
            signals.event_built.send(
                sender=self, event=event, subject=subject, headers=wire_headers
            )
            wire_headers = validate_headers(wire_headers)
        wire_headers["Nats-Msg-Id"] = event.event_id
        body = events.encode(event)
        size = wire_size(body, wire_headers)
        limit = config.payload_limit - config.max_payload + self._connection.max_payload
        if size > limit:
            raise EventError(
                f"event {event.event_id} ({event_type}) has {size} bytes with its headers, more "
                f"than the {limit} that jetstream_max_payload and the server's max_payload leave "
                "(4 KiB are kept free for dead-letter headers): send a reference to the data "
                "instead"
            )
        return Message(event.event_id, subject, body, wire_headers, event)

    async def send(self, messages: Sequence[Message], timeout: float) -> list[PublishResult]:
        """Sends all, again and again what an outage stopped, for ``timeout`` seconds.

        Runs in the loop thread. Never raises for the broker's sake: each message has its result,
        at the same index.
        """
        deadline = time.monotonic() + timeout
        results: list[PublishResult | None] = [None] * len(messages)
        todo = list(range(len(messages)))
        delay, most = RETRY_DELAY
        while True:
            left = deadline - time.monotonic()
            outcomes = await self._send_once([messages[i] for i in todo], left)
            for index, outcome in zip(todo, outcomes, strict=True):
                results[index] = outcome
            todo = [i for i, outcome in zip(todo, outcomes, strict=True) if outcome.transient]
            pause = random.uniform(0.5, 1.0) * delay
            if not todo or time.monotonic() + pause >= deadline:
                return [result for result in results if result is not None]
            if any(outcome.verdict is Verdict.NO_STREAM for outcome in outcomes):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._on_no_stream(), deadline - time.monotonic())
            await asyncio.sleep(pause)
            delay = min(most, delay * 2)

    async def attempt(
        self,
        messages: Sequence[Message],
        keys: Sequence[str | None] | None,
        timeout: float,
        batches: Sequence[str | None] | None = None,
    ) -> list[PublishResult]:
        """Sends each once, in order for each key; see :func:`~.pipeline.send_pipelined`.

        Where the stream takes no atomic batches, ``batches`` are left out of account.

        Runs in the loop thread. Never raises for the broker's sake; a server that refuses our
        credentials is an outage here, since no message is at fault.
        """
        try:
            return await self._attempt(messages, keys, timeout, timeout, batches)
        except NotConnectedError as error:
            return [failed(message, error) for message in messages]

    async def _send_once(self, messages: Sequence[Message], timeout: float) -> list[PublishResult]:
        try:
            patience = ATTEMPT_TIMEOUT + len(messages) / 2000
            return await self._attempt(messages, None, timeout, patience)
        except ConnectionRefusedByServer as error:  # who waits for it is told at once
            return [failed(message, Verdict.DENIED, str(error)) for message in messages]
        except NotConnectedError as error:
            return [failed(message, error) for message in messages]

    async def _attempt(
        self,
        messages: Sequence[Message],
        keys: Sequence[str | None] | None,
        timeout: float,
        patience: float,
        batches: Sequence[str | None] | None = None,
    ) -> list[PublishResult]:
        """``timeout`` is for all of it, ``patience`` for the answers once there is a session."""
        end = time.monotonic() + timeout
        session = await self._connection.session(max(0.001, timeout))
        if batches is not None and not await self._takes_batches(session, end - time.monotonic()):
            batches = None
        left = max(0.001, min(end - time.monotonic(), patience))
        return await send_pipelined(
            session,
            messages,
            keys=keys,
            batches=batches,
            timeout=left,
            on_no_batches=lambda: self._learn_batches(session, takes=False),
        )

    async def _takes_batches(self, session: Session, timeout: float) -> bool:
        """Whether the stream takes atomic batches; asked once for each session.

        Raises:
            NotConnectedError: JetStream cannot say now.
        """
        if self._asked is session:
            return self._atomic
        if not self._config.auto_provision:  # not asked, but tried: see _attempt
            self._learn_batches(session, has(session.server_version, ATOMIC_BATCHES))
            return self._atomic
        try:
            config = await asyncio.wait_for(
                self._stream_config(session), min(ASK_TIMEOUT, timeout / 2)
            )
        except NoResponders:
            return False  # what we publish to is another account's
        except PermissionDeniedError:
            config = {}
        except asyncio.TimeoutError:
            raise NotConnectedError("JetStream does not say what the stream is like") from None
        self._learn_batches(session, bool(config.get("allow_atomic")))
        return self._atomic

    def _learn_batches(self, session: Session, takes: bool) -> None:
        self._asked, self._atomic = session, takes
        if not takes and not self._told:
            self._told = True
            logger.warning(
                "jetstream_outbox_atomic is on, but stream %s takes no atomic batches (that needs "
                "nats-server 2.12, and allow_atomic): events are published one by one",
                self._config.stream_name,
            )

    async def _stream_config(self, session: Session) -> dict[str, Any]:
        """The stream's; without atomic batches, when it has been made sure of where it is ours."""
        subject = f"$JS.API.STREAM.INFO.{self._config.stream_name}"
        answer = json.loads((await session.ask(subject)).data)
        if not answer.get("config", {}).get("allow_atomic"):
            await self._on_no_stream()
            answer = json.loads((await session.ask(subject)).data)
        error = answer.get("error", {})
        if error and error.get("err_code") != STREAM_NOT_FOUND:
            raise NotConnectedError(f"JetStream answered {error}")
        config: dict[str, Any] = answer.get("config", {})
        return config

    async def has_stream(self, subject: str) -> bool | None:
        """Whether a stream takes a subject, made just now where that is our business.

        None where ``auto_provision`` is off: then JetStream is not asked. Runs in the loop thread.

        Raises:
            NotConnectedError: JetStream does not say.
        """
        await self._on_no_stream()
        if not self._config.auto_provision:
            return None
        session = await self._connection.session()
        asked = json.dumps({"subject": subject}).encode()
        answer = json.loads((await session.ask("$JS.API.STREAM.NAMES", asked)).data)
        if "error" in answer:
            raise NotConnectedError(f"JetStream answered {answer['error']}")
        return bool(answer.get("streams"))
