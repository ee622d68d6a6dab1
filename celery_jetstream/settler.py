"""Settling: carries a settlement out, once, confirmed, without keeping the task waiting.

An Ack or a Nak goes to :class:`~celery_jetstream.consumer.Acks`. A DeadLetter is published first
and the original is terminated after that; where it cannot be published, the original comes again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any

from . import deadletter, signals
from .acks import Acks, keep_in_progress
from .config import Config
from .connection import Connection
from .deadletter import Original
from .delivery import Delivery
from .exceptions import NotConnectedError, PermissionDeniedError, PublishError
from .publisher import Message, Publisher
from .settlement import Ack, DeadLetter, Nak, Settlement

__all__ = ("Settler",)

logger = logging.getLogger(__name__)

#: Seconds between two tries of a message whose dead letter is larger than the server takes.
TOO_BIG_DELAY = 3600.0
#: Seconds for which a dead letter that could not be stored is told of: its message comes again.
NOT_KEPT_SHOWN = 300.0


class Settler:
    """Carries settlements out for one process. Thread-safe; nothing here blocks but ``drain``."""

    def __init__(self, config: Config, connection: Connection, publisher: Publisher) -> None:
        self._config = config
        self._connection = connection
        self._publisher = publisher
        self._acks = Acks(
            connection, patience=max(300.0, 2 * config.ack_wait), nak_patience=config.ack_wait
        )
        self._burials: set[Future[None]] = set()
        self._too_big: deque[float] = deque(maxlen=1000)
        self._not_kept: tuple[float, str] | None = None
        self._lock = threading.Lock()

    def settle(
        self,
        delivery: Delivery,
        settlement: Settlement,
        original: Original | None = None,
        handler: str = "",
    ) -> None:
        """Settles a delivery; any thread.

        Args:
            delivery: whose message.
            settlement: what to do.
            original: the message as it came, where it is at hand; else it is read from the
                stream when a dead letter needs it.
            handler: the task's name; "" where there is none.
        """
        signals.message_settled.send(
            sender=self, delivery=delivery, settlement=settlement, handler=handler
        )
        if isinstance(settlement, Ack):
            self._acks.ack(delivery.reply)
        elif isinstance(settlement, Nak):
            self._acks.nak(delivery.reply, settlement.delay, settlement.pause)
        else:
            self._bury_soon(delivery, settlement, original, handler)

    def ack_again(self, delivery: Delivery) -> None:
        """Acks what was settled so before, where that may not have been sent; any thread."""
        self._acks.ack(delivery.reply)

    def drain(self, timeout: float) -> int:
        """Waits for the confirmations, ``timeout`` seconds at most; returns how many are missing.

        What is missing is delivered again after ``ack_wait``.
        """
        return self._connection.run(self._drain, timeout, timeout=timeout + 1)

    async def _drain(self, timeout: float) -> int:
        end = asyncio.get_running_loop().time() + timeout
        while self._burials and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        left = max(0.0, end - asyncio.get_running_loop().time())
        return len(self._burials) + await self._acks.drain(left)

    @property
    def pending(self) -> int:
        """Settlements not yet confirmed by the server."""
        return len(self._burials) + self._acks.unconfirmed

    @property
    def too_big(self) -> int:
        """How many messages of the last hour are too big to become a dead letter; 1000 at most."""
        since = time.monotonic() - TOO_BIG_DELAY
        return sum(when > since for when in list(self._too_big))

    @property
    def not_kept(self) -> str | None:
        """Why the last dead letter could not be stored; None where it was, or that was long ago."""
        when, error = self._not_kept or (0.0, "")
        return error if error and time.monotonic() - when < NOT_KEPT_SHOWN else None

    def _bury_soon(
        self, delivery: Delivery, end: DeadLetter, original: Original | None, handler: str
    ) -> None:
        future = self._connection.submit(self._bury, delivery, end, original, handler)
        with self._lock:
            self._burials.add(future)
        future.add_done_callback(self._burials.discard)

    async def _bury(
        self, delivery: Delivery, end: DeadLetter, original: Original | None, handler: str
    ) -> None:
        """Publish, then terminate the original; or have it come again."""
        try:
            if not self._config.use_dlq:
                self._discard(delivery, end, handler)
                return
            original = original or await self._read(delivery)
            if original is None:
                logger.warning(
                    "no dead letter: message %s is gone",
                    delivery.task_id,
                    extra=_fields(delivery, end, handler),
                )
                self._acks.ack(delivery.reply)
                return
            await self._publish(delivery, end, original, handler)
        except Exception as error:
            if not isinstance(error, (NotConnectedError, PublishError)):
                fields = _fields(delivery, end, handler)
                logger.exception("dead letter of %s failed", delivery.task_id, extra=fields)
            self._again(delivery, end, str(error), handler)

    async def _read(self, delivery: Delivery) -> Original | None:
        session = await self._connection.session(timeout=self._config.ack_wait)
        await keep_in_progress(session, [delivery.reply])
        return await deadletter.fetch_original(session, delivery)

    async def _publish(
        self, delivery: Delivery, end: DeadLetter, original: Original, handler: str
    ) -> None:
        fields = _fields(delivery, end, handler, original)
        built = deadletter.build(original, delivery, end, self._connection.max_payload)
        if built is None:
            self._too_big.append(time.monotonic())
            logger.error(
                "dead letter of %s is larger than jetstream_max_payload even packed; the message "
                "stays in the stream and is tried again in %d s",
                delivery.task_id,
                TOO_BIG_DELAY,
                extra=fields,
            )
            self._acks.nak(delivery.reply, TOO_BIG_DELAY)
            return
        body, headers = built
        message = Message(headers["Nats-Msg-Id"], self._config.dead_letter_subject, body, headers)
        ends = time.monotonic() + max(2.0, self._config.ack_wait / 2)
        session = await self._connection.session(ends - time.monotonic())
        session.on_denial(message.subject, _ignore)  # _again says it
        (result,) = await self._publisher.send([message], ends - time.monotonic())
        result.raise_for_error()
        self._acks.term(delivery.reply)
        if self.not_kept:
            logger.info("dead letters can be published again")
        self._not_kept = None
        logger.error(
            "message %s is a dead letter (%s): %s: %s",
            delivery.task_id,
            end.reason,
            end.error_class,
            end.error_message,
            extra=fields,
        )
        signals.message_dead_lettered.send(
            sender=self, delivery=delivery, reason=end.reason, headers=headers, handler=handler
        )

    def _again(self, delivery: Delivery, end: DeadLetter, error: str, handler: str) -> None:
        """The longest delay there is: the handler, which has given it up, may run again."""
        level = logging.DEBUG if self.not_kept else logging.ERROR
        self._not_kept = time.monotonic(), error
        delay = max(self._config.backoff)
        logger.log(
            level,
            "dead letter of %s (%s) could not be published (%s); it comes again in %g s, and so "
            "does each that follows",
            delivery.task_id,
            end.reason,
            error,
            delay,
            extra=_fields(delivery, end, handler),
        )
        self._acks.nak(delivery.reply, delay)

    def _discard(self, delivery: Delivery, end: DeadLetter, handler: str) -> None:
        logger.error(
            "message %s is given up and destroyed (%s): %s: %s (jetstream_use_dlq is off)",
            delivery.task_id,
            end.reason,
            end.error_class,
            end.error_message,
            extra=_fields(delivery, end, handler),
        )
        self._acks.term(delivery.reply)


def _ignore(_: PermissionDeniedError) -> None:
    """The publish has the same error."""


def _fields(
    delivery: Delivery, end: DeadLetter, handler: str, original: Original | None = None
) -> dict[str, Any]:
    """What a line about a dead letter has in its ``extra``."""
    known = {"event_id": delivery.headers.get("Nats-Msg-Id"), "handler": handler or None}
    if original is not None:
        known["subject"] = original.subject
    return delivery.log_fields | known | {"outcome": "dead_letter", "reason": end.reason}
