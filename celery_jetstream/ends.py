"""How a task ended becomes the settlement of its message, by way of the inbox where it has one.

Normal ends are settled when Celery sends ``task_postrun``, in the process that ran the task.
Those that this process does not live to see are the worker's main process' business
(:mod:`celery_jetstream.request`), which does not wait for a database: :func:`settle_aside`.

With an inbox a failure is recorded first, after its transaction is over, and the row tells which
attempt it was. What the row calls done is done, whatever came after.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

from celery import signals
from celery.exceptions import Ignore
from celery.states import SUCCESS
from celery.worker import state as worker_state

from .delivery import Delivery
from .exceptions import InboxUnavailableError, OutageError
from .handlers import HEADER, JetStreamTask, delivery_of, is_direct
from .settlement import Ack, DeadLetter, End, Nak, Settlement, decide

if TYPE_CHECKING:
    from .inbox import Inbox
    from .inbox_rows import Entry

__all__ = ("settle", "settle_aside")

logger = logging.getLogger(__name__)

#: Seconds that a killed process's transaction may need to be rolled back.
ROLLBACK = 3.0

Ended = End | BaseException | Settlement


@signals.task_postrun.connect(weak=False)
def settle_ended_task(
    sender: Any = None, retval: Any = None, state: str | None = None, **_: Any
) -> None:
    """Settles the message of a handler that has just ended, before its result is reported.

    Celery sends the signal in the process that ran the task, whatever the end, with the real
    exception (an unpicklable one reaches the main process as something else). No ``state`` means
    that a ``SystemExit`` or the like is on its way: in a pool child the process dies of it and
    the main process settles.
    """
    if not isinstance(sender, JetStreamTask):
        return
    request = sender.request
    delivery = delivery_of(request)
    if delivery is None:
        return
    if isinstance(retval, OutageError) and is_direct(getattr(request, HEADER)):
        if sender.has_inbox:
            with contextlib.suppress(InboxUnavailableError):
                entry = sender.entry(delivery, getattr(request, HEADER))
                sender.app.jetstream.inbox.release(entry)
        return  # it waits in this worker
    end: Any = getattr(request, "jetstream_settlement", None)
    if end is None:
        end = End.RETURNED if state == SUCCESS else retval
    if state is None:
        if request.id not in worker_state.requests:
            return
        end = SystemExit("the handler ended its thread")
    settle(sender, delivery, end, header=getattr(request, HEADER), request=request)


def settle_aside(task: JetStreamTask, delivery: Delivery, end: Ended, header: Any) -> None:
    """Settles an end that only the worker's main process saw; never blocks.

    Where recording it takes so long that JetStream delivers the message again meanwhile, it is
    left at that.
    """
    jetstream = task.app.jetstream
    if not task.has_inbox or not (_is_failure(end) or end is End.CUT_OFF):
        settle(task, delivery, end, header=header)
        return
    until = time.monotonic() + jetstream.config.ack_wait * 0.8
    jetstream.aside.put(
        partial(settle, task, delivery, end, header=header, patience=ROLLBACK, until=until)
    )


def settle(
    task: JetStreamTask,
    delivery: Delivery,
    end: Ended,
    *,
    header: Any = None,
    request: Any = None,
    patience: float = 0.0,
    until: float = float("inf"),
) -> None:
    """Decides and hands the settlement on; waits for nothing but the inbox's database.

    Args:
        task: the handler.
        delivery: the hand-over.
        end: how it ended.
        header: the copy's, which names the event.
        request: the task's, in the process that ran it. Its ``jetstream_settler``, where it has
            one, carries the settlement out (the testing kit's).
        patience: seconds to wait for a transaction that a killed process has left.
        until: by the monotonic clock, after which it is not settled any more.
    """
    jetstream = task.app.jetstream
    attempt = getattr(request, "jetstream_attempt", None) or delivery.num_delivered
    refused = isinstance(end, Settlement) and getattr(request, "jetstream_refused", False)
    if task.has_inbox and not refused:  # what the inbox did not let run has not failed
        entry = task.entry(delivery, header)
        end, attempt = _recorded(jetstream.inbox, entry, end, attempt, patience)
    settlement = decide(
        end,
        task.policy(jetstream.config),
        attempt,
        exhausted=getattr(request, "jetstream_exhausted", False),
        jitter=random.random(),
        now=datetime.now(timezone.utc),
    )
    if settlement is not None and time.monotonic() < until:
        settler = getattr(request, "jetstream_settler", None) or jetstream.settler
        settler.settle(delivery, settlement, handler=task.name)


def _is_failure(end: Ended) -> bool:
    if isinstance(end, BaseException):
        return not isinstance(end, Ignore)
    return end is End.REVOKED or isinstance(end, (DeadLetter, Nak))


def _recorded(
    inbox: Inbox, entry: Entry, end: Ended, attempt: int, patience: float
) -> tuple[Ended, int]:
    """What the end amounts to by what the inbox has, and which attempt it was."""
    delivered = entry.delivery.num_delivered
    try:
        if isinstance(end, BaseException) and inbox.is_outage(end):
            end = End.CONFLICT if inbox.is_lost_conflict(end) else End.OUTAGE
        if end in (End.CONFLICT, End.OUTAGE, End.CUT_OFF):
            with contextlib.suppress(InboxUnavailableError):
                inbox.release(entry)
            return end, delivered
        if not _is_failure(end):
            return end, attempt
        answer = inbox.fail(entry, _text(end), patience)
    except InboxUnavailableError as error:
        logger.error(
            "how %s ended could not be recorded: %s",
            entry.delivery.task_id,
            error,
            extra=entry.log_fields,
        )
        return End.OUTAGE, delivered
    except Exception:  # whatever it is, the message must be settled, and not for ever tried
        logger.exception(
            "how %s ended could not be recorded", entry.delivery.task_id, extra=entry.log_fields
        )
        return end, max(attempt, delivered)
    if isinstance(end, Settlement):
        return end, attempt
    if answer.verdict is answer.verdict.BUSY:
        return End.DUPLICATE, attempt
    if answer.verdict is answer.verdict.PROCESSED:
        logger.warning(
            "%s is done, though its task ended with: %s",
            entry.delivery.task_id,
            end,
            extra=entry.log_fields | {"outcome": "ack"},
        )
        return Ack(), attempt
    return end, answer.attempts


def _text(end: Ended) -> str:
    if isinstance(end, DeadLetter):
        return f"{end.reason}: {end.error_class}: {end.error_message}"
    return repr(end) if isinstance(end, BaseException) else str(end)
