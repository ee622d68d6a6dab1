"""The library's own tasks: ``publish_event`` and the signal hook that uses it; the outbox's sweep.

All use the current app's JetStream, so that they work in reusable packages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from celery import current_app, shared_task

from .deadletter_filter import EVERY_LETTER, DeadLetterFilter
from .exceptions import (
    ConfigurationError,
    DatabaseUnavailableError,
    NotConnectedError,
    OutboxUnavailableError,
)
from .outcomes import Verdict

__all__ = (
    "count_dead_letters",
    "flush_outbox",
    "prune_inbox",
    "prune_outbox",
    "publish_event",
    "publish_on",
    "purge_dead_letters",
    "redrive_dead_letters",
)

logger = logging.getLogger(__name__)

#: Seconds that a signal's sender may be kept waiting by ``immediate=True``.
IMMEDIATE_TIMEOUT = 1.0


@shared_task(
    bind=True,
    name="celery_jetstream.publish_event",
    max_retries=None,
    retry_backoff=True,
    autoretry_for=(NotConnectedError, OutboxUnavailableError),
    retry_backoff_max=60,
)
def publish_event(self: Any, **event: Any) -> dict[str, Any]:
    """Publishes an event as a task: ``publish_event.delay(event_type=…, payload=…)``.

    The arguments are those of ``JetStream.publish``. The ``event_id`` is the task's id unless
    given, so that a task that the broker delivers twice stores one event. An outage, or a
    permission that is missing, retries the task, for ever, with the same ``event_id``; a refusal
    fails it. With ``jetstream_use_outbox``
    the event becomes a row of the outbox.

    Returns:
        The ``PublishResult`` as a dict.

    Raises:
        PublishError: JetStream refused the event.
        EventError: the event cannot be sent.
    """
    event.setdefault("event_id", self.request.id)
    jetstream = self.app.jetstream
    if jetstream.config.use_outbox:
        event.pop("timeout", None)  # nobody waits
        try:
            return dict(jetstream.outbox.publish(**event).as_dict())
        except ConfigurationError as error:  # a deploy may be ahead of its migrations
            raise OutboxUnavailableError(str(error)) from error
    result = jetstream.publish(**event)
    if not result.success and (result.transient or result.verdict is Verdict.DENIED):
        raise NotConnectedError(result.error)  # no event is at fault
    return dict(result.raise_for_error().as_dict())


@shared_task(bind=True, name="celery_jetstream.flush_outbox", ignore_result=True, acks_late=False)
def flush_outbox(self: Any, max_seconds: float | None = None) -> dict[str, Any]:
    """Publishes what is due in the outbox, for ``jetstream_outbox_max_seconds`` at the most.

    Sent by beat, and after a commit by a process that is not connected to NATS itself. Any number
    of them at once is correct. An outage, of NATS or of the database, is in the result.

    Returns:
        The ``FlushResult`` as a dict.
    """
    jetstream = self.app.jetstream
    try:
        result = jetstream.outbox.drain(max_seconds or jetstream.config.outbox_max_seconds)
    except OutboxUnavailableError as error:
        _say_away("the outbox was not flushed: %s", error)
        return {"outage": str(error)}
    _say_back("the outbox is flushed again")
    return dict(result.as_dict())


@shared_task(bind=True, name="celery_jetstream.prune_outbox", ignore_result=True, acks_late=False)
def prune_outbox(self: Any, max_seconds: float = 60.0) -> dict[str, Any]:
    """Deletes rows that were sent longer than ``jetstream_outbox_retention`` ago, in small steps.

    Returns:
        ``{"deleted": …}``.
    """
    try:
        return {"deleted": self.app.jetstream.outbox.prune(max_seconds=max_seconds)}
    except OutboxUnavailableError as error:
        logger.warning("the outbox was not pruned: %s", error)
        return {"outage": str(error)}


@shared_task(bind=True, name="celery_jetstream.prune_inbox", ignore_result=True, acks_late=False)
def prune_inbox(self: Any, max_seconds: float = 60.0) -> dict[str, Any]:
    """Deletes rows of the inbox older than ``jetstream_inbox_retention``, in small steps.

    Returns:
        ``{"deleted": …}``.
    """
    try:
        return {"deleted": self.app.jetstream.inbox.prune(max_seconds=max_seconds)}
    except DatabaseUnavailableError as error:
        logger.warning("the inbox was not pruned: %s", error)
        return {"outage": str(error)}


@shared_task(bind=True, name="celery_jetstream.count_dead_letters", acks_late=False)
def count_dead_letters(self: Any, **chosen: Any) -> dict[str, Any]:
    """Counts the app's dead letters: ``count_dead_letters.delay(newer_than=3600)``.

    The arguments are the attributes of a ``DeadLetterFilter``; none for all.

    Returns:
        The ``DeadLetterCounts`` as a dict.
    """
    return dict(self.app.jetstream.dead_letters.count(DeadLetterFilter.of(chosen)).as_dict())


@shared_task(bind=True, name="celery_jetstream.redrive_dead_letters", acks_late=False)
def redrive_dead_letters(
    self: Any,
    *,
    everything: bool = False,
    rate: float | None = None,
    limit: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    **chosen: Any,
) -> dict[str, Any]:
    """Sends dead letters again: ``redrive_dead_letters.delay(handler="shop.pay", rate=200)``.

    Killed in between, or delivered twice by the broker, it does no harm: send it again.

    The arguments are the attributes of a ``DeadLetterFilter``, or ``everything=True``; and ``rate``
    (events a second), ``limit``, ``force`` and ``dry_run`` as for ``DeadLetters.redrive``.

    Returns:
        The ``RedriveResult`` as a dict; an outage is in its ``error``.

    Raises:
        ValueError: neither a filter nor ``everything``, or both.
    """
    by = f"task {self.request.id or self.name} on {self.request.hostname or 'this host'}"
    result = self.app.jetstream.dead_letters.redrive(
        _letters(chosen, everything), rate=rate, limit=limit, force=force, dry_run=dry_run, by=by
    )
    return dict(result.as_dict())


@shared_task(bind=True, name="celery_jetstream.purge_dead_letters", acks_late=False)
def purge_dead_letters(
    self: Any,
    *,
    everything: bool = False,
    limit: int | None = None,
    dry_run: bool = False,
    **chosen: Any,
) -> dict[str, Any]:
    """Deletes dead letters for ever: ``purge_dead_letters.delay(older_than=30 * 86400)``.

    The arguments are the attributes of a ``DeadLetterFilter``, or ``everything=True``; ``limit``
    and ``dry_run``.

    Returns:
        The ``PurgeResult`` as a dict; an outage is in its ``error``.

    Raises:
        ValueError: neither a filter nor ``everything``, or both.
    """
    letters = self.app.jetstream.dead_letters
    result = letters.purge(_letters(chosen, everything), limit=limit, dry_run=dry_run)
    return dict(result.as_dict())


def _letters(chosen: Mapping[str, Any], everything: bool) -> DeadLetterFilter:
    found = DeadLetterFilter.of(chosen)
    if found.is_empty != everything:
        raise ValueError("give a filter, or everything=True for every dead letter")
    return EVERY_LETTER if everything else found


_away = False


def _say_away(text: str, error: Exception) -> None:
    """Once for an outage: this comes every few seconds."""
    global _away
    logger.log(logging.DEBUG if _away else logging.WARNING, text, error)
    _away = True


def _say_back(text: str) -> None:
    global _away
    if _away:
        logger.warning(text)
    _away = False


def publish_on(
    signal: Any,
    *,
    event_type: str,
    sender: Any = None,
    payload: Callable[..., Any] | None = None,
    immediate: bool = False,
    **event: Any,
) -> Callable[..., None]:
    """Publishes an event whenever a signal is sent (Celery's, Django's).

    A failure is logged and never reaches the signal's sender. Signals of this library's own
    tasks are passed over.

    Args:
        signal: anything with ``connect(receiver, weak=False)``.
        event_type: the event's type.
        sender: only signals of this sender: the object itself or its ``.name`` (a task's name);
            None for all.
        payload: called with the signal's arguments (``sender=`` and the rest); its result is
            the payload. Default: the arguments that are plain JSON values.
        immediate: publish now, one attempt of at most 1 s, and not by ``publish_event.delay`` (or,
            with ``jetstream_use_outbox``, a row of the outbox).
        event: further arguments of ``JetStream.publish``.

    Returns:
        The receiver, for ``signal.disconnect``.
    """

    def receiver(signal: Any = None, sender: Any = None, **arguments: Any) -> None:
        if not _from(wanted, sender):
            return
        try:
            body = payload(sender=sender, **arguments) if payload else _plain(arguments)
            _publish(immediate, event_type=event_type, payload=body, **event)
        except Exception:
            fields = {"event_type": event_type}
            logger.exception("event %s of a signal was not published", event_type, extra=fields)

    wanted = sender
    signal.connect(receiver, weak=False)
    return receiver


def _publish(immediate: bool, **event: Any) -> None:
    if immediate:
        current_app.jetstream.publish(timeout=IMMEDIATE_TIMEOUT, **event).raise_for_error()
    elif current_app.jetstream.config.use_outbox:
        current_app.jetstream.outbox.publish(**event)
    else:
        publish_event.apply_async(kwargs=event, retry=False)


def _from(wanted: Any, sender: Any) -> bool:
    name = sender if isinstance(sender, str) else getattr(sender, "name", None)
    if isinstance(name, str) and name.startswith("celery_jetstream."):
        return False
    return wanted is None or wanted in (sender, name)


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    plain = (str, int, float, bool, list, dict, type(None))
    return {name: value for name, value in arguments.items() if isinstance(value, plain)}
